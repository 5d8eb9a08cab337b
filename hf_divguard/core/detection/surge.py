"""Values in a row far above everything seen before: the larger they are, the fewer are needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_divguard.core.state import Stateful, memory

__all__ = ["FALL", "FALL_OF_MEANS", "SURGE", "Surge"]

# docs/detectors.md gives the source of each number.
SURGE = 10.0
FALL = 0.9
FALL_OF_MEANS = 0.5


@dataclass
class Surge(Stateful):
    """Count values in a row that lie beyond the reach of a series, each the more the higher it lies.

    A value at ``h`` times the reach counts as ``1 + log2(h)`` values. Where a large gradient
    pulls the loss back it counts as ``1 + log10(h)``: the next steps may undo a bad batch.

    Example:
        >>> surge = Surge()
        >>> for height in (30.0, 40.0):
        ...     surge.add(height, reach=3.0, least=1.0, is_pulled=False)
        >>> round(surge.score, 1), surge.is_over(8.0, reach=3.0)
        (9.1, True)
        >>> surge.add(1.0, reach=3.0, least=1.0, is_pulled=False)
        >>> surge.score, surge.highest
        (0.0, 40.0)
    """

    score: float = memory(0.0)
    highest: float = memory(0.0)
    length: int = memory(0)
    last: float = memory(0.0)
    _first: float = memory(0.0)
    _peak: float = memory(0.0)

    def add(self, height: float, *, reach: float, least: float, is_pulled: bool) -> None:
        """Take the next value.

        Args:
            height: Its distance above the baseline.
            reach: Distance beyond which it counts at all.
            least: For how many values it counts at least.
            is_pulled: Whether the gradient is large.
        """
        if height <= reach:
            # What came back once may come again: the reach grows by it, see `highest`.
            self.highest = max(self.highest, self._peak)
            self.clear()
            return
        logarithm = math.log10 if is_pulled else math.log2
        self.score += max(least, 1.0 + logarithm(height / reach))
        self._first = height if self.length == 0 else self._first
        self._peak, self.last, self.length = max(self._peak, height), height, self.length + 1

    def clear(self) -> None:
        """Forget the values in a row; keep the highest that came back."""
        self.score, self.length, self.last, self._first, self._peak = 0.0, 0, 0.0, 0.0, 0.0

    def is_over(self, score: float, reach: float, fall: float = FALL) -> bool:
        """Return whether the evidence is that of ``score`` values and not on its way back.

        A single value is enough only at a thousand times the reach.

        Args:
            score: How many values are enough.
            reach: Distance beyond which a value counts.
            fall: Part of the first value below which the last one is on its way back.
        """
        if self.length < 2:
            return self.length == 1 and self.score >= score and self.last >= SURGE**3 * reach
        return self.score >= score and self.last > fall * self._first
