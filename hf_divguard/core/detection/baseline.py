"""The baseline of a noisy, falling series: its level, noise and movement, and its progress."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from hf_divguard.core.state import Stateful, memory

__all__ = [
    "CERTAIN_NOISES",
    "EDGE",
    "HUGE",
    "LONGEST_WINDOW",
    "PATIENCE",
    "RobustBaseline",
    "SortedWindow",
    "median",
]

# Lengths are counted in values. docs/detectors.md gives the source of each number.
LONGEST_WINDOW = 100
SHORTEST_WINDOW = 7
WINDOW_SHARE = 3
NOISE_WINDOW = 30
PATIENCE = 9
LEVEL_SHARE = 6
FIRST_VALUES = 3
EDGE = 0.1
CERTAIN_NOISES = 4.0

# For values with normal noise of spread 1:
_MEDIAN_DIFFERENCE = 0.8261  # median of |b - (a + c) / 2|: 0.6745 * sqrt(1.5)
_MEDIAN_ERROR = 1.2533  # spread of a median of n is this over sqrt(n): sqrt(pi / 2)
_NORMAL_EDGE = 1.2816  # 0.9 quantile
_EDGE_DIFFERENCE = 1.645 * math.sqrt(2.0)  # 0.9 quantile of |a - b|

HUGE: Final = 1e300
"""Larger numbers are cut to this, so that differences stay finite."""


def median(values: Iterable[float]) -> float:
    """Return the middle one of ``values`` in order; of an even number the mean of the middle two.

    Example:
        >>> median([3.0, 1.0, 90.0]), median([1.0, 2.0])
        (3.0, 1.5)
    """
    ordered = sorted(values)
    half, odd = divmod(len(ordered), 2)
    return ordered[half] if odd else 0.5 * ordered[half - 1] + 0.5 * ordered[half]


class SortedWindow(deque[float]):
    """The last few values in the order of their arrival, with any quantile at hand.

    Example:
        >>> window = SortedWindow()
        >>> for value in (5.0, 1.0, 9.0, 2.0):
        ...     window.push(value, size=3)
        >>> list(window), window.quantile(0.5)
        ([1.0, 9.0, 2.0], 2.0)
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        super().__init__(values)
        self._sorted = sorted(self)

    def push(self, value: float, size: int) -> None:
        """Add a value, then drop the oldest until ``size`` are left."""
        ordered = self._sorted
        self.append(value)
        insort(ordered, value)
        while len(ordered) > size:
            del ordered[bisect_left(ordered, self.popleft())]

    @property
    def largest(self) -> float:
        """The largest value; 0 if there is none."""
        return self._sorted[-1] if self._sorted else 0.0

    def quantile(self, share: float) -> float:
        """Return the value below which a ``share`` (under 1) of the window lies; 0 if it is empty."""
        ordered = self._sorted
        return ordered[int(share * len(ordered))] if ordered else 0.0


