"""How much room there is on a disk, and how much a folder takes."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

__all__ = ["free_bytes", "require_free_space", "tree_bytes"]


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Return how many bytes this user may still write on the disk of ``path``.

    Args:
        path: A file or folder; the nearest folder above it that exists decides.

    Raises:
        OSError: If the file system does not say.

    Example:
        >>> free_bytes(".") > 0
        True
    """
    for place in (Path(os.path.abspath(path)), *Path(os.path.abspath(path)).parents):
        try:
            return shutil.disk_usage(place).free
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise FileNotFoundError(errno.ENOENT, "No folder above it exists", os.fspath(path))


def tree_bytes(path: str | os.PathLike[str]) -> int:
    """Return the size in bytes of all regular files in the folder ``path`` and below.

    Symbolic links are not followed. What vanishes or cannot be read meanwhile counts nothing.

    Example:
        >>> tree_bytes("no-such-folder")
        0
    """
    total = 0
    waiting = [os.fspath(path)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except OSError:
                        continue
                    if stat.S_ISDIR(status.st_mode):
                        waiting.append(entry.path)
                    elif stat.S_ISREG(status.st_mode):
                        total += status.st_size
        except OSError:
            continue
    return total


def require_free_space(path: str | os.PathLike[str], needed_bytes: int) -> None:
    """Raise if the disk of ``path`` has less room than ``needed_bytes``.

    Nothing is reserved: other programs may take the room before it is used.

    Args:
        path: Where will be written.
        needed_bytes: How much. Zero or less is always there.

    Raises:
        OSError: With ``errno.ENOSPC``, if there is less. The sentence names both numbers.

    Example:
        >>> require_free_space(".", 10**18)
        Traceback (most recent call last):
        ...
        OSError: [Errno 28] 1000000000.0 GB must be free to write here, found ... GB. ...: '.'
    """
    if needed_bytes <= 0:
        return
    try:
        free = free_bytes(path)
    except OSError:
        # A file system that does not know its room is no reason to stop a save.
        return
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{_in_words(needed_bytes)} must be free to write here, found {_in_words(free)}. "
            "Make room or keep fewer checkpoints",
            os.fspath(path),
        )


def _in_words(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"
