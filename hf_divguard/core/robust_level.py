"""The ordinary level of a noisy, falling series: where it is, how noisy it is, how far it has come."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["RobustLevel", "SortedWindow", "median"]

WINDOW = 100
"""Values the level and the noise are taken from."""
LEVEL_WINDOW = 9
"""Values in the median that is compared with the best so far."""
INITIAL = 5
"""Values whose median is the level the run began at."""
UPPER_QUANTILE = 0.8
"""Part of the ordinary values that lie below ``RobustLevel.upper``."""
_MEDIAN_DIFFERENCE = 0.9539
# Median of |a - b| for two normal values of spread 1: 0.6745 * sqrt(2).
_MEDIAN_ERROR = 1.2533
# Spread of the median of n normal values is this over sqrt(n): sqrt(pi / 2).


def median(values: Iterable[float]) -> float:
    """Return the middle one of ``values`` in order; of an even number the mean of the middle two.

    Example:
        >>> median([3.0, 1.0, 90.0]), median([1.0, 2.0])
        (3.0, 1.5)
    """
    ordered = sorted(values)
    half, odd = divmod(len(ordered), 2)
    # Halved before they are added: the sum of two huge values must not become infinite.
    return ordered[half] if odd else 0.5 * ordered[half - 1] + 0.5 * ordered[half]


class SortedWindow:
    """The last ``size`` values, with any quantile at hand.

    Example:
        >>> window = SortedWindow(3)
        >>> for value in (5.0, 1.0, 9.0, 2.0):
        ...     window.append(value)
        >>> window.values(), window.quantile(0.5)
        ([1.0, 9.0, 2.0], 2.0)
    """

    def __init__(self, size: int, values: Sequence[float] = ()) -> None:
        self.size = size
        self._arrived = deque(values[-size:])
        self._ordered = sorted(self._arrived)

    def __len__(self) -> int:
        return len(self._ordered)

    def append(self, value: float) -> None:
        """Add a value and drop the oldest one if the window is full."""
        self._arrived.append(value)
        insort(self._ordered, value)
        if len(self._arrived) > self.size:
            del self._ordered[bisect_left(self._ordered, self._arrived.popleft())]

    def quantile(self, share: float) -> float:
        """Return the value below which a ``share`` of the window lies."""
        ordered = self._ordered
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def values(self) -> list[float]:
        """Return the values in the order of their arrival."""
        return list(self._arrived)


class RobustLevel:
    """What is ordinary for a series, learnt only from values that were ordinary themselves."""

    def __init__(self) -> None:
        self._window = SortedWindow(WINDOW)
        self._differences = SortedWindow(WINDOW)
        self._recent: deque[float] = deque(maxlen=LEVEL_WINDOW)
        self._initial: list[float] = []
        self._last: float | None = None
        self.best: float | None = None
        self.count = 0

    def see(self, value: float) -> None:
        """Count a finite value, ordinary or not."""
        self.count += 1
        if len(self._initial) < INITIAL:
            self._initial.append(value)

    def accept(self, value: float) -> None:
        """Let an ordinary value into the level, the noise and the best so far."""
        self._window.append(value)
        self._recent.append(value)
        if self._last is not None:
            self._differences.append(min(abs(value - self._last), 1e300))
        self._last = value
        if len(self._recent) >= 3:
            certain = median(self._recent) + _MEDIAN_ERROR * self.noise / math.sqrt(len(self._recent))
            if self.best is None or certain < self.best:
                self.best = certain

    @property
    def noise(self) -> float:
        """Spread of one value about the level, from the differences of neighbours."""
        return self._differences.quantile(0.5) / _MEDIAN_DIFFERENCE if len(self._differences) else 0.0

    @property
    def center(self) -> float:
        """Median of the ordinary values."""
        return self._window.quantile(0.5)

    @property
    def upper(self) -> float:
        """Upper edge of the ordinary values."""
        return self._window.quantile(UPPER_QUANTILE)

    @property
    def progress(self) -> float:
        """How far the level has certainly fallen since the beginning; never negative."""
        if self.best is None:
            return 0.0
        return max(0.0, median(self._initial) - self.best)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as JSON values."""
        return {
            "window": self._window.values(),
            "differences": self._differences.values(),
            "recent": list(self._recent),
            "initial": list(self._initial),
            "last": self._last,
            "best": self.best,
            "count": self.count,
        }

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> RobustLevel:
        """Return the level that ``state_dict`` was taken from."""
        level = cls()
        level._window = SortedWindow(WINDOW, state_dict["window"])
        level._differences = SortedWindow(WINDOW, state_dict["differences"])
        level._recent.extend(state_dict["recent"])
        level._initial = list(state_dict["initial"])[:INITIAL]
        level._last = state_dict["last"]
        level.best = state_dict["best"]
        level.count = state_dict["count"]
        return level
