"""When to compare kept and present weights, and what the comparisons of one incident add up to."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_divguard.core.detection.baseline import median
from hf_divguard.core.findings import Cause
from hf_divguard.core.rollback.comparison import (
    MOST_PAIRS,
    LossRange,
    Pair,
    Verdict,
    best_step,
    is_new,
    judge,
)
from hf_divguard.core.state import Stateful, memory

__all__ = ["Incident", "Ruling"]

# Steps between two looks while new data last.
_LOOKS_AT_DATA = (3, 5, 10, 20, 40)
# Looks that must have seen bad data before what they leave is undone.
_FEWEST_LOOKS_AT_DATA = 3
# Steps between two looks after a rollback; a fault that lasts is undone again and again, ever less often.
_LOOKS_AFTER = (1, 2, 4, 8, 8)
_GAPS = (1, 1, 1, 1, 2, 2, 4, 4, 8)
# Data are new and can be learnt where the loss has fallen below this part of the first one.
_LEARNT = 0.8
# A loss so many times that of the untrained model is no spike of a healthy run: it needs no second look.
_PLAIN = 1.5
# Steps within which the present weights may recover after a data fault has passed.
_HEALS_WITHIN = 5
_HUGE = 1e300
# Losses that make a level, within an incident.
_LEVEL = 5
# Pairs after which a high loss, that the kept weights do not have less of, is no damage.
_FEW_PAIRS = 3
# Differences of healthy states, from which the noise of a difference is known.
_HARMLESS = 24
# Losses out of the range that enter it once they have proved harmless.
_MOST_LEFT_OUT = 30

Act = Literal["none", "act", "dismiss"]


@dataclass(frozen=True, slots=True)
class Ruling:
    """What to do after a look.

    Args:
        act: ``"act"``: roll back or stop; ``"dismiss"``: what the curve asked for is not done;
            ``"none"``: nothing, as yet.
        cause: The cause that a finding names.
        good_step: Step of the kept state that does best.
        verdict: The comparison.
    """

    act: Act
    cause: Cause = "unknown"
    good_step: int = 0
    verdict: Verdict | None = None


@dataclass
class Incident(Stateful):
    """The looks of a run: when the next one is due, and what they have shown so far.

    A step out of the usual range, or a finding of the curve, opens an incident. It is closed
    when the loss of the present weights is back in its range, or when new data have become
    the usual ones. After a rollback it stays open for some looks.
    """

    range: LossRange = memory(LossRange)
    next_look: int | None = memory(None)
    cause: str | None = memory(None)
    since: int = memory(0)
    restores: int = memory(0)
    last_restore: int = memory(-1)
    _looks: int = memory(0)
    _damage_since: tuple[int, float] | None = memory(None)
    _new_data: tuple[int, int] | None = memory(None)
    _losses: deque[float] = memory(lambda: deque(maxlen=_LEVEL))
    _left_out: list[float] = memory(list)
    _harmless: deque[float] = memory(lambda: deque(maxlen=_HARMLESS))

    def __post_init__(self) -> None:
        # Not part of the memory: kept states are in no checkpoint either.
        self._pairs: dict[int, list[tuple[float, float]]] = {}

    @property
    def is_open(self) -> bool:
        """Whether something is being looked into."""
        return self.next_look is not None

    def observe(self, step: int, loss: float, grad_norm: float | None) -> None:
        """Take the raw loss and the gradient norm of a step."""
        is_out = self.range.observe(loss, grad_norm, learns=not self.is_suspicious)
        if math.isfinite(loss):
            self._losses.append(loss)
        if not is_out:
            return
        if math.isfinite(loss) and len(self._left_out) < _MOST_LEFT_OUT:
            self._left_out.append(loss)
        if not self.is_open:
            self._open(step)
        elif self.last_restore >= 0 and self.next_look is not None:
            gap = _GAPS[min(self.restores, len(_GAPS)) - 1]
            self.next_look = min(self.next_look, max(step, self.last_restore + gap))

    def ask(self, step: int) -> None:
        """Open an incident because of a finding of the curve."""
        if not self.is_open:
            self._open(step)
        self.next_look = step

    def _open(self, step: int) -> None:
        self.next_look, self.since, self.cause = step, step, None
        self._looks, self.restores, self.last_restore = 0, 0, -1
        self._damage_since = None
        self._pairs.clear()
        self._losses.clear()
        self._left_out.clear()

    @property
    def is_suspicious(self) -> bool:
        """Whether the present state is not to be kept: until two looks after a rollback have found it good."""
        return self.is_open and not (self.last_restore >= 0 and self._looks >= 3)

    def is_due(self, step: int) -> bool:
        """Return whether to look before the step after ``step``."""
        return self.next_look is not None and step >= self.next_look

    def close(self) -> None:
        """Look no more."""
        self.next_look = None
        self._pairs.clear()

    def rule(
        self, step: int, present: Sequence[float], kept: Mapping[int, Sequence[float]], *, is_asked: bool
    ) -> Ruling:
        """Return what the losses of one look mean.

        Args:
            step: Present step.
            present: Loss of each micro-batch with the present weights.
            kept: The same with kept weights, by their step.
            is_asked: Whether a finding of the curve waits for it.
        """
        for kept_step, losses in kept.items():
            pairs = self._pairs.setdefault(kept_step, [])
            pairs.extend(zip(present, losses, strict=True))
        usual = self.range.usual
        most = max(len(pairs) for pairs in self._pairs.values())
        means = {
            kept_step: sum(loss for _, loss in pairs) / len(pairs)
            for kept_step, pairs in self._pairs.items()
            if len(pairs) == most
        }
        good = best_step(means, usual.spread)
        if good is None:
            return self._later(step, "data", Verdict("data"))
        compared = [Pair(*pair) for pair in self._pairs[good]]
        verdict = judge(compared, usual, self._noise())
        newest = judge(compared[-len(present) :], usual, self._noise())
        if verdict.cause != "weights" and newest.cause == "weights":
            verdict = newest  # damage that grows looks like noise beside the earlier pairs
        if verdict.cause == "weights" and self._newest_does_not_know(kept):
            return self._later(step, "data", verdict)
        if verdict.cause == "weights" and (verdict.is_high or self.cause is not None or is_asked):
            return self._damaged(step, good, verdict, lasts=newest.cause == "weights" or newest.is_uneasy)
        self._damage_since = None
        if verdict.cause == "data":
            return self._later(step, "data", verdict)
        is_high = verdict.is_high and self.last_restore < 0
        if most < (MOST_PAIRS if verdict.is_uneasy else _FEW_PAIRS if is_high else 0):
            self.next_look = step + 1
            return Ruling("none", "unknown", good, verdict)
        if verdict.is_high:
            return self._later(step, "unknown", verdict)
        return self._calm(step, verdict)

    def _newest_does_not_know(self, kept: Mapping[int, Sequence[float]]) -> bool:
        """Return whether the newest state that was sound does badly on the coming batches, whatever older ones do.

        It was kept two steps or more before a loss was out of its range, so the data are not
        those that it was trained on: a turn of domains, which an older state may know.
        """
        sound = [kept_step for kept_step in kept if kept_step <= self.since - 2]
        if not sound:
            return False
        pairs = [Pair(*pair) for pair in self._pairs[max(sound)]]
        return judge(pairs, self.range.usual, self._noise()).cause != "weights"

    def _damaged(self, step: int, good: int, verdict: Verdict, *, lasts: bool) -> Ruling:
        """Act on damage that lasts. A spike, and what little a passing data fault leaves, heal by themselves."""
        if self.cause == "data" and self._looks < _FEWEST_LOOKS_AT_DATA:
            # Too short to distinguish a fault from a turn of domains, and too short for much damage.
            self.take_as_usual(step)
            return Ruling("dismiss", "data", 0, verdict)
        gain = verdict.numbers.get("present_loss", math.inf) - verdict.numbers["kept_loss"]
        before, wait = self._damage_since, _HEALS_WITHIN if self.cause == "data" else 1
        is_plain = (
            self.cause is None
            and verdict.numbers.get("present_loss", math.inf) > _PLAIN * self.range.usual.first
        )
        if is_plain or (
            before is not None and step >= before[0] + wait and lasts and gain >= 0.5 * before[1]
        ):
            self.next_look, self._damage_since = step + 1, None
            return Ruling("act", "data" if self.cause == "data" else "weights", good, verdict)
        if before is None or not lasts:
            self._damage_since = (step, min(gain, _HUGE))
            self.next_look = step + wait
        else:
            self.next_look = max(step + 1, before[0] + wait)
        return Ruling("none", "weights", good, verdict)

    def _noise(self) -> float:
        """Return the noise of a difference between healthy states, as far as it is known."""
        squares = [each * each for each in self._harmless if math.isfinite(each)]
        return math.sqrt(sum(squares) / len(squares)) if squares else 0.0

    def _later(self, step: int, cause: Cause, verdict: Verdict) -> Ruling:
        """Look again when the data have had time to change; after the last look they are the usual ones."""
        if cause == "data" and self.cause is None:
            # Close to a fault of the weights it is an incident of its own.
            self.cause, self.since = "data", step if self.last_restore >= 0 else self.since
            self._looks, self.restores, self.last_restore = 0, 0, -1
        self._left_out.clear()
        self._pairs.clear()
        if self._looks >= len(_LOOKS_AT_DATA) or self._is_learnt():
            self.take_as_usual(step)
        else:
            self.next_look = step + _LOOKS_AT_DATA[self._looks]
            self._looks += 1
        return Ruling("dismiss", cause, 0, verdict)

    def _is_learnt(self) -> bool:
        """Return whether the loss on the new data has fallen to where only learning brings it."""
        if self._looks < 2 or len(self._losses) < _LEVEL:
            return False
        return median(self._losses) < _LEARNT * self.range.usual.first

    def take_as_usual(self, step: int) -> None:
        """Make the present losses the usual ones."""
        self.range.accept(list(self._losses))
        self._new_data = (self.since, step)
        self.close()

    def _calm(self, step: int, verdict: Verdict) -> Ruling:
        """The loss is in its range: look again after a rollback, else close the incident."""
        if self.last_restore < 0 and self.cause is None:
            for pairs in self._pairs.values():
                # The present weights may be better by all that was learnt since: that is no noise.
                self._harmless += [max(0.0, now - then) for now, then in pairs]
            self.range.extend(self._left_out)
        self._left_out.clear()
        self._pairs.clear()
        if self.cause == "data" and is_new(verdict.numbers.get("kept_loss", 0.0), self.range.usual):
            # The present weights have learnt what the kept ones do not know.
            self.take_as_usual(step)
        elif self.last_restore >= 0 and self._looks < len(_LOOKS_AFTER):
            self.next_look = step + _LOOKS_AFTER[self._looks]
            self._looks += 1
        else:
            self.close()
        return Ruling("dismiss", "data" if self.cause == "data" else "unknown", 0, verdict)

    @property
    def new_data_until(self) -> int:
        """Step at which new data have last become the usual ones; -1 if none have."""
        return -1 if self._new_data is None else self._new_data[1]

    def is_about_new_data(self, onset_step: int) -> bool:
        """Return whether what the curve places at ``onset_step`` are data that have become the usual ones."""
        return onset_step <= self.new_data_until

    def has_restored(self, step: int) -> None:
        """Note a rollback at ``step``, and look whether the fault has passed."""
        if not self.is_open:
            self._open(step)
        self.restores += 1
        self.last_restore, self._looks, self.cause, self._damage_since = step, 1, None, None
        self._pairs.clear()
        self._losses.clear()
        self._left_out.clear()
        self.next_look = step + max(_LOOKS_AFTER[0], _GAPS[min(self.restores, len(_GAPS)) - 1])
