"""A rise above the ordinary that is being watched: how much speaks for it, and whether it heals."""

from __future__ import annotations

import math
from typing import Any

from hf_divguard.core.detection.baseline import median

__all__ = ["RiseCusum"]

# Where each number comes from is told in docs/detectors.md.
PATIENCE = 9
LONGEST = 256
DRIFT = 0.1
WIDTH = 9
HEALING = 0.9
HEALING_WITH_GRADIENT = 0.93
HEALING_WITHOUT_GRADIENT = 0.85
PULL = 1.5
CAP = 4.0
PARTIAL = 0.75
PATIENCES_WITH_GRADIENT = 3.0
PATIENCES_TO_HEAL = 8.0
ELAPSED_TO_HEAL = 2.0


class RiseCusum:
    """Add up how far each value lies above a bound, as a cumulative sum that starts anew at zero.

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

    def __init__(self) -> None:
        self.score = 0.0
        self.highest_score = 0.0
        self.onset_step: int | None = None
        self.peak = 0.0
        self.values: list[float] = []
        self._before: int | None = None

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

    def late_level(self) -> float:
        """Return the median of the last values: at most half of the rise, at most 9."""
        values = self.values
        return median(values[-max(1, min(WIDTH, len(values) // 2)) :])

    def is_healing(
        self, base: float, need: float, progress: float, pull: float | None, weight: float
    ) -> bool:
        """Return whether the rise is on its way back.

        Args:
            base: Level the rise is measured from.
            need: Height above ``base`` at which a rise matters.
            progress: All that had been learnt, in the units of the loss.
            pull: Gradient norm of the last values over the usual one, ``None`` if unknown.
            weight: For how many values of a full patience one value stands.
        """
        if pull is None:
            # A fall from an absurd height is no sign of healing yet, hence the cap.
            early, late = self._halves(base, CAP * max(progress, need))
            return early > 0.0 and late <= HEALING * early
        if pull <= PULL:
            # High, and nothing unusual pulls it back: only a clear fall within the last two thirds counts.
            early, late = self._thirds(base)
            return early > 0.0 and late <= HEALING_WITHOUT_GRADIENT * early
        early, late = self._halves(base, math.inf)
        if early <= 0.0:
            return False
        patience, count = PATIENCE / weight, len(self.values)
        if count < patience * (1.0 if late >= PARTIAL * progress else PATIENCES_WITH_GRADIENT):
            return True
        # Halvings still to go, at the pace of the last half, must fit into the time left to heal.
        halvings = math.log2(max(1.0, late / need))
        time_left = PATIENCES_TO_HEAL * patience + ELAPSED_TO_HEAL * count
        pace: float = 2.0 ** (-0.5 * halvings * count / time_left)
        return late <= early * min(HEALING_WITH_GRADIENT, pace)

    def _halves(self, base: float, cap: float) -> tuple[float, float]:
        count = len(self.values)
        width = max(1, min(WIDTH, count // 2), count // 4)
        return self._means(base, cap, width, count // 2)

    def _thirds(self, base: float) -> tuple[float, float]:
        count = len(self.values)
        width = max(1, min(WIDTH, count // 3), count // 4)
        return self._means(base, math.inf, width, count - count // 3)

    def _means(self, base: float, cap: float, width: int, until: int) -> tuple[float, float]:
        early = self.values[max(0, until - width) : until] or self.values[:1]
        late = self.values[-width:]
        return (
            sum(min(value - base, cap) for value in early) / len(early),
            sum(min(value - base, cap) for value in late) / len(late),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as JSON values."""
        return {
            "score": self.score,
            "highest_score": self.highest_score,
            "onset_step": self.onset_step,
            "peak": self.peak,
            "values": list(self.values),
            "before": self._before,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RiseCusum:
        """Return the excursion that ``state`` was taken from.

        Raises:
            KeyError: If a part is missing.
            TypeError: If a part is not a number.
        """
        rise = cls()
        rise.score, rise.highest_score = float(state["score"]), float(state["highest_score"])
        rise.onset_step, rise._before = state["onset_step"], state["before"]
        rise.peak = float(state["peak"])
        rise.values = [float(value) for value in state["values"]]
        return rise
