"""Which kept states may be gone back to: those from before an incident, and not from just after a rollback."""

from __future__ import annotations

__all__ = ["is_sound", "is_trusted"]

# A state may have been kept in the step before the first one that is out of the range.
_DELAY = 2
# Steps in which a damaged optimizer shows in the loss.
_SHOWS_IN = 10


def is_sound(kept_step: int, since: int) -> bool:
    """Return whether a state was kept before anything was out of the range.

    Example:
        >>> is_sound(58, since=60), is_sound(59, since=60)
        (True, False)
    """
    return kept_step <= since - _DELAY


def is_trusted(kept_step: int, last_restore: int, step: int) -> bool:
    """Return whether the optimizer of a state is sound as well, as far as that can be known.

    A fault that lasts beyond a rollback may damage the optimizer alone. The loss of a state that
    was kept then is a good one, and rises some steps later.

    Args:
        kept_step: Step of the state.
        last_restore: Step of the last rollback of the incident; -1 if there was none.
        step: Present step.

    Example:
        >>> is_trusted(50, 52, 60), is_trusted(55, 52, 60), is_trusted(55, 52, 70), is_trusted(55, -1, 60)
        (True, False, True, True)
    """
    return last_restore < 0 or kept_step <= last_restore or step - kept_step >= _SHOWS_IN
