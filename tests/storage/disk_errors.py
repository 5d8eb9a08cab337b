"""A disk that answers with an error for some paths, put in under ``os.open``, ``os.stat`` and ``os.scandir``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PASSING = ("EIO", "EACCES", "EPERM", "ESTALE", "ETIMEDOUT")


@contextmanager
def disk_error(
    code: int, part: str, calls: tuple[str, ...] = ("open",), *, times: int = -1
) -> Iterator[list[str]]:
    """Let ``calls`` of ``os`` fail with ``code`` for paths that contain ``part``.

    Args:
        code: The error number.
        part: Part of the path.
        calls: Names of functions of ``os``.
        times: How many calls fail; all of them below 0.

    Yields:
        The paths that failed.
    """
    failed: list[str] = []

    def failing(real: Any) -> Any:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            is_path = isinstance(path, (str, os.PathLike))
            if is_path and part in os.fspath(path) and (times < 0 or len(failed) < times):
                failed.append(os.fspath(path))
                raise OSError(code, os.strerror(code), os.fspath(path))
            return real(path, *arguments, **options)

        return call

    real = {name: getattr(os, name) for name in calls}
    try:
        for name, function in real.items():
            setattr(os, name, failing(function))
        yield failed
    finally:
        for name, function in real.items():
            setattr(os, name, function)


__all__ = ["PASSING", "disk_error"]
