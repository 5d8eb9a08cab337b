"""When to compare kept and present weights, and what the comparisons of one incident add up to."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hf_divguard.core.findings import Cause
from hf_divguard.core.rollback.comparison import (
    MOST_PAIRS,
    Verdict,
    best_step,
    is_informed,
    is_new,
    is_ruin,
    judge,
    margin_of,
)
from hf_divguard.core.rollback.healing import Healing, costs_more_than_steps
from hf_divguard.core.rollback.learnt import FEWEST_LOOKS, can_be_undone, is_learnt
from hf_divguard.core.rollback.look_times import steps_after_restores, steps_to_next_look
from hf_divguard.core.rollback.loss_range import LossRange
from hf_divguard.core.rollback.pairs import PairsByState
from hf_divguard.core.rollback.ruling import Ruling
from hf_divguard.core.rollback.soundness import is_trusted
from hf_divguard.core.rollback.trial import judge_small, verdict_on_small
from hf_divguard.core.state import Stateful, memory

__all__ = ["Incident"]

# Steps within which the present weights may recover after a data fault has passed, at least; else half of its length.
_HEALS_WITHIN = 5
# Damage that shrinks below this part until the next look is healing: from step to step, and within those steps.
_LEFT = 0.7
_LEFT_OF_DATA = 0.5
_HUGE = 1e300
# Damage of so many times what the data of a few looks were too high by is not theirs.
_NEW_DAMAGE = 2.0
# Losses that make a level, within an incident.
_LEVEL = 5
# Pairs after which a loss that is high, or follows bad data, and that the kept weights do not have less of, is no damage.
_FEW_PAIRS = 3
# Losses in a row that show a return.
_RETURNED = 2
# Losses out of the range that enter it once they have proved harmless.
_MOST_LEFT_OUT = 30


@dataclass
class Incident(Stateful):
    """The looks of a run: when the next one is due, and what they have shown so far.

    A step out of the usual range, or a finding of the curve, opens an incident. It is closed
    when the loss of the present weights is back in its range, or when new data have become
    the usual ones. After a rollback it stays open for some looks.

    Args:
        watches_small: Whether a rise that no single loss shows opens an incident as well.
    """

    watches_small: bool = False
    range: LossRange = memory(LossRange)
    next_look: int | None = memory(None)
    cause: str | None = memory(None)
    since: int = memory(0)
    restores: int = memory(0)
    last_restore: int = memory(-1)
    is_slow: bool = memory(False)
    new_data_until: int = memory(-1)
    open_question_at: int = memory(-1)
    _until: float | None = memory(None)
    _excess: float = memory(0.0)
    _looks: int = memory(0)
    _damage_since: tuple[int, float] | None = memory(None)
    _bad_until: int = memory(0)
    _losses: deque[float] = memory(lambda: deque(maxlen=_LEVEL))
    _left_out: list[float] = memory(list)
    _healing: Healing = memory(Healing)

    def __post_init__(self) -> None:
        self.pairs = PairsByState()  # not part of the memory: kept states are in no checkpoint either

    @property
    def is_open(self) -> bool:
        """Whether something is being looked into."""
        return self.next_look is not None

    def observe(self, step: int, loss: float, grad_norm: float | None) -> None:
        """Take the raw loss and the gradient norm of a step."""
        is_out = self.range.observe(loss, grad_norm, learns=not self.is_suspicious)
        if math.isfinite(loss):
            self._losses.append(loss)
        self._observe_return(step)
        if not is_out:
            self.observe_level(step)
            return
        if math.isfinite(loss) and len(self._left_out) < _MOST_LEFT_OUT:
            self._left_out.append(loss)
        if not self.is_open:
            self._open(step)
        elif self.last_restore >= 0 and self.next_look is not None:
            soonest = self.last_restore + steps_after_restores(self.restores)
            self.next_look = min(self.next_look, max(step, soonest))

    def _observe_return(self, step: int) -> None:
        """Look at once if the loss under new data has come half of the way back: they may have passed."""
        last = list(self._losses)[-_RETURNED:]
        if self._until is None or self.next_look is None or len(last) < _RETURNED or max(last) >= self._until:
            return
        self._until, self.next_look = None, min(self.next_look, step)

    def observe_level(self, step: int, *, is_last: bool = False) -> None:
        """Open an incident if the mean of the last losses is higher; at the end less has to speak for it."""
        if self.is_open or not self.watches_small:
            return
        risen = self.range.take_slow_rise(is_last=is_last)
        if risen:
            self._open(step)
            self.is_slow, self.since, self._left_out = True, step - len(risen), risen

    def ask(self, step: int) -> None:
        """Open an incident because of a finding of the curve."""
        if not self.is_open:
            self._open(step)
        self.next_look = step

    def _open(self, step: int) -> None:
        self.next_look, self.since, self.cause = step, step, None
        self._looks, self.restores, self.last_restore = 0, 0, -1
        self._damage_since, self.is_slow, self._until, self._excess = None, False, None, 0.0
        self.pairs.clear()
        self._losses.clear()
        self._left_out = []

    @property
    def is_suspicious(self) -> bool:
        """Whether the present state is not to be kept: until two looks after a rollback have found it good."""
        return self.is_open and not (
            self.last_restore >= 0 and self._looks >= 3 and self._damage_since is None
        )

    @property
    def _is_again(self) -> bool:
        """Whether a rollback has shown that the weights were damaged, and it goes on."""
        return self.last_restore >= 0 and self.cause is None

    def is_due(self, step: int) -> bool:
        """Return whether to look before the step after ``step``."""
        return self.next_look is not None and step >= self.next_look

    def close(self) -> None:
        """Look no more."""
        self.next_look = None
        self.pairs.clear()

    def rule(
        self,
        step: int,
        present: Sequence[float],
        kept: Mapping[int, Sequence[float]],
        *,
        is_asked: bool,
        looks: int = 1,
        is_last: bool = False,
        is_damaged: Callable[[int, int], bool] = lambda newest, good: False,
    ) -> Ruling:
        """Return what the losses of one look mean.

        Args:
            step: Present step.
            present: Loss of each micro-batch with the present weights.
            kept: The same with kept weights, by their step.
            is_asked: Whether a finding of the curve waits for it.
            looks: Of how many steps the micro-batches are.
            is_last: Whether training ends here.
            is_damaged: Whether the first of two kept states is worse than the second on its own batches.
        """
        self.pairs.add(present, kept, at=step)
        usual, most = self.range.usual, self.pairs.most
        good = best_step(
            self.pairs.means(), usual.spread, lambda kept: is_trusted(kept, self.last_restore, step)
        )
        if good is None:
            return self._later(step, "data", Verdict("data"))
        compared = self.pairs.of(good)
        wobble = self._healing.noise(step)
        verdict = judge(compared, usual, wobble)
        newest = judge(compared[-len(present) :], usual, wobble)
        if verdict.cause != "weights" and newest.cause == "weights":
            verdict = newest  # damage that grows looks like noise beside the earlier pairs
        if verdict.cause == "weights" and self.pairs.shows_a_turn(good, self.since, is_damaged):
            return self._later(step, "data", verdict)
        if verdict.cause == "weights" and (verdict.is_high or self.cause is not None or is_asked):
            return self._damaged(step, good, verdict, newest)
        if not (verdict.is_uneasy and (self.cause == "data" or self._is_again)):
            if self._damage_since is not None and not self._is_again:
                self._healing.note_healed(step)
            self._damage_since = None
        elif self._damage_since is None and self.cause == "data":
            self._damage_since = (step, verdict.present - verdict.kept)
        is_told = self.cause == "data" or is_informed(verdict.present, verdict.kept, usual)
        if verdict.cause == "data" and is_told:
            return self._later(step, "data", verdict)
        if self.is_slow and self.cause is None:
            return self._small(step, verdict, looks, is_last)
        is_doubtful = verdict.is_uneasy or (verdict.is_high and self._is_again)
        is_unclear = verdict.is_high or self.cause == "data"
        if most < (MOST_PAIRS if is_doubtful else _FEW_PAIRS if is_unclear else 0):
            self.next_look = step + 1
            return Ruling("none", "unknown", good, verdict)
        if verdict.is_high:
            return self._later(step, "unknown", verdict)
        return self._calm(step, verdict)

    @property
    def has_bad_data(self) -> bool:
        """Whether so many looks have seen bad data that they do not pass at once."""
        return self.is_open and self.cause == "data" and self._looks >= FEWEST_LOOKS

    def _small(self, step: int, verdict: Verdict, looks: int, is_last: bool) -> Ruling:
        """Try damage that no single loss shows on further batches, until it is certain or refuted."""
        sound = self.pairs.sound(self.since)
        self._looks += looks
        trial = judge_small(sound, self.range.usual, looks=self._looks, is_last=is_last)
        if trial == "unclear":
            self.next_look = step + 1
            return Ruling("none", "unknown", 0, verdict)
        if trial == "none":
            self.dismiss()
            return Ruling("dismiss", "unknown", 0, verdict)
        return Ruling("act", "weights", *verdict_on_small(sound, self.range.usual))

    def dismiss(self) -> None:
        """Close an incident that was none: its losses are usual ones."""
        self.range.extend(self._left_out)
        self._left_out = []
        self.close()

    def _damaged(self, step: int, good: int, verdict: Verdict, newest: Verdict) -> Ruling:
        """Act on damage that lasts. A spike, and what little a passing data fault leaves, heal by themselves."""
        further = 0 if self._is_again else self._healing.further_looks(step)
        is_plain = is_ruin(verdict.present, verdict.kept, self.range.usual)
        gain = newest.present - newest.kept
        is_new_damage = self._looks < FEWEST_LOOKS and gain > _NEW_DAMAGE * self._excess
        if self.cause == "data" and (is_plain or is_new_damage):
            # Bad data make the present weights neither so much worse than untrained ones on good data, nor by more
            # in a few steps than the data were worse themselves.
            self.cause, self._damage_since = None, None
        lasted = self._bad_until - self.since
        is_undone = can_be_undone(lasted, self._looks, step - good, self.range.steps_to_learn)
        if self.cause == "data" and not is_undone:
            return self._leave_open(step, verdict)
        lasts = newest.cause == "weights" or newest.is_uneasy
        before = self._damage_since
        wait, left = 1 + further, _LEFT
        if self.cause == "data":
            wait, left = max(_HEALS_WITHIN, lasted // 2), _LEFT_OF_DATA
        is_plain = is_plain and self.cause is None and further == 0
        if self.cause is None and not self._is_again:
            gains, least = self.pairs.gains_by_step(good), margin_of(verdict.kept, self.range.usual)
            is_plain |= costs_more_than_steps(gains, least=least, age=step - good)
        if is_plain or (
            before is not None and step >= before[0] + wait and lasts and gain >= left * before[1]
        ):
            self.next_look, self._damage_since = step + 1, None
            return Ruling("act", "data" if self.cause == "data" else "weights", good, verdict)
        if before is not None and gain < left * before[1] and self._is_again:
            self._damage_since = before = (before[0], gain)  # losses under a fault go up and down
        elif before is not None and gain < left * before[1]:
            self._healing.note_healed(step)
            lasts = False
        if before is None or not lasts:
            self._damage_since = before = (step, min(gain, _HUGE))
        self.next_look = max(step + 1, before[0] + wait) if self.cause == "data" else step + 1
        return Ruling("none", "weights", good, verdict)

    def _later(self, step: int, cause: Cause, verdict: Verdict) -> Ruling:
        """Look again when the data have had time to change; after the last look they are the usual ones."""
        if cause == "data" and self.cause is None:
            # Close to a fault of the weights it is an incident of its own.
            self.cause, self.since = "data", step if self.last_restore >= 0 else self.since
            self._looks, self.restores, self.last_restore = 0, 0, -1
        self._bad_until = step
        self._left_out.clear()
        self.pairs.clear()
        level, present = self.range.usual.level, verdict.numbers.get("present_loss", math.nan)
        self._until = 0.5 * (level + present) if cause == "data" and present > level else None
        self._excess = max(self._excess, present - level) if math.isfinite(present) else _HUGE
        wait = steps_to_next_look(self._looks, after_rollback=self._is_again)
        has_learnt = self._looks >= 2 and not self._is_again and is_learnt(self._losses, self.range.usual)
        if wait is None or has_learnt:
            self.take_as_usual(step)
        else:
            self.next_look = step + wait
            self._looks += 1
        return Ruling("dismiss", cause, 0, verdict)

    def overrule(self, step: int, ruling: Ruling) -> Ruling:
        """Return what follows instead where the present weights have learnt what the kept ones do not know."""
        verdict = ruling.verdict or Verdict("data")
        if self.cause == "data" or self.is_slow:
            return self._leave_open(step, verdict)
        return self._later(step, "data", verdict)

    def _leave_open(self, step: int, verdict: Verdict) -> Ruling:
        """Let training go on where the data between may have been bad or new: only an evaluation set knows."""
        self.take_as_usual(step)
        self.open_question_at = step
        return Ruling("dismiss", "data", 0, verdict)

    def take_as_usual(self, step: int) -> None:
        """Make the present losses the usual ones."""
        self.range.accept(list(self._losses))
        self.new_data_until = step
        self.close()

    def _calm(self, step: int, verdict: Verdict) -> Ruling:
        """The loss is in its range: look again after a rollback, else close the incident."""
        if self.last_restore < 0 and self.cause is None:
            self._healing.note_harmless(step, self.pairs.gains())
            self.range.extend(self._left_out)
        self._left_out.clear()
        self.pairs.clear()
        wait = steps_to_next_look(self._looks, after_rollback=True)
        if self.cause == "data" and is_new(verdict.kept, self.range.usual):
            # The present weights have learnt what the kept ones do not know.
            self.take_as_usual(step)
        elif self.last_restore >= 0 and wait is not None:
            self.next_look = step + wait
            self._looks += 1
        else:
            self.close()
        return Ruling("dismiss", "data" if self.cause == "data" else "unknown", 0, verdict)

    def has_restored(self, step: int, before_data: int | None = None) -> None:
        """Note a rollback at ``step``, to a state from before bad data or another; look whether the fault has passed."""
        if before_data is not None and before_data <= self.new_data_until:
            self.new_data_until = -1
            self.range.take_back()
        if not self.is_open:
            self._open(step)
        self.restores += 1
        self.last_restore, self._looks, self.cause, self._damage_since = step, 1, None, None
        self.is_slow, self._until, self._excess = False, None, 0.0
        self.pairs.clear()
        self._losses.clear()
        self._left_out = []
        self.next_look = step + steps_after_restores(self.restores)
