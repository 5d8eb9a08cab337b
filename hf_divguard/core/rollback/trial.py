"""Small damage that lasts: every kept state has to do better than the present weights, on many batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from hf_divguard.core.rollback.comparison import Pair, Verdict, judge, noise
from hf_divguard.core.rollback.loss_range import Usual

__all__ = ["Trial", "judge_small", "mean_gain", "newest_good", "verdict_on_small"]

Trial = Literal["damage", "none", "unclear"]

# The least difference, as a part of the kept loss and of the first one. A rollback loses some steps of training.
_MARGIN = 0.04
_MARGIN_OF_FIRST = 0.01
# With one kept state alone: that one may be better by luck.
_MARGIN_ALONE = 0.1
# Standard errors of the mean difference.
_ERRORS = 3.7
# ... and at the end of training, where there is one look instead of many.
_ERRORS_AT_END = 2.5
_FEWEST_PAIRS = 8
_FEWEST_LOOKS = 6
_MOST_LOOKS = 12
# What recovers by itself: the later half of the pairs shows less of it than this part of the earlier half.
_LASTS = 0.7
_NEARLY = 0.7
# Refuted where so many pairs show no difference, or one that so many errors more do not bring above the margin.
_FEWEST_TO_END = 3
_HOPE_ERRORS = 2.5


def judge_small(
    pairs: Mapping[int, Sequence[tuple[float, float]]], usual: Usual, *, looks: int, is_last: bool = False
) -> Trial:
    """Return whether small damage is certain, refuted, or needs more pairs.

    One kept state may be better than the present weights by luck, where states differ while
    nothing is wrong. So the least of the differences counts: it has to be above the margin, far
    above its noise, and must not shrink from pair to pair.

    Args:
        pairs: Losses of micro-batches with the present and with the kept weights, by the step of
            the kept state; all of the same micro-batches.
        usual: The loss before.
        looks: At how many steps the losses were taken.
        is_last: Whether training ends here.

    Example:
        >>> usual = Usual(level=1.5, spread=0.1, first=3.0)
        >>> judge_small({40: [(1.7, 1.5)] * 8, 20: [(1.7, 1.52)] * 8}, usual, looks=8)
        'damage'
        >>> judge_small({40: [(1.7, 1.5)] * 8, 20: [(1.7, 1.72)] * 8}, usual, looks=8)
        'none'
    """
    if not pairs:
        return "none"
    worst = min(pairs.values(), key=mean_gain)
    gain, count = mean_gain(worst), len(worst)
    if not math.isfinite(gain) or (gain <= 0.0 and count >= _FEWEST_TO_END):
        return "none"
    kept = sum(loss for _, loss in worst) / count
    share = _MARGIN if len(pairs) > 1 else _MARGIN_ALONE
    margin = share * abs(kept) + _MARGIN_OF_FIRST * abs(usual.first)
    error = noise([Pair(*pair) for pair in worst], usual.spread) / math.sqrt(count)
    if count >= _FEWEST_TO_END and gain + _HOPE_ERRORS * error < margin:
        return "none"
    half = count // 2
    lasts = mean_gain(worst[half:]) >= _LASTS * mean_gain(worst[:half]) if half else False
    bar = max(margin, (_ERRORS_AT_END if is_last else _ERRORS) * error)
    if looks >= _FEWEST_LOOKS and count >= _FEWEST_PAIRS and gain > bar and lasts:
        return "damage"
    return "none" if looks >= _MOST_LOOKS else "unclear"


def newest_good(pairs: Mapping[int, Sequence[tuple[float, float]]]) -> int:
    """Return the newest of the kept states that gain nearly as much as the best one."""
    gains = {kept_step: mean_gain(of_state) for kept_step, of_state in pairs.items()}
    return max(kept_step for kept_step, gain in gains.items() if gain >= _NEARLY * max(gains.values()))


def verdict_on_small(pairs: Mapping[int, Sequence[tuple[float, float]]], usual: Usual) -> tuple[int, Verdict]:
    """Return the step of the state to go back to after small damage, and the numbers that speak for it."""
    good = newest_good(pairs)
    numbers = judge([Pair(*pair) for pair in pairs[good]], usual).numbers
    return good, Verdict("weights", numbers=numbers)


def mean_gain(pairs: Sequence[tuple[float, float]]) -> float:
    """Return by how much the kept weights do better."""
    return sum(present - kept for present, kept in pairs) / len(pairs)
