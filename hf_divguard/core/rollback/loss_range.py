"""The usual range of the losses of a run, and which steps are out of it."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hf_divguard.core.detection.sorted_window import median
from hf_divguard.core.state import Stateful, memory

__all__ = ["LEARNT", "LossRange", "Usual"]

_WINDOW = 60
_LEVEL = 9
_SPREAD = 30
_FIRST = 5
_FEWEST = 12
_TRIGGER_ONCE = 5.0
_TRIGGER_TWICE = 3.0
_NORM_FACTOR = 10.0
# A loss that begins below this part of its largest value begins at 0.
_ZERO = 0.05
# A rise too small for a single loss to show: so many losses in a row against at least so many before them.
_RECENT = (8, 16)
_BEFORE = 12
# Standard errors of the difference of the two, and the part of the loss, from which it calls for a look.
_SLOW_ERRORS = 3.0
_SLOW_SHARE = 0.02
_LAST_ERRORS = 1.5
# Steps until the next such look: the level has to settle first.
_QUIET = 20
LEARNT = 0.9
"""A run that has learnt something has a loss below this part of the first one."""


@dataclass(frozen=True, slots=True)
class Usual:
    """The usual loss of a run.

    Args:
        level: Its middle.
        spread: Its noise.
        first: The loss of the beginning.
    """

    level: float
    spread: float
    first: float


@dataclass
class LossRange(Stateful):
    """The usual range of raw losses and gradient norms; says when a step is out of it.

    A step out of the range starts a look and nothing more, so the bounds may be narrow: a
    loss five spreads above the median of the last nine, or two in a row three spreads above,
    or a gradient norm ten times its median. What is out of the range does not enter it.
    A rise that is smaller than the noise of single losses shows in the mean of the last eight, or sixteen.
    """

    _first: list[float] = memory(list)
    _losses: deque[float] = memory(lambda: deque(maxlen=_WINDOW))
    _norms: deque[float] = memory(lambda: deque(maxlen=_WINDOW))
    _above: int = memory(0)
    _was_negative: bool = memory(False)
    _was_known: bool = memory(False)
    _quiet: int = memory(0)
    _steps: int = memory(0)
    _before: list[float] = memory(list)
    _steps_to_learn: int | None = memory(None)

    @property
    def is_known(self) -> bool:
        """Whether there were enough losses to know the range."""
        return self._was_known or len(self._losses) >= _FEWEST

    @property
    def is_objective(self) -> bool:
        """Whether the level of the loss measures progress: not where it is negative or began at 0.

        So do policy gradients, whose loss is about 0 and may grow with a distance to a reference.
        """
        if self._was_negative or not self._first:
            return False
        return min(self._first) > _ZERO * max(map(abs, (*self._losses, *self._first)))

    @property
    def usual(self) -> Usual:
        """The range as it is now."""
        losses = list(self._losses)
        return Usual(median(losses[-_LEVEL:]), self._spread(), median(self._first))

    @property
    def earlier(self) -> float:
        """The level some fifty steps ago; infinity where so many losses are not known."""
        losses = list(self._losses)
        return median(losses[:_LEVEL]) if len(losses) >= _WINDOW // 2 else math.inf

    @property
    def steps_to_learn(self) -> float:
        """Steps that the run took to learn something, from its start; infinity if it has not."""
        return math.inf if self._steps_to_learn is None else self._steps_to_learn

    def _spread(self) -> float:
        """Return the noise of a loss, without the trend: from the differences of neighbours."""
        losses = list(self._losses)[-_SPREAD:]
        steps = [abs(later - sooner) for sooner, later in itertools.pairwise(losses)]
        return 1.05 * median(steps) if steps else 0.0

    def observe(self, loss: float, grad_norm: float | None, *, learns: bool = True) -> bool:
        """Take a step; return whether it calls for a look.

        Args:
            loss: Its loss.
            grad_norm: Its gradient norm, or ``None``.
            learns: Whether it may enter the range.
        """
        if not math.isfinite(loss):
            return True
        self._was_negative |= loss < 0.0
        if len(self._first) < _FIRST:
            self._first.append(loss)
        is_out = False
        if self.is_known:
            self._above = self._above + 1 if self.is_above(loss) else 0
            is_out = self.is_above(loss, _TRIGGER_ONCE) or self._above >= 2
        if not is_out and learns:
            self._losses.append(loss)
        self._steps += 1
        if self._steps_to_learn is None and self._steps > _FIRST:
            last = list(self._losses)[-_FIRST:]
            if median(last) < LEARNT * median(self._first):
                self._steps_to_learn = self._steps
        self._quiet = max(0, self._quiet - 1)
        return self._norm_is_large(grad_norm) or is_out

    def is_above(self, loss: float, spreads: float = _TRIGGER_TWICE) -> bool:
        """Return whether a loss lies above the usual range; one in a thousand healthy ones does by chance.

        Args:
            loss: The loss of a step.
            spreads: Spreads above the usual level from which it does.
        """
        usual = self.usual
        # A spread of 0, as of a loss that repeats itself, makes nothing suspicious.
        return not loss <= usual.level + spreads * max(usual.spread, 0.01 * abs(usual.level))

    def take_slow_rise(self, *, is_last: bool = False) -> list[float]:
        """Return the last losses if they lie above those before as a whole, and take them out of the range.

        Args:
            is_last: Whether training ends here: less has to speak for it then.
        """
        if self._quiet > 0 and not is_last:
            return []
        errors = _LAST_ERRORS if is_last else _SLOW_ERRORS
        count = next((count for count in _RECENT if self._has_risen(count, errors)), 0)
        if count:
            self._quiet = _QUIET
        return [self._losses.pop() for _ in range(count)][::-1]

    def _has_risen(self, count: int, errors: float) -> bool:
        losses = list(self._losses)
        before, recent = losses[:-count], losses[-count:]
        if len(before) < _BEFORE:
            return False
        level = sum(before) / len(before)
        error = self._spread() * math.hypot(count**-0.5, len(before) ** -0.5)
        return sum(recent) / count - level > max(errors * error, _SLOW_SHARE * abs(level))

    def _norm_is_large(self, norm: float | None) -> bool:
        if norm is None or not math.isfinite(norm):
            return False
        is_large = len(self._norms) >= _FEWEST and norm > _NORM_FACTOR * median(self._norms)
        if not is_large:
            self._norms.append(norm)
        return is_large

    def extend(self, losses: Sequence[float]) -> None:
        """Take losses into the range that were out of it and have proved harmless."""
        self._losses.extend(losses)

    def accept(self, losses: Sequence[float]) -> None:
        """Make what the data give now the usual range."""
        if len(losses) >= 2:
            self._was_known = self.is_known
            self._before = list(self._losses)
            self._losses.clear()
            self._losses.extend(losses)
        self._above = 0

    def take_back(self) -> None:
        """Make the range what it was before the last ``accept``."""
        if self._before:
            self._losses.clear()
            self._losses.extend(self._before)
        self._above, self._before = 0, []
