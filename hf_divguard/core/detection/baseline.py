"""The baseline of a noisy, falling series: its level, noise and movement, and its progress."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from hf_divguard.core.detection.sorted_window import SortedWindow, median
from hf_divguard.core.state import Stateful, memory

__all__ = [
    "CERTAIN_NOISES",
    "EDGE",
    "HUGE",
    "LONGEST_WINDOW",
    "PATIENCE",
    "RobustBaseline",
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


def _places(n: int) -> tuple[int, int, int]:
    """Return where the middle and the upper and the lower edge of ``n`` values in order are."""
    return int(0.5 * n), int((1.0 - EDGE) * n), int(EDGE * n)


_MIDDLE, _HIGH, _LOW = _places(LONGEST_WINDOW)


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
    values, ``initial``; it is never negative. ``lowest_count`` is how many values there were when the
    later of the two lowest came, at least 2. ``is_full`` says that the window has its full
    length, which it then keeps, as does all that is taken from it.

    Example:
        >>> level = RobustBaseline()
        >>> for value in (4.0, 3.1, 2.9, 3.0, 3.1, 2.9, 3.0, 3.1):
        ...     _ = level.see(value)
        ...     level.accept(value)
        >>> level.center, level.upper
        (3.0, 3.1)
    """

    count: int = memory(0)
    _noise: float = memory(0.0)
    _movement: float = memory(0.0)
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
        self._start()

    def _start(self) -> None:
        self._knows_noise = self._knows_movement = True
        self._learn_start()
        self._learn_lowest()
        self._measure()

    def _learn_lowest(self) -> None:
        self.lowest_count = max([2, *(count for _, count in self.lowest)])

    def _learn_start(self) -> None:
        # The mean of the lowest so far: the first value counts most, an early outlier does not.
        self.initial = sum(accumulate(self._first, min)) / max(1, len(self._first))

    def see(self, value: float) -> bool:
        """Count a finite value, whether it is in the normal range or not; return whether it is one of the lowest two."""
        self.count += 1
        if len(self._first) < FIRST_VALUES:
            self._first.append(value)
            self._learn_start()
        lowest = self.lowest
        if len(lowest) == 2 and value >= lowest[1][0]:
            return False
        self.lowest = sorted([*lowest[:1], (value, self.count)])
        self._learn_lowest()
        return True

    @property
    def size(self) -> int:
        """Number of accepted values that are remembered."""
        return max(SHORTEST_WINDOW, min(LONGEST_WINDOW, self.count // WINDOW_SHARE))

    def accept(self, value: float) -> None:
        """Let a value into the baseline."""
        if self.is_full:
            self._accept_when_full(value)
            return
        size, width = self.size, self._level_width()
        self._window.push(value, size)
        self._follow_trend(value)
        last, recent = self._last, self._recent
        if len(last) == 2:
            # The distance of a value from the mean of its neighbours: a steady trend adds nothing to it.
            bend = abs(last[1] - 0.5 * last[0] - 0.5 * value)
            self._differences.push_unsorted(bend if bend < HUGE else HUGE, max(NOISE_WINDOW, size))
        last.append(value)
        recent.append(value)
        while len(recent) > width:
            recent.popleft()
        if len(recent) >= 3:
            self.level = median(recent)
            self._learn_move(self.level, len(recent), size)
        self._learn_noise()  # the widths may change with the next value
        self._learn_movement()
        if self.level is None or not self._is_best(self.level, len(recent)):
            self._measure()

    def _accept_when_full(self, value: float) -> None:
        """Do the same, shorter: all lengths are known, and no trend is left out."""
        window = self._window
        window.push(value, LONGEST_WINDOW)
        last, recent = self._last, self._recent
        if len(last) == 2:
            bend = abs(last[1] - 0.5 * last[0] - 0.5 * value)
            self._differences.push_unsorted(bend if bend < HUGE else HUGE, LONGEST_WINDOW)
        last.append(value)
        recent.append(value)
        while len(recent) > PATIENCE:
            recent.popleft()
        self._knows_noise = self._knows_movement = False
        self.level = level = sorted(recent)[len(recent) // 2]
        levels = self._levels
        levels.append(level)
        while len(levels) > PATIENCE + 1:
            levels.popleft()
        if len(levels) > PATIENCE:
            move = abs(level - levels[0])
            self._moves.push_unsorted(move if move < HUGE else HUGE, LONGEST_WINDOW)
        if (self.best is None or level < self.best) and self._is_best(level, PATIENCE):
            return
        self._measure_at(window.ordered, _MIDDLE, _HIGH, _LOW)

    def _is_best(self, level: float, width: int) -> bool:
        """Return whether ``level`` is certainly lower than ever; then all is measured with it."""
        if self.best is not None and level >= self.best:
            return False
        # What is certain lies above the level, by the noise.
        certain = level + _MEDIAN_ERROR * self.noise / math.sqrt(width)
        if self.best is not None and certain >= self.best:
            return False
        self.best = certain
        self._measure()
        self.spread_at_best, self.movement_at_best = self.spread, self.movement
        self.noise_at_best = self.noise
        return True

    def _level_width(self) -> int:
        return max(3, min(PATIENCE, self.count // LEVEL_SHARE))

    def _follow_trend(self, value: float) -> None:
        """Remember the levels in a window that is not full; nobody asks for them later."""
        self._trail.append(value if self.level is None else self.level)
        while len(self._trail) > len(self._window):
            self._trail.popleft()
        if self.is_full:
            self._trail.clear()

    def _learn_move(self, level: float, width: int, size: int) -> None:
        """Note how far the level has moved while the values it is taken from were replaced."""
        levels = self._levels
        levels.append(level)
        while len(levels) > width + 1:
            levels.popleft()
        if len(levels) > width:
            move = abs(level - levels[0])
            self._moves.push_unsorted(move if move < HUGE else HUGE, size)

    def _learn_noise(self) -> None:
        """Derive the noise from the values since it was last done."""
        self._knows_noise = True
        if self._differences:
            self._noise = self._differences.quantile(0.5) / _MEDIAN_DIFFERENCE

    def _learn_movement(self) -> None:
        """Derive how far the level moves beyond the noise from the values since it was last done."""
        self._knows_movement = True
        width = len(self._recent)
        if width < 3 or len(self._levels) <= width:
            return
        move = self._moves.quantile(1.0 - EDGE)
        by_noise = _EDGE_DIFFERENCE * _MEDIAN_ERROR * self.noise / math.sqrt(width)
        self._movement = move * math.sqrt(max(0.0, 1.0 - (by_noise / move) ** 2)) if move > by_noise else 0.0

    @property
    def noise(self) -> float:
        """Spread of the noise of one value."""
        if not self._knows_noise:
            self._learn_noise()
        return self._noise

    @property
    def movement(self) -> float:
        """How far the level moves, beyond noise, while the values it is taken from are replaced."""
        if not self._knows_movement:
            self._learn_movement()
        return self._movement

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as strict JSON values, without settings."""
        if not self._knows_movement:
            self._learn_movement()
        if not self._knows_noise:
            self._learn_noise()
        return super().state_dict()

    def _measure(self) -> None:
        """Derive from the window what is asked for at every value."""
        ordered = self._window.ordered or [0.0]
        self.is_full = len(ordered) == LONGEST_WINDOW
        self._measure_at(ordered, *_places(len(ordered)))

    def _measure_at(self, ordered: list[float], middle: int, high: int, low: int) -> None:
        self.center, self.upper, self.lower = ordered[middle], ordered[high], ordered[low]
        self.spread = self.upper - self.lower
        highest = ordered[-1]
        self.reach = (self.initial if self.initial > highest else highest) - ordered[0]
        if not self.is_full:
            self._leave_out_trend()
        self.progress = 0.0 if self.best is None or self.best >= self.initial else self.initial - self.best

    def _leave_out_trend(self) -> None:
        """Correct a window that is not full: a falling trend is no noise, and its early values are no upper edge."""
        if self.level is None:
            return
        fall = self._fall(self.level)
        self.spread = max(self.spread - fall, min(self.spread, 2.0 * _NORMAL_EDGE * self.noise))
        self.upper = min(self.upper, max(self.upper - fall, self.level + 0.5 * self.spread))
        self.center = min(self.center, max(self.center - fall, self.level))

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
        self._start()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory that ``state_dict`` returned."""
        super().load_state_dict(state_dict)
        self._start()