@dataclass
class RobustBaseline(Stateful):
    """The normal range of a series, learnt only from values that were in it themselves.

    Everything is a rank statistic, so that a few outliers do not move it, and everything
    scales and shifts with the series. The window holds the last third of the accepted
    values, at least 7 and at most 100, so that it neither remembers the steep start for
    long nor forgets what a long run is like.

    ``center``, ``upper`` and ``lower`` are the middle and the edges of the window (a tenth of
    the values lies beyond each edge), ``spread`` is the distance of the edges: noise, movement
    and tails together. Until the window is full, what a falling trend adds to them is left
    out. ``reach`` is the distance from the highest value in the window, or the first ones,
    to the lowest. ``progress`` is how far the level has certainly fallen since the first
    values, ``initial``; it is never negative.

    Example:
        >>> level = RobustBaseline()
        >>> for value in (4.0, 3.1, 2.9, 3.0, 3.1, 2.9, 3.0, 3.1):
        ...     level.see(value)
        ...     level.accept(value)
        >>> level.center, level.upper
        (3.0, 3.1)
    """

    count: int = memory(0)
    noise: float = memory(0.0)
    movement: float = memory(0.0)
    best: float | None = memory(None)
    spread_at_best: float = memory(0.0)
    movement_at_best: float = memory(0.0)
    noise_at_best: float = memory(0.0)
    level: float | None = memory(None)
    lowest: list[tuple[float, int]] = memory(list)
    _first: list[float] = memory(list)
    _last: deque[float] = memory(lambda: deque(maxlen=2))
    _window: SortedWindow = memory(SortedWindow)
    _trail: deque[float] = memory(deque)
    _differences: SortedWindow = memory(SortedWindow)
    _moves: SortedWindow = memory(SortedWindow)
    _recent: deque[float] = memory(deque)
    _levels: deque[float] = memory(deque)

    def __post_init__(self) -> None:
        self._measure()

    def see(self, value: float) -> None:
        """Count a finite value, whether it is in the normal range or not."""
        self.count += 1
        if len(self._first) < FIRST_VALUES:
            self._first.append(value)
        if len(self.lowest) < 2:
            self.lowest = sorted([*self.lowest, (value, self.count)])
        elif value < self.lowest[1][0]:
            self.lowest = sorted([self.lowest[0], (value, self.count)])

    @property
    def size(self) -> int:
        """Number of accepted values that are remembered."""
        return max(SHORTEST_WINDOW, min(LONGEST_WINDOW, self.count // WINDOW_SHARE))

    def accept(self, value: float) -> None:
        """Let a value into the baseline."""
        size = self.size
        self._window.push(value, size)
        self._trail.append(value if self.level is None else self.level)
        while len(self._trail) > len(self._window):
            self._trail.popleft()
        if len(self._last) == 2:
            # The distance of a value from the mean of its neighbours: a steady trend adds nothing to it.
            bend = abs(self._last[1] - 0.5 * self._last[0] - 0.5 * value)
            self._differences.push(min(bend, HUGE), max(NOISE_WINDOW, size))
            self.noise = self._differences.quantile(0.5) / _MEDIAN_DIFFERENCE
        self._last.append(value)
        width = max(3, min(PATIENCE, self.count // LEVEL_SHARE))
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
                self.noise_at_best = self.noise
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
        self._moves.push(min(abs(level - levels[0]), HUGE), size)
        move = self._moves.quantile(1.0 - EDGE)
        by_noise = _EDGE_DIFFERENCE * _MEDIAN_ERROR * self.noise / math.sqrt(width)
        self.movement = move * math.sqrt(max(0.0, 1.0 - (by_noise / move) ** 2)) if move > by_noise else 0.0

    def _measure(self) -> None:
        """Derive from the window what is asked for at every value."""
        window = self._window
        self.center, self.upper, self.lower = map(window.quantile, (0.5, 1.0 - EDGE, EDGE))
        self.spread = self.upper - self.lower
        # The mean of the lowest so far: the first value counts most, an early outlier does not.
        self.initial = sum(accumulate(self._first, min)) / max(1, len(self._first))
        self.reach = max(self.initial, window.largest) - window.quantile(0.0)
        if self.level is not None and len(window) < LONGEST_WINDOW:
            # A falling trend is no noise, and its early values are no upper edge.
            fall = self._fall(self.level)
            self.spread = max(self.spread - fall, min(self.spread, 2.0 * _NORMAL_EDGE * self.noise))
            self.upper = min(self.upper, max(self.upper - fall, self.level + 0.5 * self.spread))
            self.center = min(self.center, max(self.center - fall, self.level))
        self.progress = 0.0 if self.best is None else max(0.0, self.initial - self.best)

    def _fall(self, level: float) -> float:
        """Return how far the level has steadily fallen within the window: 0 unless each third lies below the last."""
        trail = list(self._trail)
        third = len(trail) // 3
        steady = min(trail[:third], default=0.0) - max(trail[-third:], default=0.0)
        return max(0.0, min(3.0 * steady, trail[0] - level - self.noise)) if third else 0.0

    @property
    def best_or_center(self) -> float:
        """The best level, or the center while there is none."""
        return self.center if self.best is None else self.best

    @property
    def is_policy_like(self) -> bool:
        """Whether the loss never fell by more than its noise and is best at zero, give or take that noise.

        Such is the loss of a policy gradient or of a game: its level does not say how good the model is.
        """
        noise = CERTAIN_NOISES * self.noise_at_best
        return self.best is None or (self.progress <= noise and abs(self.best) <= noise)

    def reset(self) -> None:
        """Forget everything that was observed."""
        super().reset()
        self._measure()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory that ``state_dict`` returned."""
        super().load_state_dict(state_dict)
        self._measure()
