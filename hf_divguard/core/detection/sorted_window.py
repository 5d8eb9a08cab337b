"""The last few values of a series, with any quantile at hand."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

__all__ = ["SortedWindow", "median"]

# Up to so many changes it is faster to sort them in one by one.
_FEW_CHANGES = 8


def median(values: Iterable[float]) -> float:
    """Return the middle one of ``values`` in order; of an even number the mean of the middle two.

    Example:
        >>> median([3.0, 1.0, 90.0]), median([1.0, 2.0])
        (3.0, 1.5)
    """
    ordered = sorted(values)
    half, odd = divmod(len(ordered), 2)
    return ordered[half] if odd else 0.5 * ordered[half - 1] + 0.5 * ordered[half]


class SortedWindow(deque[float]):
    """The last few values in the order of their arrival, with any quantile at hand.

    Example:
        >>> window = SortedWindow()
        >>> for value in (5.0, 1.0, 9.0, 2.0):
        ...     window.push(value, size=3)
        >>> list(window), window.quantile(0.5)
        ([1.0, 9.0, 2.0], 2.0)
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        super().__init__(values)
        self._sorted = sorted(self)
        self._added: list[float] = []
        self._dropped: list[float] = []

    def push(self, value: float, size: int) -> None:
        """Add a value, then drop the oldest until ``size`` are left."""
        ordered = self.ordered if self._added else self._sorted
        self.append(value)
        insort(ordered, value)
        while len(ordered) > size:
            del ordered[bisect_left(ordered, self.popleft())]

    def push_unsorted(self, value: float, size: int) -> None:
        """Do the same where quantiles are seldom asked for: the next one puts the window in order."""
        self.append(value)
        added = self._added
        if len(added) > _FEW_CHANGES:  # too many to be sorted in one by one
            while len(self) > size:
                self.popleft()
            return
        added.append(value)
        while len(self) > size:
            self._dropped.append(self.popleft())

    @property
    def ordered(self) -> list[float]:
        """The values from the smallest to the largest."""
        if self._added:
            self._put_in_order()
        return self._sorted

    def _put_in_order(self) -> None:
        added, dropped = self._added, self._dropped
        if len(added) > _FEW_CHANGES:
            self._sorted = sorted(self)
        else:
            ordered = self._sorted
            for value in added:
                insort(ordered, value)
            for value in dropped:
                del ordered[bisect_left(ordered, value)]
        added.clear()
        dropped.clear()

    def quantile(self, share: float) -> float:
        """Return the value below which a ``share`` (under 1) of the window lies; 0 if it is empty."""
        ordered = self.ordered
        return ordered[int(share * len(ordered))] if ordered else 0.0
