"""A queue of alerts and the thread that delivers them."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable

from hf_divguard.alerts.alert import Alert

__all__ = ["NotDeliveredError", "Outbox"]

logger = logging.getLogger(__name__)

_MOST_WAITING = 32


class NotDeliveredError(Exception):
    """An alert could not be delivered. The text says why, and holds no secret."""


class Outbox:
    """Delivers alerts to one place, in a thread of its own, in order.

    The thread starts with the first alert and is a daemon: a process never waits for it. What
    does not fit into the queue is dropped.

    Args:
        name: Name of the place, for the log.
        deliver: Delivers one alert; it may take its time and may raise any ``Exception``.
    """

    def __init__(self, name: str, deliver: Callable[[Alert], None]) -> None:
        self.name = name
        self._deliver = deliver
        self._waiting: queue.Queue[tuple[contextvars.Context, Alert] | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._has_warned = False
        self.failed = 0
        """Alerts that could not be delivered, or were dropped."""

    def post(self, alert: Alert) -> None:
        """Have ``alert`` delivered; return at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"divguard-{self.name}", daemon=True)
            self._thread.start()
        try:
            # Trackio keeps the run that is under way in a variable of the context.
            self._waiting.put_nowait((contextvars.copy_context(), alert))
        except queue.Full:
            self._note_failure("too many alerts are waiting")

    def close(self, until: float) -> bool:
        """Deliver what is waiting, and end the thread.

        Args:
            until: Time of ``time.monotonic`` up to which this may take.

        Returns:
            Whether everything was handled in time.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        try:
            self._waiting.put(None, timeout=max(0.0, until - time.monotonic()))
        except queue.Full:
            return False
        thread.join(max(0.0, until - time.monotonic()))
        return not thread.is_alive()

    def _work(self) -> None:
        while (entry := self._waiting.get()) is not None:
            context, alert = entry
            try:
                context.run(self._deliver, alert)
            except NotDeliveredError as error:
                self._note_failure(str(error))
            except Exception as error:
                # The text of an error of other code may hold an address or a token.
                self._note_failure(type(error).__name__)

    def _note_failure(self, why: str) -> None:
        self.failed += 1
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "An alert could not be delivered to %s (%s). Training goes on; further failures are not logged.",
                self.name,
                why,
            )
