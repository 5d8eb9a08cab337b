"""When kept and present weights are compared again within an incident."""

from __future__ import annotations

__all__ = ["steps_after_restores", "steps_to_next_look"]

# Steps between two looks while new data last.
_AT_DATA = (3, 5, 10, 20, 40)
# Steps between two looks after a rollback.
_AFTER = (1, 2, 4, 8, 8)
# Steps after a rollback until the next one; a fault that lasts is undone again and again, ever less often.
_RESTORES = (1, 1, 1, 1, 2, 2, 4, 4, 8)


def steps_to_next_look(looks: int, *, after_rollback: bool) -> int | None:
    """Return the steps until the next look; ``None`` if there was the last one.

    Args:
        looks: Number of looks so far.
        after_rollback: Whether the question is whether a fault has passed, and not whether the data have.

    Example:
        >>> steps_to_next_look(0, after_rollback=False), steps_to_next_look(5, after_rollback=True)
        (3, None)
    """
    steps = _AFTER if after_rollback else _AT_DATA
    return steps[looks] if looks < len(steps) else None


def steps_after_restores(restores: int) -> int:
    """Return the steps until a look may lead to another rollback, after so many rollbacks of one incident.

    Example:
        >>> [steps_after_restores(restores) for restores in (1, 5, 20)]
        [1, 2, 8]
    """
    return _RESTORES[min(restores, len(_RESTORES)) - 1]
