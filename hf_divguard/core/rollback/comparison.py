"""Weights or data: decided from the losses of kept and present weights on batches that neither was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hf_divguard.core.findings import Cause
from hf_divguard.core.rollback.loss_range import Usual
from hf_divguard.core.state import Stateful, memory

__all__ = [
    "MOST_PAIRS",
    "Budget",
    "Pair",
    "Verdict",
    "best_step",
    "explains",
    "is_informed",
    "is_new",
    "is_ruin",
    "judge",
    "margin_of",
    "noise",
    "rises_by_itself",
]

# The present weights must be worse by so much of the loss.
_MARGIN = 0.1
# Of the first loss, for losses that have fallen close to 0.
_MARGIN_OF_FIRST = 0.02
# Standard errors between present and kept weights. One-sided chance of 0.0001 with normal noise; a run is looked at
# some hundred times.
_ERRORS = 3.7
# What the kept weights must explain of the rise of the loss: more than half, else most of it is in the data.
_EXPLAINS = 0.6
# How many pairs the noise known from before counts for.
_PRIOR_PAIRS = 2
# Spreads above the usual loss at which data count as new.
_NEW_SPREADS = 4.0
# ... and the part of the usual loss: single batches are a little harder than others.
_NEW_SHARE = 0.25
# ... and what the loss of the present weights must have risen by, as a part of that of the kept ones.
_OF_KEPT_RISE = 1.0 / 3.0
# Spreads above the usual loss at which the present loss counts as high.
_HIGH_SPREADS = 3.0
# Standard errors from which a difference deserves another look.
_UNEASY_ERRORS = 1.5
# A rise of the loss by so much of it, and the part of the rise that weights are worse by which are not its reason.
_RISEN_SHARE, _RISEN_PART = 0.03, 0.25
# A loss so many times that of the untrained model is no spike of a healthy run: it needs no second look.
_RUIN = 1.5
# ... and of the usual one, where training began with a model that was trained.
_RUIN_OF_USUAL = 2.5
MOST_PAIRS = 12
"""Pairs after which a difference that is still not clear is taken for none."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The losses of one micro-batch.

    Args:
        present: With the present weights.
        kept: With the kept weights.
    """

    present: float
    kept: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a comparison has shown.

    Args:
        cause: ``"weights"``: the kept weights do better on what comes now; ``"data"``: they do
            not, and the loss is high with them too; ``"unknown"``: neither is clear.
        is_high: Whether the loss of the present weights is above its usual range at all.
        is_uneasy: Whether the kept weights seem to do better, but not yet for certain.
        numbers: What it was decided from, by name.
    """

    cause: Cause
    is_high: bool = True
    is_uneasy: bool = False
    numbers: dict[str, float | int] = field(default_factory=dict)

    @property
    def present(self) -> float:
        """Loss of the present weights; infinity where it is not finite."""
        return self.numbers.get("present_loss", math.inf)

    @property
    def kept(self) -> float:
        """Loss of the kept weights; 0 where there is none."""
        return self.numbers.get("kept_loss", 0.0)


def judge(pairs: Sequence[Pair], usual: Usual, wobble: float = 0.0) -> Verdict:
    """Return the cause of a high loss.

    The kept weights must be better by a margin, by far more than the noise of the pairs, and
    must explain most of what the loss lies above its usual level. A kept state that was
    trained less may do better on new data because it is less sure of itself: it explains only
    a part of the rise.

    Args:
        pairs: Losses of micro-batches; at least one.
        usual: The loss before the incident.
        wobble: Difference between healthy states on the same batch, as it was seen before.

    Example:
        >>> usual = Usual(level=1.6, spread=0.1, first=3.0)
        >>> judge([Pair(6.0, 1.7)], usual).cause, judge([Pair(6.0, 5.5)], usual).cause
        ('weights', 'data')
    """
    finite = [pair for pair in pairs if math.isfinite(pair.kept)]
    if not finite:
        return Verdict("data")
    kept = sum(pair.kept for pair in finite) / len(finite)
    if not all(math.isfinite(pair.present) for pair in finite):
        return Verdict("weights", numbers={"kept_loss": kept, "usual_loss": usual.level})
    present = sum(pair.present for pair in finite) / len(finite)
    gain = present - kept
    # The states differ by their wobble on every batch: more pairs do not lessen it.
    error = math.hypot(noise(finite, usual.spread) / math.sqrt(len(finite)), 0.5 * wobble)
    errors = gain / error if error > 0.0 else math.copysign(math.inf, gain)
    rise, margin = present - usual.level, margin_of(kept, usual)
    numbers: dict[str, float | int] = {
        "present_loss": present,
        "kept_loss": kept,
        "usual_loss": usual.level,
        "standard_errors": min(errors, 1e6),
        "pairs": len(finite),
    }
    bar = _MARGIN * abs(usual.level) + _MARGIN_OF_FIRST * abs(usual.first)
    is_high = rise > max(bar, _HIGH_SPREADS * usual.spread / math.sqrt(len(finite)))
    if gain > margin and errors > _ERRORS and gain >= _EXPLAINS * rise:
        return Verdict("weights", is_high, True, numbers)
    if is_high and is_new(kept, usual) and kept - usual.level > (1.0 - _EXPLAINS) * rise:
        return Verdict("data", numbers=numbers)
    return Verdict("unknown", is_high, gain > margin and errors > _UNEASY_ERRORS, numbers)


def margin_of(kept: float, usual: Usual) -> float:
    """Return by how much the present weights must be worse: less heals by itself sooner than a rollback repairs it."""
    return _MARGIN * abs(kept) + _MARGIN_OF_FIRST * abs(usual.first)


