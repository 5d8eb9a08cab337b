"""Named moments of a save, a deletion, a rollback or a resume, at which a test can interrupt the process.

They are audit events of the interpreter (``sys.audit``), which cost next to nothing while
nothing listens.

The moments of storage, in the order of a save: ``sidecar written``, ``checkpoint flushed``,
``manifest written``, ``old checkpoint moved aside``, ``checkpoint published``, ``old checkpoint
removed``. Of a deletion: ``deletion renamed``, ``checkpoint deleted``. Of a mark: ``note written``
(after each of two files), then ``checkpoint quarantined``, ``checkpoint marked as suspect`` or
``suspect cleared``. Of a reduction to the weights: ``manifest reduced``. Of a start: ``unfinished
checkpoint removed``, ``old checkpoint restored``. Of the events: ``events written``. Of a save,
in ``hf``: ``save begun``, ``host wrote``, ``sealed``. Of a rollback:
``rollback decided``, ``weights restored``, ``rollback recorded``.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator

__all__ = ["failpoint", "watch_failpoints"]

_EVENT = "hf_divguard.failpoint"

failpoint = functools.partial(sys.audit, _EVENT)
"""Mark a moment: ``failpoint("manifest written")``. The name says what has just happened."""

_listeners: list[Callable[[str], None]] = []
_is_hooked = False


def _hook(event: str, details: tuple[object, ...]) -> None:
    if event == _EVENT:
        for listener in list(_listeners):
            listener(str(details[0]))


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
    global _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hook)
        _is_hooked = True
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
