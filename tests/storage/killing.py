"""Killing an operation before each of its system calls, one after the other."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

CHANGING_CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "utime", "open")


def killed_before_call(number: int, operation: Callable[[], object], *, renames: bool = True) -> bool:
    """Run ``operation`` in a process of its own that kills itself before its call ``number``.

    Args:
        number: Which of the calls that change the disk, from 0.
        operation: What to run.
        renames: Whether the file system can rename folders.

    Returns:
        Whether it was killed; ``False`` if it ended before that call.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            _count_calls(number, renames)
            operation()
        except BaseException:
            os._exit(3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the operation raised"
    return False


def _count_calls(number: int, renames: bool) -> None:
    seen = 0

    def counting(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
            if name == "rename" and not renames and os.path.isdir(arguments[0]):
                raise OSError(18, "Invalid cross-device link")
            return real(*arguments, **options)

        return call

    for name in CHANGING_CALLS:
        setattr(os, name, counting(getattr(os, name), name))