def noise(pairs: Sequence[Pair], prior: float) -> float:
    """Return the noise of a difference, from the pairs and from what is known of single losses."""
    differences = [pair.present - pair.kept for pair in pairs]
    mean = sum(differences) / len(differences)
    squares = sum((each - mean) ** 2 for each in differences) + _PRIOR_PAIRS * prior**2
    return math.sqrt(squares / (len(differences) - 1 + _PRIOR_PAIRS))


def is_new(kept: float, usual: Usual) -> bool:
    """Return whether batches are unlike those of before: kept weights have a high loss on them."""
    return kept - usual.level > max(_NEW_SPREADS * usual.spread, _NEW_SHARE * abs(usual.level))


def is_informed(present: float, kept: float, usual: Usual) -> bool:
    """Return whether the kept weights can say that data are new.

    They are as good as the present ones, as far as the first batches of new data show it. Where the
    present ones do far better the kept ones are too old: to them the usual data are hard, too.

    Args:
        present: Loss of the present weights on the batches.
        kept: Loss of the kept ones.
        usual: The loss before the incident.

    Example:
        >>> usual = Usual(level=1.25, spread=0.1, first=2.3)
        >>> is_informed(3.1, 3.2, usual), is_informed(1.5, 2.2, usual)
        (True, False)
    """
    return present - usual.level >= _OF_KEPT_RISE * (kept - usual.level)


def is_ruin(present: float, kept: float, usual: Usual) -> bool:
    """Return whether a loss is so high that no spike of a healthy run has it, nor what bad data leave.

    Where the kept weights do badly too, on the way back to untrained ones, it is not the weights alone.
    """
    is_good = 2.0 * kept < usual.level + usual.first or (kept < usual.first and not is_new(kept, usual))
    return present > max(_RUIN * usual.first, _RUIN_OF_USUAL * usual.level) and is_good


def rises_by_itself(present: Sequence[float], kept: Sequence[float], usual: Usual, earlier: float) -> bool:
    """Return whether the loss has risen for another reason than the weights.

    Of a rise that began before all kept states none of them is known to be good. But where the
    loss has gone on rising since, weights that are being damaged get worse by as much, compared
    on the same batches. Where they have not, it is the data or the objective that has changed.

    Args:
        present: Losses with the present weights.
        kept: The same with the oldest kept ones.
        usual: The usual range.
        earlier: Level of the loss when they were kept.

    Example:
        >>> usual = Usual(level=2.0, spread=0.03, first=2.3)
        >>> rises_by_itself([2.0, 2.1], [2.0, 2.1], usual, earlier=1.7)
        True
        >>> rises_by_itself([2.0, 2.1], [1.7, 1.8], usual, earlier=1.7)
        False
        >>> rises_by_itself([2.0, 2.1], [2.0, 2.1], usual, earlier=2.0)  # damage that is older than the kept state
        False
    """
    risen = usual.level - earlier
    worse = sum(present) / len(present) - sum(kept) / len(kept)
    least = max(_RISEN_SHARE * abs(usual.level), _HIGH_SPREADS * usual.spread)
    return risen > least and worse < _RISEN_PART * risen


def explains(present: Sequence[float], kept: Sequence[float], usual: Usual) -> bool:
    """Return whether there is no need to look at older states: this one does as well as can be expected."""
    now, then = sum(present) / len(present), sum(kept) / len(kept)
    is_usual = now - usual.level <= _HIGH_SPREADS * usual.spread
    return is_usual or then <= usual.level + usual.spread or now - then >= 0.75 * (now - usual.level)


def best_step(
    losses: dict[int, float], spread: float, is_trusted: Callable[[int], bool] = lambda step: True
) -> int | None:
    """Return the newest of the kept states that do about as well as the best one.

    Args:
        losses: Loss on the newest batches, by step.
        spread: Noise of a loss.
        is_trusted: Whether a state comes before one that does as well and is not trusted.

    Example:
        >>> best_step({10: 2.1, 20: 2.0, 25: 6.0}, spread=0.05)
        20
    """
    finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        return None
    bar = min(finite.values())
    bar += max(0.5 * _MARGIN * abs(bar), 0.5 * spread)
    good = [step for step, loss in finite.items() if loss <= bar]
    return max(filter(is_trusted, good), default=max(good))


# ---- what it may cost


@dataclass
class Budget(Stateful):
    """How many forward passes looks may take, counted in micro-batches.

    A step of ``n`` micro-batches takes about ``3 n`` forward passes of time. Counting passes
    instead of seconds makes every rank, and a run that is repeated, decide alike.

    Args:
        share: Part of the training time.
        reserve: Forward passes that may be saved up.

    Example:
        >>> budget = Budget(share=0.1, reserve=4.0)
        >>> budget.take(4), budget.take(1)
        (True, False)
        >>> budget.earn(micro_batches=4)
        >>> budget.take(1)
        True
        >>> budget.take_anyway(5)
        >>> budget.renew()
        >>> budget.take(2)
        True
    """

    share: float
    reserve: float
    _spent: float = memory(0.0)

    def earn(self, micro_batches: int) -> None:
        """Note a step of training."""
        self._spent = max(0.0, self._spent - 3.0 * self.share * micro_batches)

    def take(self, passes: int) -> bool:
        """Take ``passes`` if there are so many."""
        if self._spent + passes > self.reserve:
            return False
        self._spent += passes
        return True

    def renew(self) -> None:
        """After a rollback: have at least half of the reserve left."""
        self._spent = min(self._spent, 0.5 * self.reserve)

    def take_anyway(self, passes: int) -> None:
        """Note passes that were taken beyond what was asked for."""
        self._spent += passes
