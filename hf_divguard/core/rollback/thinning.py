"""Which of a few states in memory makes room for a new one."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["next_to_drop"]


def next_to_drop(steps: Sequence[int], reach: int, delay: int = 1) -> int:
    """Return the step whose state makes room, so that one stays that is ``reach`` steps old but not much older.

    A fault is found some steps after it began. If only the newest states stayed, all of them
    could be from after that. The oldest goes once the next is old enough to take its place.

    Until then, where losses are seen at each step, the third newest goes, so that the last two
    always stay. Where four stay, one of them is at least ``reach`` steps old and at most twice
    that and two intervals.

    Where losses are seen some steps later, the last two may both be from after the fault. Then
    that state between the oldest and the newest goes which leaves the smallest gap for its age:
    the gaps grow with the age.

    Args:
        steps: Steps of the states, oldest first; at least three.
        reach: How old one state should be.
        delay: Steps until a loss is seen.

    Example:
        >>> def kept_of(delay):
        ...     kept = []
        ...     for step in range(2, 202, 2):
        ...         kept.append(step)
        ...         if len(kept) > 4:
        ...             kept.remove(next_to_drop(kept, reach=40, delay=delay))
        ...     return kept
        >>> kept_of(delay=1)
        [148, 184, 198, 200]
        >>> kept_of(delay=10)
        [156, 178, 194, 200]
    """
    newest = steps[-1]
    if newest - steps[1] >= reach:
        return steps[0]
    if delay <= 1:
        return steps[-3]
    between = zip(steps, steps[1:], steps[2:], strict=False)
    return min(between, key=lambda three: (three[2] - three[0]) / (newest - three[1] + delay))[1]
