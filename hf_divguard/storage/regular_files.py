"""Opening, listing, hashing and flushing regular files, without following symbolic links."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
from pathlib import Path

from hf_divguard.storage.names import TEMPORARY_PREFIX

__all__ = [
    "file_sha256",
    "flush_folder",
    "flush_tree",
    "kind_in_words",
    "list_files",
    "named_file",
    "open_regular_file",
]

# Non-blocking, so that a FIFO of an expected name is refused instead of waited for.
_OPEN_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_BLOCK_BYTES = 1 << 20
# Files of one rank: the Trainer's random states, DeepSpeed's and torch.distributed.checkpoint's shards.
_RANK_FILES = (
    (re.compile(r"rng_state_([0-9]{1,6})\.pth"), "random state"),
    (re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]{1,6})_.*\.pt"), "shard"),
    (re.compile(r"__([0-9]{1,6})_[0-9]+\.distcp"), "shard"),
)


def open_regular_file(path: str | os.PathLike[str]) -> int:
    """Open the regular file at ``path`` for reading and return its descriptor.

    Raises:
        ValueError: If ``path`` is a symbolic link, a folder, a FIFO or a device.
        OSError: If it is missing or cannot be opened.
    """
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK) or os.path.islink(path):
            raise ValueError(_not_regular(path, "a symbolic link")) from None
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

    Our own unfinished temporary files are left out. Symbolic links are listed among the
    others and never followed.

    Args:
        folder: The folder to list.
        limit: Largest number of entries that will be listed.

    Returns:
        The size in bytes of each regular file, and what each other thing that is not a
        folder is, in words.

    Raises:
        ValueError: If there are more than ``limit`` entries.
        OSError: If a folder cannot be read.
    """
    sizes: dict[str, int] = {}
    others: dict[str, str] = {}
    entries_seen = 0
    waiting = [("", Path(folder))]
    while waiting:
        prefix, current = waiting.pop()
        with os.scandir(current) as entries:
            for entry in entries:
                entries_seen += 1
                if entries_seen > limit:
                    raise ValueError(
                        f"{os.fspath(folder)!r} must hold at most {limit} entries to be judged, found more."
                    )
                name = prefix + entry.name
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    waiting.append((name + "/", Path(entry.path)))
                elif entry.name.startswith(TEMPORARY_PREFIX):
                    continue
                elif stat.S_ISREG(status.st_mode):
                    # `DirEntry.stat` carries no size on Windows network drives; `lstat` always does.
                    sizes[name] = status.st_size if os.name == "posix" else os.lstat(entry.path).st_size
                else:
                    others[name] = kind_in_words(status.st_mode)
    return dict(sorted(sizes.items())), dict(sorted(others.items()))


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of the regular file at ``path`` in hexadecimal digits.

    Raises:
        ValueError: If ``path`` is not a regular file.
        OSError: If it cannot be read.
    """
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK_BYTES))
    with open(open_regular_file(path), "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def flush_folder(folder: str | os.PathLike[str]) -> None:
    """Ask the system to put the names inside ``folder`` on the disk; do nothing where it cannot.

    Windows cannot open a folder, and some network file systems refuse to flush one. The
    renames are still atomic there, they only may be lost with the power.
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
