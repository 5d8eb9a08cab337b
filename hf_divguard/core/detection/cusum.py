"""A rise above the baseline: the evidence for it, and whether it recovers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_divguard.core.detection.baseline import PATIENCE
from hf_divguard.core.detection.sorted_window import median
from hf_divguard.core.detection.surge import FALL, SURGE
from hf_divguard.core.state import Stateful, memory

__all__ = ["RiseCusum"]

# docs/detectors.md gives the source of each number.
LONGEST = 256
DRIFT = 0.1
PULL = 1.5
PARTIAL = 0.75
PATIENCES_PULLED = 3.0
TIME_PULLED = 8.0
TIME_UNKNOWN = 4.0
TIME_STUCK = 1.0


@dataclass
class RiseCusum(Stateful):
    """Add up how far each value lies above a bound, as a cumulative sum that never falls below zero.

    One value counts between -1 and 1, so that a single outlier is worth no more than any
    value beyond the full distance. The sum began where the rise began: the estimate of
    its onset is the step after the last value before.

    Example:
        >>> rise = RiseCusum()
        >>> for step, share in enumerate([-1.0, 0.2, -0.5, 1.0, 40.0, 1.0]):
        ...     rise.add(step, share, share)
        >>> rise.onset_step, round(rise.score, 1)
        (3, 2.7)
    """

    score: float = memory(0.0)
    highest_score: float = memory(0.0)
    onset_step: int | None = memory(None)
    peak: float = memory(0.0)
    values: list[float] = memory(list)
    _before: int | None = memory(None)

    def rest(self, step: int) -> None:
        """Take a value that lies below the bound while there is no evidence."""
        # Values may be several steps apart: the first bad step is one of those after the last value.
        self.onset_step = step if self._before is None else self._before + 1
        if self.values:
            self.values, self.peak, self.highest_score = [], 0.0, 0.0
        self._before = step

    def add(self, step: int, value: float, share: float, weight: float = 1.0) -> None:
        """Take the next value, which lies ``share`` of a full distance above the bound."""
        if self.score == 0.0:
            self.rest(step)
        self._before = step
        share = 1.0 if share > 1.0 else -1.0 if share < -1.0 else share
        self.score = max(0.0, self.score + weight * (share - DRIFT))
        if self.score > 0.0:
            self.highest_score = max(self.highest_score, self.score)
            self.values.append(value)
            if len(self.values) > LONGEST:
                del self.values[0]

    def clear(self) -> None:
        """Forget the rise."""
        self.score, self.highest_score, self.peak, self.values = 0.0, 0.0, 0.0, []

    def late_level(self, share: float = 0.5) -> float:
        """Return the median (or another quantile) of the last values: at most half of the rise, at most 9."""
        late = sorted(self.values[-max(1, min(PATIENCE, len(self.values) // 2)) :])
        return median(late) if share == 0.5 else late[int(share * len(late))]

    def is_recovering(
        self, base: float, need: float, progress: float, pull: float | None, weight: float
    ) -> bool:
        """Return whether the rise is on its way back.

        Args:
            base: Level the rise is measured from.
            need: Height above ``base`` at which a rise matters.
            progress: All that had been learnt, in the units of the loss.
            pull: Gradient norm of the last values over its baseline, ``None`` if unknown.
            weight: For how many values of a full patience one value stands.
        """
        count, patience = len(self.values), PATIENCE / weight
        is_pulled, is_stuck = pull is not None and pull > PULL, pull is not None and pull <= PULL
        # A high loss that no large gradient pulls back has to fall within the last third.
        part = max(1, count // 3) if is_stuck else (count + 1) // 2
        # Without gradients a fall from an absurd height is no sign of recovery yet, hence the cap.
        early, late = self._heights(base, part, SURGE * max(progress, need) if pull is None else math.inf)
        if is_pulled and count < patience * (1.0 if late >= PARTIAL * progress else PATIENCES_PULLED):
            return True
        if early <= 0.0 or late > FALL * early:
            return False
        # Halvings still to go, at the pace of the last part, must fit into the time left to recover.
        halvings, pace = math.log2(max(1.0, late / need)), math.log2(early / late) if late > 0.0 else math.inf
        time = TIME_PULLED if is_pulled else TIME_STUCK if is_stuck else TIME_UNKNOWN
        return halvings * part <= pace * (time * patience + count)

    def _heights(self, base: float, part: int, cap: float) -> tuple[float, float]:
        """Return the mean heights above ``base``, at most ``cap``, before the last ``part`` values and at their end."""
        values, until = self.values, len(self.values) - part
        width = max(1, min(PATIENCE, part), len(values) // 4)
        early = values[max(0, until - width) : until] or values[:1]
        means = [sum(min(v - base, cap) for v in part) / len(part) for part in (early, values[-width:])]
        return means[0], means[1]
