"""How far a loss must rise to matter: shares of the progress, spreads of the noise, rises that recovered."""

from __future__ import annotations

import math
from typing import NamedTuple

from hf_divguard.core.detection.baseline import PATIENCE, RobustBaseline
from hf_divguard.core.detection.surge import SURGE

__all__ = [
    "CLIMB_SPREADS",
    "FULL_SHARE",
    "JUMP_SHARE",
    "LEAST_PATIENCE",
    "RiseBounds",
    "climb_bound",
    "rise_bounds",
]

# docs/detectors.md gives the source of each number.
JUMP_SHARE = 0.22
FULL_SHARE = 0.4
JUMP_SPREADS = 3.0
CLIMB_SPREADS = 10.0
LEAST_SPREADS = 0.3
FEW_VALUES = 50
SHORT_HISTORY = 15
JUMP_MOVEMENTS = 2.0
CLIMB_MOVEMENTS = 5.0
RECOVERED_FACTOR = 1.5
RESOLUTION = 0.01
LEAST_PATIENCE = 4
HISTORY_PER_PATIENCE = 10


class RiseBounds(NamedTuple):
    """What a rise has to reach at this value to matter.

    Args:
        progress: How far the loss has fallen so far.
        is_unlearnt: Whether that progress is too small to be distinguished from noise.
        jump: Height of a jump.
        climb: Height of a climb above the best level.
        jump_scale: Unit in which the evidence for a jump is added up.
        climb_scale: Unit in which the evidence for a climb is added up.
        weight: How much one value counts, where few values have to do.
    """

    progress: float
    is_unlearnt: bool
    jump: float
    climb: float
    jump_scale: float
    climb_scale: float
    weight: float


def rise_bounds(level: RobustBaseline, recovered: float, *, gap: int, sensitivity: float) -> RiseBounds:
    """Return the bounds for the next value.

    Args:
        level: The baseline.
        recovered: Height of the highest rise that recovered.
        gap: Steps between two values.
        sensitivity: 2.0 asks for half the height of 1.0.
    """
    progress, spread, size = level.progress, level.spread, abs(level.center)
    few = max(1.0, FEW_VALUES / level.count)
    unlearnt = _unlearnt(progress, spread)
    jump = max(
        RESOLUTION * size,
        JUMP_SHARE * progress,
        FULL_SHARE * unlearnt * size,
        # In a short history most of the movement is the fall of the start: losing all of it is a jump all the same.
        min(JUMP_MOVEMENTS * level.movement, progress if level.count <= SHORT_HISTORY else math.inf),
        _spreads(JUMP_SPREADS * few, progress, spread),
    )
    climb = climb_bound(level)
    # A rise like one that recovered may recover too; losing all that was learnt is reported all the same, except
    # at the start, where that is little.
    recovered = min(RECOVERED_FACTOR * recovered, level.reach if few > 1.0 else progress)
    jump, climb = max(jump, recovered) / sensitivity, max(climb, recovered) / sensitivity
    # For a constant so far the scale is known from its size alone.
    scale = max(FULL_SHARE * progress, spread / 2.563) or max(RESOLUTION * size, 1e-300)
    patience = max(LEAST_PATIENCE, -(-PATIENCE // gap), min(PATIENCE, level.count / HISTORY_PER_PATIENCE))
    return RiseBounds(
        progress=progress,
        is_unlearnt=unlearnt > 0.5,
        jump=jump or scale,
        climb=climb or scale,
        jump_scale=scale,
        climb_scale=max(0.1 * progress, 2.0 * level.noise) or scale,
        weight=PATIENCE / patience,
    )


def climb_bound(level: RobustBaseline) -> float:
    """Return how high a climb must be at a sensitivity of 1, whatever has recovered."""
    few = max(1.0, FEW_VALUES / level.count)
    return max(
        RESOLUTION * abs(level.center),
        FULL_SHARE * level.progress,
        SURGE**2 * abs(level.best_or_center) if _unlearnt(level.progress, level.spread) > 0.5 else 0.0,
        CLIMB_MOVEMENTS * level.movement_at_best,
        _spreads(CLIMB_SPREADS * few, level.progress, level.spread_at_best),
    )


def _unlearnt(progress: float, spread: float) -> float:
    """Return a share: 1 where no progress is certain, so that there is nothing to lose, and 0 where much is.

    With nothing to lose a rise is measured by the size of the loss itself.
    """
    return 1.0 / (1.0 + min(1e6, progress / spread) ** 2) if spread > 0.0 else float(progress <= 0.0)


def _spreads(factor: float, progress: float, spread: float) -> float:
    """Return how high a rise must be in spreads: the larger the progress, the fewer spreads."""
    if spread <= 0.0:
        return 0.0
    return max(LEAST_SPREADS, factor / (1.0 + min(1e6, progress / spread) ** 2)) * spread
