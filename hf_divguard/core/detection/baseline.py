"""What is ordinary for a noisy, falling series: its level, noise and movement, and how far it has come."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["RobustBaseline", "SortedWindow", "median"]

# Lengths are counted in values. Where each number comes from is told in docs/detectors.md.
LONGEST_WINDOW = 100
SHORTEST_WINDOW = 7
WINDOW_SHARE = 3
NOISE_WINDOW = 30
LEVEL_WINDOW = 9
LEVEL_SHARE = 6
INITIAL = 5
EARLY = 20
UPPER = 0.9
LOWER = 0.1

# For values with normal noise of spread 1:
_MEDIAN_DIFFERENCE = 0.9539  # median of |a - b|: 0.6745 * sqrt(2)
_MEDIAN_ERROR = 1.2533  # spread of a median of n is this over sqrt(n): sqrt(pi / 2)
_UPPER_DIFFERENCE = 1.645 * math.sqrt(2.0)  # 0.9 quantile of |a - b|

_HUGE = 1e300


def median(values: Iterable[float]) -> float:
    """Return the middle one of ``values`` in order; of an even number the mean of the middle two.

    Example:
        >>> median([3.0, 1.0, 90.0]), median([1.0, 2.0])
        (3.0, 1.5)
    """
    ordered = sorted(values)
    half, odd = divmod(len(ordered), 2)
    return ordered[half] if odd else 0.5 * ordered[half - 1] + 0.5 * ordered[half]


class SortedWindow:
    """The last few values, with any quantile at hand.

    Example:
        >>> window = SortedWindow()
        >>> for value in (5.0, 1.0, 9.0, 2.0):
        ...     window.append(value, size=3)
        >>> window.values(), window.quantile(0.5)
        ([1.0, 9.0, 2.0], 2.0)
    """

    __slots__ = ("_arrived", "_ordered")

    def __init__(self, values: Sequence[float] = ()) -> None:
        self._arrived = deque(values)
        self._ordered = sorted(values)

    def __len__(self) -> int:
        return len(self._ordered)

    def append(self, value: float, size: int) -> None:
        """Add a value, then drop the oldest until ``size`` are left."""
        arrived, ordered = self._arrived, self._ordered
        arrived.append(value)
        insort(ordered, value)
        while len(ordered) > size:
            del ordered[bisect_left(ordered, arrived.popleft())]

    def quantile(self, share: float) -> float:
        """Return the value below which a ``share`` (under 1) of the window lies; 0 if it is empty."""
        ordered = self._ordered
        return ordered[int(share * len(ordered))] if ordered else 0.0

    def quantiles(self, first: float, second: float, third: float) -> tuple[float, float, float]:
        """Return three quantiles at once."""
        ordered = self._ordered
        n = len(ordered)
        if not n:
            return 0.0, 0.0, 0.0
        return ordered[int(first * n)], ordered[int(second * n)], ordered[int(third * n)]

    def values(self) -> list[float]:
        """Return the values in the order of their arrival."""
        return list(self._arrived)


class RobustBaseline:
    """What is ordinary for a series, learnt only from values that were ordinary themselves.

    Everything is a rank statistic, so that a few outliers do not move it, and everything
    scales and shifts with the series. The window holds the last third of the accepted
    values, at least 7 and at most 100, so that it neither remembers the steep start for
    long nor forgets what a long run is like.

    ``center``, ``upper`` and ``lower`` are the middle and the edges of the window (a tenth of
    the values lies beyond each edge), ``spread`` is the distance of the edges: noise, movement
    and tails together. ``progress`` is how far the level has certainly fallen since the first
    values, ``initial``; it is never negative.

    Example:
        >>> level = RobustBaseline()
        >>> for value in (4.0, 3.1, 2.9, 3.0, 3.1, 2.9, 3.0, 3.1):
        ...     level.see(value)
        ...     level.accept(value)
        >>> level.center, level.upper
        (3.0, 3.1)
    """

    def __init__(self) -> None:
        self.count = 0
        self.noise = 0.0
        self.early_noise = 0.0
        self.movement = 0.0
        self.best: float | None = None
        self.spread_at_best = 0.0
        self.movement_at_best = 0.0
        self.level: float | None = None
        self.center = self.upper = self.lower = self.spread = self.progress = self.initial = 0.0
        self.lowest: list[tuple[float, int]] = []
        self._initial: list[float] = []
        self._last: float | None = None
        self._window = SortedWindow()
        self._differences = SortedWindow()
        self._moves = SortedWindow()
        self._recent: deque[float] = deque()
        self._levels: deque[float] = deque()

    def see(self, value: float) -> None:
        """Count a finite value, ordinary or not."""
        self.count += 1
        if len(self._initial) < INITIAL:
            self._initial.append(value)
            self.initial = median(self._initial)
        if len(self.lowest) < 2:
            self.lowest = sorted([*self.lowest, (value, self.count)])
        elif value < self.lowest[1][0]:
            self.lowest = sorted([self.lowest[0], (value, self.count)])

    @property
    def size(self) -> int:
        """Number of ordinary values that are remembered."""
        return max(SHORTEST_WINDOW, min(LONGEST_WINDOW, self.count // WINDOW_SHARE))

    def accept(self, value: float) -> None:
        """Let a value into what is ordinary."""
        size = self.size
        self._window.append(value, size)
        if self._last is not None:
            self._differences.append(min(abs(value - self._last), _HUGE), max(NOISE_WINDOW, size))
            self.noise = self._differences.quantile(0.5) / _MEDIAN_DIFFERENCE
            if self.count <= EARLY:
                self.early_noise = self.noise
        self._last = value
        width = max(3, min(LEVEL_WINDOW, self.count // LEVEL_SHARE))
        recent = self._recent
        recent.append(value)
        while len(recent) > width:
            recent.popleft()
        if len(recent) >= 3:
            self.level = median(recent)
            self._learn_movement(self.level, len(recent), size)
            certain = self.level + _MEDIAN_ERROR * self.noise / math.sqrt(len(recent))
            if self.best is None or certain < self.best:
                self.best = certain
                self._measure()
                self.spread_at_best, self.movement_at_best = self.spread, self.movement
                return
        self._measure()

    def _learn_movement(self, level: float, width: int, size: int) -> None:
        """Learn how far the level moves, beyond noise, while the values it is taken from are replaced."""
        levels = self._levels
        levels.append(level)
        while len(levels) > width + 1:
            levels.popleft()
        if len(levels) <= width:
            return
        self._moves.append(min(abs(level - levels[0]), _HUGE), size)
        move = self._moves.quantile(UPPER)
        by_noise = _UPPER_DIFFERENCE * _MEDIAN_ERROR * self.noise / math.sqrt(width)
        self.movement = move * math.sqrt(max(0.0, 1.0 - (by_noise / move) ** 2)) if move > by_noise else 0.0

    def _measure(self) -> None:
        """Work out what follows from the window, once for all who ask."""
        window = self._window
        self.center, self.upper, self.lower = (
            window.quantile(0.5),
            window.quantile(UPPER),
            window.quantile(LOWER),
        )
        self.spread = self.upper - self.lower
        if self.best is not None:
            doubt = _MEDIAN_ERROR / math.sqrt(3.0) * self.early_noise
            self.progress = max(0.0, self.initial - doubt - self.best)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as JSON values."""
        state = {name: getattr(self, name) for name in _NUMBERS}
        state["lowest"] = [list(pair) for pair in self.lowest]
        state["initial"], state["last"] = list(self._initial), self._last
        for name in _SEQUENCES:
            held = getattr(self, f"_{name}")
            state[name] = held.values() if isinstance(held, SortedWindow) else list(held)
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RobustBaseline:
        """Return the level that ``state`` was taken from.

        Raises:
            KeyError: If a part is missing.
            TypeError: If a part is not made of numbers.
        """
        level = cls()
        for name in _NUMBERS:
            setattr(level, name, None if state[name] is None else _finite(state[name]))
        level.lowest = [(_finite(value), int(index)) for value, index in state["lowest"]]
        level._initial = [_finite(value) for value in state["initial"]]
        level.initial = median(level._initial) if level._initial else 0.0
        level._last = None if state["last"] is None else _finite(state["last"])
        for name in _SEQUENCES:
            values = [_finite(value) for value in state[name]]
            is_window = isinstance(getattr(level, f"_{name}"), SortedWindow)
            setattr(level, f"_{name}", SortedWindow(values) if is_window else deque(values))
        level._measure()
        return level


_NUMBERS = (
    "count",
    "noise",
    "early_noise",
    "movement",
    "best",
    "spread_at_best",
    "movement_at_best",
    "level",
)
_SEQUENCES = ("window", "differences", "moves", "recent", "levels")


def _finite(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a finite number")
    return value
