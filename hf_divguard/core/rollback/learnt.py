"""What was learnt since a state was kept: a reason not to go back to it, however well it does on what comes now."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from hf_divguard.core.detection.sorted_window import median
from hf_divguard.core.rollback.comparison import Pair
from hf_divguard.core.rollback.loss_range import LEARNT, Usual

__all__ = ["FEWEST_LOOKS", "can_be_undone", "has_learnt_since", "is_learnt"]

# The kept weights must be worse by so much of the loss.
_MARGIN = 0.1
_MARGIN_SMALL = 0.04
# Batches that must show it, at least, and as a part of all.
_FEWEST = 2
_SHARE = 0.25
# Losses on new data that show that they are learnt, and the part of the first loss below which they have to be.
_LOSSES = 5
_LEARNT = 0.8
# What was learnt in more steps than these is worth more than what passing data have left.
_MOST_STEPS = 50
FEWEST_LOOKS = 3
"""Looks that must have seen bad data before what they leave is undone."""


def has_learnt_since(
    pairs: Sequence[Pair], usual: Usual, *, is_after_data: bool = False, is_small: bool = False
) -> bool:
    """Return whether the present weights know data that the kept ones do not.

    When a stream goes back to data of before, an older state may do better on them although
    nothing is damaged: it has forgotten less. Damaged weights do worse on everything, also on
    the batches that they were trained on since.

    Args:
        pairs: Losses of batches that the present weights were trained on since the state was kept.
        usual: The loss before the incident.
        is_after_data: Whether bad data are thought to have passed. Weights follow whatever they are trained on; only
            a loss below that of the start says that there was something to learn.
        is_small: Whether the damage in question is small.

    Example:
        >>> usual = Usual(level=1.6, spread=0.1, first=3.0)
        >>> has_learnt_since([Pair(1.5, 3.2), Pair(1.7, 3.0), Pair(2.9, 1.6)], usual)
        True
        >>> has_learnt_since([Pair(4.5, 1.6), Pair(4.7, 1.5), Pair(2.9, 1.6)], usual)
        False
    """
    share = _MARGIN_SMALL if is_small else _MARGIN
    bar = LEARNT * usual.first if is_after_data else math.inf
    learnt = [
        pair for pair in pairs if pair.present < bar and pair.kept - pair.present > share * abs(pair.present)
    ]
    return len(learnt) >= max(_FEWEST, _SHARE * len(pairs))


def can_be_undone(lasted: int, looks: int, age: int, steps_to_learn: float) -> bool:
    """Return whether what passing data have left may be undone: they can be distinguished from a turn of domains.

    In as many steps as the run took to learn something at its start, it would have learnt them
    if they could be learnt.

    Args:
        lasted: Steps that they lasted.
        looks: Looks that have seen them.
        age: Age in steps of the state that would be restored.
        steps_to_learn: Steps that the run took to learn something, infinity if it has not.

    Example:
        >>> can_be_undone(20, 3, 25, steps_to_learn=12), can_be_undone(20, 3, 25, steps_to_learn=40)
        (True, False)
    """
    return looks >= FEWEST_LOOKS and lasted >= steps_to_learn and age <= _MOST_STEPS


def is_learnt(losses: Collection[float], usual: Usual) -> bool:
    """Return whether the last losses on new data are where only learning brings them."""
    return len(losses) >= _LOSSES and median(losses) < _LEARNT * usual.first
