"""Which of a few states in memory makes room for a new one."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["next_to_drop"]


def next_to_drop(steps: Sequence[int], reach: int) -> int:
    """Return the step whose state makes room, so that one stays that is ``reach`` steps old but not much older.

    A fault is found some steps after it began. If only the newest states stayed, all of them
    could be from after that. The oldest goes once the next is old enough to take its place;
    until then the third newest goes, so that the last two always stay. Where four stay, one of
    them is at least ``reach`` steps old and at most twice that and two intervals.

    Args:
        steps: Steps of the states, oldest first; at least three.
        reach: How old one state should be.

    Example:
        >>> kept = []
        >>> for step in range(2, 202, 2):
        ...     kept.append(step)
        ...     if len(kept) > 4:
        ...         kept.remove(next_to_drop(kept, reach=40))
        >>> kept
        [148, 184, 198, 200]
    """
    return steps[0] if steps[-1] - steps[1] >= reach else steps[-3]
