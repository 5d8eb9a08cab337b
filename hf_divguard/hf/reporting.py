"""Brings the events of a run to those who read them: its logs and trackers, the folders of incidents, alerts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from hf_divguard.alerts.alerts import Alerts, Hook, channels_of, make_alerts
from hf_divguard.core.events import tracker_values
from hf_divguard.hf import control as switches
from hf_divguard.hf.host import Host
from hf_divguard.hf.incidents import Incidents
from hf_divguard.hf.journal import RunJournal
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.recent_steps import RecentSteps

__all__ = ["Reporting", "hooks_of"]

# A rollback has a log entry of its own. A finding that was dismissed is no matter for the curves, and neither is
# a signal for the checkpoint that it causes: the resumed run has the log of one that was not interrupted.
_NOT_LOGGED = frozenset({"rollback", "dismissed", "signalled"})


class Reporting:
    """Reports the events of one run.

    Args:
        host: The host.
        options: The options.
        ranks: The processes of the run.
        journal: The events of the run.
        hooks: Functions that get each event, by a name for the log.
        rows: Returns the rows that stood out so far.
        run_dir: The run folder.

    Raises:
        ValueError: If an alert has nowhere to go; on every rank alike.
    """

    def __init__(
        self,
        host: Host,
        options: Any,
        ranks: Ranks,
        journal: RunJournal,
        *,
        hooks: dict[str, Hook],
        rows: Callable[[], list[dict[str, int]]],
        run_dir: str,
    ) -> None:
        self._host = host
        self._ranks = ranks
        self._journal = journal
        keeps_rows = 2 * options.divguard_check_steps if options.divguard_incident_text else 0
        self.recent = RecentSteps(keeps_rows if ranks.rank == 0 else 0)
        self._incidents = Incidents(host, run_dir, self.recent, rows, options.divguard_incidents)
        self._pending: list[dict[str, Any]] = []
        self._waits_together = options.divguard_alerts != "none"
        self._alerts = Alerts([], {})
        self._has_noted_signal = False

        def make() -> None:
            run = {"name": host.args.run_name, "output_dir": host.args.output_dir}
            self._alerts = make_alerts(channels_of(options.divguard_alerts), hooks, run)

        if self._waits_together:
            ranks.run_on_main(make)
        elif ranks.rank == 0:
            make()

    def note_signal(self, name: str | None) -> None:
        """Note once that a signal ends the run. Called by all ranks alike."""
        if name is None or self._has_noted_signal:
            return
        self._has_noted_signal = True
        self._journal.add(
            {"event": "signalled", "signal": name, "step": self._host.state.global_step, "reason": name}
        )

    def log(self) -> None:
        """Put the events since the last call into the logs of this step, and so before the trackers."""
        new = self._journal.take_new()
        self._pending += new
        self._log([event for event in new if event["event"] not in _NOT_LOGGED])

    def _log(self, events: list[dict[str, Any]]) -> None:
        values: dict[str, float] = {}
        for event in events:
            values |= tracker_values(event, self._journal.counts[event["event"]])
        if not values:
            return
        log_is_due = self._host.control.should_log
        self._host.log_event(values)
        if log_is_due:
            switches.request_log(self._host.control)

    def publish(self) -> None:
        """At the end of a step: write the events and the folders of incidents, and send alerts."""
        pending, self._pending = self._pending, []
        self._journal.write()
        if self._ranks.rank != 0:
            return
        for event in pending:
            self._incidents.write(event)
            self._alerts.post(event)

    def conclude(self) -> None:
        """At the end of training: publish what is left, and wait a moment until alerts are delivered."""
        self.log()
        signalled = [event for event in self._journal.events if event["event"] == "signalled"]
        self._log(signalled[-1:] if self._has_noted_signal else [])
        self.publish()
        if self._waits_together:
            # A launcher ends all ranks as soon as one of them has ended with an error.
            self._ranks.run_on_main(self._alerts.close)
        self.close()

    def close(self) -> None:
        """On every way out: let alerts be delivered."""
        self._alerts.close()


def hooks_of(callbacks: Iterable[Any], function: Hook | None) -> dict[str, Hook]:
    """Return what is to get each event: a function, and the method ``on_divergence`` of callbacks.

    Args:
        callbacks: The callbacks of the trainer.
        function: The function that was passed to the trainer.
    """
    hooks: dict[str, Hook] = {} if function is None else {"on_divergence": function}
    for callback in callbacks:
        method = getattr(callback, "on_divergence", None)
        if callable(method):
            name = f"{type(callback).__name__}.on_divergence"
            hooks[name if name not in hooks else f"{name} ({len(hooks)})"] = method
    return hooks
