"""The options of reporting: who is notified of a finding, and how the process ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_divguard.alerts.alerts import CHANNELS, channels_of
from hf_divguard.errors import INTERRUPTED_EXIT_CODE
from hf_divguard.hf.options.values import did_you_mean, require_bool, require_whole

__all__ = ["ReportingOptions"]

_MOST = 125  # shells use the exit codes above for signals and for commands that cannot be run


@dataclass(repr=False, eq=False)
class ReportingOptions:
    """What is reported of findings, and to whom."""

    divguard_alerts: str = field(
        default="none",
        metadata={
            "help": "Where alerts go, with commas between them: webhook, slack, discord (addresses in the environment "
            "variables DIVGUARD_WEBHOOK_URL, DIVGUARD_SLACK_WEBHOOK_URL, DIVGUARD_DISCORD_WEBHOOK_URL), wandb, trackio. "
            "They are sent by rank 0 from a thread of their own, and only so many of them; none for nowhere."
        },
    )
    divguard_exit_code: int | None = field(
        default=None,
        metadata={
            "help": "Exit code with which train() ends the process after a stop, an abort or rollbacks that did not "
            "help, 0 to 125. 79 is what hf-divguard status --exit-code gives for such a run; none ends no process."
        },
    )
    divguard_incidents: int = field(
        default=10,
        metadata={
            "help": "How many folders divguard/incident-<step> are kept: the finding, the last 512 losses, gradient "
            "norms and learning rates, a picture, versions and arguments. The oldest go first; 0 writes none."
        },
    )
    divguard_incident_text: bool = field(
        default=False,
        metadata={
            "help": "Also put the decoded text of the rows of the steps in question into these folders. Off, because "
            "data may be private."
        },
    )

    def _check_values(self) -> None:
        _check_channels(self.divguard_alerts)
        require_whole("divguard_incidents", self.divguard_incidents, "folders", at_least=0)
        require_bool("divguard_incident_text", self.divguard_incident_text)
        code = self.divguard_exit_code
        if code is None:
            return
        is_code = isinstance(code, int) and not isinstance(code, bool) and 0 <= code <= _MOST
        if not is_code or code == INTERRUPTED_EXIT_CODE:
            raise ValueError(
                f"`divguard_exit_code` must be none or a whole number from 0 to {_MOST}, but not "
                f"{INTERRUPTED_EXIT_CODE}, which means that a signal ended the run; got {code!r}."
            )


def _check_channels(value: object) -> None:
    names = channels_of(value) if isinstance(value, str) else ()
    unknown = [name for name in names if name not in CHANNELS]
    if not isinstance(value, str) or unknown or (not names and value.strip().lower() != "none"):
        hint = did_you_mean(unknown[0], CHANNELS) if unknown else ""
        raise ValueError(
            f"`divguard_alerts` must be none, or one or more of {', '.join(CHANNELS)} with commas between them, got "
            f"{'an address' if '://' in str(value) else repr(value)}.{hint}"
        )
