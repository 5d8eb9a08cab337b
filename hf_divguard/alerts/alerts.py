"""The alerts of one run: which events become one, and where they go."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_divguard.alerts.alert import Alert, alert_of
from hf_divguard.alerts.outbox import Outbox
from hf_divguard.alerts.rate import RateLimit
from hf_divguard.alerts.services import SERVICES, service
from hf_divguard.alerts.webhook import VARIABLES, webhook_from_environment
from hf_divguard.core.events import ENDS_RUN

__all__ = ["CHANNELS", "Alerts", "Hook", "channels_of", "make_alerts"]

logger = logging.getLogger(__name__)

CHANNELS = (*VARIABLES, *SERVICES)
"""What ``divguard_alerts`` may contain."""

CLOSING_SECONDS = 5.0
"""How long the end of a run waits for alerts that are still to be delivered."""

_QUIET = frozenset({"dismissed", "update_skipped"})

Hook = Callable[[dict[str, Any]], object]


class Alerts:
    """Sends the events of a run that people should see.

    Events that end the run are always sent. Of the others only so many are: the first few, then
    one in ten minutes; the next alert says how many were left out.

    Args:
        outboxes: Where alerts go.
        run: ``name`` and ``output_dir`` of the run.
        limit: How many may be sent.
    """

    def __init__(
        self, outboxes: Sequence[Outbox], run: Mapping[str, Any], limit: RateLimit | None = None
    ) -> None:
        self._outboxes = outboxes
        self._run = run
        self._limit = limit or RateLimit()
        self._left_out = 0

    @property
    def is_on(self) -> bool:
        """Whether alerts go anywhere."""
        return bool(self._outboxes)

    def post(self, event: Mapping[str, Any]) -> None:
        """Send an event, if it is one that people should see; return at once."""
        if not self._outboxes or event["event"] in _QUIET:
            return
        if not self._limit.allows(time.monotonic()) and event["event"] not in ENDS_RUN:
            self._left_out += 1
            return
        alert = alert_of(dict(event), self._run, self._left_out)
        self._left_out = 0
        for outbox in self._outboxes:
            outbox.post(alert)

    def close(self, seconds: float = CLOSING_SECONDS) -> None:
        """Wait until everything is delivered, at most so long."""
        until = time.monotonic() + seconds
        late = [outbox.name for outbox in self._outboxes if not outbox.close(until)]
        if late:
            logger.warning("Alerts to %s were not delivered within %g s.", ", ".join(late), seconds)


def channels_of(value: str) -> tuple[str, ...]:
    """Return the names in a list of channels.

    Example:
        >>> channels_of("slack, wandb"), channels_of("none")
        (('slack', 'wandb'), ())
    """
    words = [word.strip().lower() for word in value.split(",") if word.strip()]
    return () if words == ["none"] else tuple(dict.fromkeys(words))


def make_alerts(names: Sequence[str], hooks: Mapping[str, Hook], run: Mapping[str, Any]) -> Alerts:
    """Return the alerts of a run.

    Args:
        names: Names of channels.
        hooks: Functions that get each event, by a name for the log.
        run: ``name`` and ``output_dir`` of the run.

    Raises:
        ValueError: If the environment variable of a webhook is not set, or a tracker is not installed.
    """
    outboxes = [
        Outbox(name, webhook_from_environment(name) if name in VARIABLES else service(name)) for name in names
    ]
    return Alerts([*outboxes, *(Outbox(name, _calling(hook)) for name, hook in hooks.items())], run)


def _calling(hook: Hook) -> Callable[[Alert], None]:
    def deliver(alert: Alert) -> None:
        hook(dict(alert.event))

    return deliver
