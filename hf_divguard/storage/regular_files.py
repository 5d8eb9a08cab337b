"""Opening, listing and flushing regular files. Links to files are read through; nothing else is opened."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from pathlib import Path

from hf_divguard.storage.names import TEMPORARY_PREFIX

__all__ = [
    "LimitExceeded",
    "error_words",
    "flush_folder",
    "flush_tree",
    "is_unreadable",
    "kind_in_words",
    "list_files",
    "named_file",
    "open_regular_file",
    "read_bytes",
]

# Non-blocking, so that a FIFO of an expected name is refused instead of waited for.
_OPEN_FLAGS = (
    os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)
_MOST_LEVELS = 40
# What these say of a path is certain. Any other error (EIO, EACCES, EPERM, ESTALE, ETIMEDOUT...) may pass.
_CERTAIN = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.EMLINK,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.ENXIO,
    }
)
# Files of one rank: the Trainer's random states, DeepSpeed's and torch.distributed.checkpoint's shards.
_RANK_FILES = (
    (re.compile(r"rng_state_([0-9]{1,6})\.pth"), "random state"),
    (re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]{1,6})_.*\.pt"), "shard"),
    (re.compile(r"__([0-9]{1,6})_[0-9]+\.distcp"), "shard"),
)


class LimitExceeded(ValueError):
    """Something is larger than what is read; it is not known whether it is damaged."""


def is_unreadable(error: OSError) -> bool:
    """Return whether ``error`` leaves open what stands at its path, as an input/output error does.

    Example:
        >>> is_unreadable(OSError(errno.EIO, "")), is_unreadable(FileNotFoundError(errno.ENOENT, ""))
        (True, False)
    """
    return error.errno not in _CERTAIN


def error_words(error: Exception) -> str:
    """Return what the system says of ``error``, without the path."""
    return str(getattr(error, "strerror", None) or error)


def open_regular_file(path: str | os.PathLike[str]) -> int:
    """Open the regular file at ``path``, or the one that it links to, and return its descriptor.

    Raises:
        ValueError: If it is a folder, a FIFO or a device.
        OSError: If it is missing or cannot be opened.
    """
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise ValueError(_not_regular(path, "a socket or device")) from None
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(_not_regular(path, kind_in_words(mode)))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _not_regular(path: str | os.PathLike[str], found: str) -> str:
    return f"{os.fspath(path)!r} must be a regular file, found {found}. Remove it."


def read_bytes(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """Return the contents of the regular file at ``path``, at most ``max_bytes`` of them.

    Raises:
        LimitExceeded: If it is larger.
        ValueError: If it is not a regular file.
        OSError: If it is missing or cannot be read.
    """
    descriptor = open_regular_file(path)
    try:
        size = os.fstat(descriptor).st_size
        if size <= max_bytes:
            data = os.read(descriptor, size + 1)
            # The system may give less than was asked for, and the file may grow meanwhile.
            while len(data) != size and len(data) <= max_bytes and (more := os.read(descriptor, max_bytes)):
                data += more
            if len(data) <= max_bytes:
                return data
    finally:
        os.close(descriptor)
    raise LimitExceeded(f"{os.fspath(path)!r} must have at most {max_bytes} bytes to be read, found more.")


def kind_in_words(mode: int) -> str:
    """Return what ``st_mode`` stands for.

    Example:
        >>> kind_in_words(stat.S_IFIFO)
        'a FIFO'
    """
    for test, words in (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISFIFO, "a FIFO"),
    ):
        if test(mode):
            return words
    return "a socket or device"


def named_file(name: str) -> str:
    """Return the name of a file for a message, with its rank if it belongs to one.

    Example:
        >>> named_file("rng_state_1.pth"), named_file("two\\nlines")
        ('`rng_state_1.pth` (random state of rank 1)', "'two\\\\nlines'")
    """
    for pattern, what in _RANK_FILES:
        if (match := pattern.fullmatch(name.rpartition("/")[2])) is not None:
            return f"`{name}` ({what} of rank {int(match[1])})"
    return f"`{name}`" if name.isprintable() else ascii(name)


def list_files(folder: str | os.PathLike[str], *, limit: int) -> tuple[dict[str, int], dict[str, str]]:
    """List what stands in ``folder`` and its sub-folders, by POSIX path relative to it.

    A link to a regular file counts as that file. Links to folders are not entered. Our own
    unfinished temporary files are left out.

    Args:
        folder: The folder to list.
        limit: Largest number of entries that will be listed.

    Returns:
        The size in bytes of each file, and what each other thing that is not a folder is, in words.

    Raises:
        LimitExceeded: If there are more than ``limit`` entries, or more than 40 levels of folders.
        OSError: If a folder cannot be read.
    """
    sizes: dict[str, int] = {}
    others: dict[str, str] = {}
    entries_seen = 0
    waiting = [("", os.fspath(folder), 1)]
    while waiting:
        prefix, current, level = waiting.pop()
        if level > _MOST_LEVELS:
            raise LimitExceeded(f"{os.fspath(folder)!r} must have at most {_MOST_LEVELS} levels of folders.")
        with os.scandir(current) as entries:
            for entry in entries:
                entries_seen += 1
                if entries_seen > limit:
                    raise LimitExceeded(
                        f"{os.fspath(folder)!r} must hold at most {limit} entries to be judged, found more."
                    )
                name = prefix + entry.name
                # `DirEntry.stat` carries no size on Windows network drives; `lstat` always does.
                status = entry.stat(follow_symlinks=False) if os.name == "posix" else os.lstat(entry.path)
                if stat.S_ISDIR(status.st_mode):
                    waiting.append((name + "/", entry.path, level + 1))
                elif not entry.name.startswith(TEMPORARY_PREFIX):
                    size, kind = _size_or_kind(entry.path, status)
                    if kind is None:
                        sizes[name] = size
                    else:
                        others[name] = kind
    return dict(sorted(sizes.items())), dict(sorted(others.items()))


def _size_or_kind(path: str, status: os.stat_result) -> tuple[int, str | None]:
    """Return the size of a file and no kind, or what else it is; a link is what it leads to."""
    link = ""
    if stat.S_ISLNK(status.st_mode):
        link = "a symbolic link to "
        try:
            status = os.stat(path)
        except OSError as error:
            if is_unreadable(error):
                raise
            return 0, "a symbolic link that leads nowhere"
    if stat.S_ISREG(status.st_mode):
        return status.st_size, None
    return 0, link + kind_in_words(status.st_mode)


def flush_folder(folder: str | os.PathLike[str]) -> None:
    """Ask the system to put the names inside ``folder`` on the disk; do nothing where it cannot.

    Windows cannot open a folder, and some network file systems refuse to flush one. The
    renames are still atomic there; they only may be lost in a power failure.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_tree(folder: str | os.PathLike[str], *, limit: int = 1_000_000) -> None:
    """Put every regular file below ``folder``, and the names of all, on the disk.

    Raises:
        OSError: If a file cannot be opened or flushed. Folders are flushed as far as the
            system allows.
    """
    sizes, _ = list_files(folder, limit=limit)
    folders = {Path(folder)}
    for name in sizes:
        path = Path(folder, name)
        # Windows flushes only what is open for writing.
        descriptor = (
            os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
            if os.name == "nt"
            else open_regular_file(path)
        )
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        folders.update(parent for parent in path.parents if Path(folder) in parent.parents)
    for each in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        flush_folder(each)
