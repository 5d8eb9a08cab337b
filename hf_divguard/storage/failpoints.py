"""Named moments of a save, a deletion, a rollback or a resume, at which a test can interrupt the process.

The moments of storage, in the order of a save: ``sidecar written``, ``checkpoint flushed``,
``manifest written``, ``old checkpoint moved aside``, ``checkpoint published``, ``old checkpoint
removed``. Of a deletion: ``deletion renamed``, ``checkpoint deleted``. Of a mark: ``note written``
(after each of two files), then ``checkpoint quarantined``, ``checkpoint marked as suspect`` or
``suspect cleared``. Of a start: ``unfinished checkpoint removed``, ``old checkpoint restored``. Of the
events: ``events written``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["failpoint", "watch_failpoints"]

_listener: Callable[[str], None] | None = None


def failpoint(name: str) -> None:
    """Mark the moment ``name``. Does nothing unless something watches.

    Args:
        name: What has just happened, for example ``"manifest written"``.
    """
    if _listener is not None:
        _listener(name)


@contextlib.contextmanager
def watch_failpoints(listener: Callable[[str], None]) -> Iterator[None]:
    """Call ``listener`` with the name of each moment, inside a ``with`` block.

    Args:
        listener: Called with each name. It may raise, or kill the process.

    Example:
        >>> seen = []
        >>> with watch_failpoints(seen.append):
        ...     failpoint("manifest written")
        >>> failpoint("checkpoint published")
        >>> seen
        ['manifest written']
    """
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
