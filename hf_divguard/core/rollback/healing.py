"""What went by itself in a run: how far healthy states differ, and how often damage was gone at the next look."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hf_divguard.core.state import Stateful, memory

__all__ = ["Healing", "costs_more_than_steps"]

# Differences of healthy states, from which the noise of a difference is known.
_DIFFERENCES = 24
# Steps after which they say nothing any more: the learning rate has changed.
_STEPS = 60
# Further looks for each time that damage was gone by itself, and how many such times count.
_LOOKS_PER_TIME = 2
_MOST_TIMES = 3
# Looks from which it can be said how fast damage heals.
_FEWEST = 8


@dataclass
class Healing(Stateful):
    """Remembers for some steps what recovered without help: it raises the bar for what looks alike.

    Example:
        >>> healing = Healing()
        >>> healing.note_harmless(10, [0.3, -0.1])
        >>> round(healing.noise(20), 2), healing.noise(90)
        (0.21, 0.0)
        >>> healing.note_healed(20)
        >>> healing.further_looks(21), healing.further_looks(90)
        (2, 0)
    """

    _harmless: deque[tuple[int, float]] = memory(lambda: deque(maxlen=_DIFFERENCES))
    _healed: deque[int] = memory(lambda: deque(maxlen=_MOST_TIMES))

    def note_harmless(self, step: int, gains: Sequence[float]) -> None:
        """Take the differences of healthy states: how much better older weights were."""
        # The present weights may be better by all that was learnt since: that is no noise.
        self._harmless += [(step, max(0.0, gain)) for gain in gains if math.isfinite(gain)]

    def noise(self, step: int) -> float:
        """Return the noise of a difference between healthy states, as far as it is known."""
        squares = [gain * gain for at, gain in self._harmless if at >= step - _STEPS]
        return math.sqrt(sum(squares) / len(squares)) if squares else 0.0

    def note_healed(self, step: int) -> None:
        """Take that damage of the look before is gone, or much less, at ``step``."""
        self._healed.append(step)

    def further_looks(self, step: int) -> int:
        """Return how many looks more than usual damage has to last."""
        return _LOOKS_PER_TIME * sum(at >= step - _STEPS for at in self._healed)


def costs_more_than_steps(gains: Sequence[tuple[int, float]], *, least: float, age: int) -> bool:
    """Return whether damage heals so slowly that going back costs fewer steps than waiting.

    The mean of the later half of the differences, beside that of the earlier half, says how fast they shrink, and so
    in how many steps they will be small. Single differences go up and down too much for that. Weights that did well on
    any of the batches in between are not damaged for good: their loss jumps up and down.

    Args:
        gains: By how much kept weights did better, with the step of each look, oldest first.
        least: Difference that counts as none.
        age: Age in steps of the kept weights: so much training a rollback loses.

    Example:
        >>> slow, fast = [0.8, 0.9, 0.7, 0.8, 0.7, 0.5, 0.6, 0.6], [1.6, 0.8, 0.5, 0.4, 0.3, 0.1, 0.2, 0.1]
        >>> [costs_more_than_steps(list(enumerate(each)), least=0.15, age=10) for each in (slow, fast)]
        [True, False]
    """
    if len(gains) < _FEWEST or not all(gain > 0.0 for _, gain in gains):
        return False
    half, over = len(gains) // 2, gains[-1][0] + 1 - gains[0][0]
    earlier = sum(gain for _, gain in gains[:half]) / half
    later = sum(gain for _, gain in gains[-half:]) / half
    if not least < later < math.inf:
        return later == math.inf
    rate = math.log(earlier / later) / (0.5 * over) if earlier > later else 0.0
    return math.log(later / least) > rate * age
