"""How many alerts a run may send."""

from __future__ import annotations

__all__ = ["RateLimit"]


class RateLimit:
    """Lets a few alerts through at once, and then one at a time.

    Args:
        burst: How many may follow each other without a pause.
        every_seconds: Time after which one more may follow.

    Example:
        >>> limit = RateLimit(burst=2, every_seconds=600)
        >>> [limit.allows(now) for now in (0.0, 1.0, 2.0, 601.0, 602.0)]
        [True, True, False, True, False]
    """

    def __init__(self, burst: int = 5, every_seconds: float = 600.0) -> None:
        self._burst, self._every = burst, every_seconds
        self._left = float(burst)
        self._looked: float | None = None

    def allows(self, now: float) -> bool:
        """Return whether an alert may be sent at ``now``, in seconds of a clock that only goes forward."""
        if self._looked is not None:
            self._left = min(float(self._burst), self._left + (now - self._looked) / self._every)
        self._looked = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
