"""A rise above the baseline: the evidence for it, and whether it recovers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_divguard.core.detection.baseline import median
from hf_divguard.core.state import Stateful, memory

__all__ = ["RiseCusum"]

# docs/detectors.md gives the source of each number.
PATIENCE = 9
LONGEST = 256
DRIFT = 0.1
WIDTH = 9
RECOVERY = 0.9
RECOVERY_LEAST = 0.95
PATIENCES_PULLED = 3.0
PARTIAL = 0.75
BUDGET_UNKNOWN = 4.0
BUDGET_PULLED = 8.0
BUDGET_STUCK = 2.0
PULL = 1.5
CAP = 10.0
ELAPSED_TO_RECOVER = 1.0


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

    def add(self, step: int, value: float, share: float, weight: float = 1.0) -> None:
        """Take the next value, which lies ``share`` of a full distance above the bound."""
        if self.score == 0.0:
            # Values may be several steps apart: the first bad step is one of those after the last value.
            self.onset_step = step if self._before is None else self._before + 1
            if self.values:
                self.values, self.peak, self.highest_score = [], 0.0, 0.0
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
        late = sorted(self.values[-max(1, min(WIDTH, len(self.values) // 2)) :])
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
        early, late = self._halves(base, CAP * max(progress, need) if pull is None else math.inf)
        if pull is not None and pull > PULL and count < patience * (1.0 if late >= PARTIAL * progress else PATIENCES_PULLED):
            return True
        if early <= 0.0 or late > RECOVERY_LEAST * early:
            return False
        # Halvings still to go, at the pace of the last half, must fit into the time left to recover.
        halvings, pace = math.log2(max(1.0, late / need)), math.log2(early / late) if late > 0.0 else math.inf
        budget = BUDGET_UNKNOWN if pull is None else BUDGET_PULLED if pull > PULL else BUDGET_STUCK
        return halvings * 0.5 * count <= pace * (budget * patience + ELAPSED_TO_RECOVER * count)

    def _halves(self, base: float, cap: float) -> tuple[float, float]:
        count = len(self.values)
        width = max(1, min(WIDTH, count // 2), count // 4)
        return self._means(base, cap, width, count // 2)

    def _means(self, base: float, cap: float, width: int, until: int) -> tuple[float, float]:
        early = self.values[max(0, until - width) : until] or self.values[:1]
        late = self.values[-width:]
        return (
            sum(min(value - base, cap) for value in early) / len(early),
            sum(min(value - base, cap) for value in late) / len(late),
        )
