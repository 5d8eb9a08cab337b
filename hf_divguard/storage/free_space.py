"""How much room there is on a disk, and how much a folder takes."""

from __future__ import annotations

import errno
import os
import shutil

from hf_divguard.storage.regular_files import LimitExceeded, list_files

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
    place = os.path.abspath(path)
    while True:
        try:
            return shutil.disk_usage(place).free
        except (FileNotFoundError, NotADirectoryError):
            if place == os.path.dirname(place):
                raise FileNotFoundError(errno.ENOENT, "No folder above it exists", os.fspath(path)) from None
            place = os.path.dirname(place)


def tree_bytes(path: str | os.PathLike[str]) -> int:
    """Return the size in bytes of all files in the folder ``path`` and below, 0 if it cannot be listed.

    Example:
        >>> tree_bytes("no-such-folder")
        0
    """
    try:
        return sum(list_files(path, limit=1_000_000)[0].values())
    except (OSError, LimitExceeded):
        return 0


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
