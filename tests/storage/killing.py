"""Killing an operation before each of its system calls, one after the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from tests.processes import fork, kill_self, wait_for

CHANGING_CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "utime", "open")


def killed_before_call(number: int, operation: Callable[[], object], *, renames: bool = True) -> bool:
    """Run ``operation`` in a fork that kills itself before its call ``number``.

    Args:
        number: Which of the calls that change the disk, from 0.
        operation: What to run.
        renames: Whether the file system can rename folders.

    Returns:
        Whether it was killed; ``False`` if it ended before that call.
    """

    def work() -> None:
        _count_calls(number, renames)
        operation()

    code = wait_for(fork(work))
    assert code in (0, -signal.SIGKILL), "the operation raised"
    return code != 0


def _count_calls(number: int, renames: bool) -> None:
    seen = 0

    def counting(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            if seen == number:
                kill_self()
            seen += 1
            if name == "rename" and not renames and os.path.isdir(arguments[0]):
                raise OSError(18, "Invalid cross-device link")
            return real(*arguments, **options)

        return call

    for name in CHANGING_CALLS:
        setattr(os, name, counting(getattr(os, name), name))
