"""The events of a run: one JSON object a line, newest last."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_divguard.storage.failpoints import failpoint
from hf_divguard.storage.jsonio import to_strict, write_bytes_atomic
from hf_divguard.storage.regular_files import read_bytes

__all__ = [
    "EVENTS_FOLDER",
    "EVENTS_NAME",
    "append_events",
    "events_path",
    "make_events_folder",
    "read_events",
    "read_events_strictly",
    "set_aside",
    "write_events",
]

EVENTS_FOLDER = "divguard"
EVENTS_NAME = "events.jsonl"
UNREADABLE_NAME = "events-unreadable.jsonl"

_MAX_BYTES = 16 << 20


def events_path(output_dir: str | os.PathLike[str]) -> Path:
    """Return where the events of a run are kept.

    Example:
        >>> events_path("out").as_posix()
        'out/divguard/events.jsonl'
    """
    return Path(output_dir, EVENTS_FOLDER, EVENTS_NAME)


def read_events(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the events of a run, oldest first; broken lines and foreign ones are left out.

    What cannot be read, is no regular file, or is larger than 16 MiB holds none.
    """
    try:
        return read_events_strictly(output_dir)
    except (OSError, ValueError):
        return []


def read_events_strictly(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the events as :func:`read_events` does; for who will write the file again.

    Raises:
        OSError: If there is a file and it cannot be read.
        ValueError: If it is no regular file, or larger than 16 MiB.
    """
    try:
        lines = read_bytes(events_path(output_dir), max_bytes=_MAX_BYTES).splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def set_aside(output_dir: str | os.PathLike[str]) -> Path:
    """Give a file of events that cannot be read another name beside it, and return that.

    Raises:
        OSError: If that is not possible.
    """
    path = events_path(output_dir)
    aside = path.with_name(UNREADABLE_NAME)
    os.replace(path, aside)
    return aside


def make_events_folder(output_dir: str | os.PathLike[str]) -> None:
    """Make the folder ``divguard`` of a run folder; it may be there already.

    Raises:
        OSError: If it cannot be made, or something else has its name.
    """
    folder = Path(output_dir, EVENTS_FOLDER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        found = "a link that leads nowhere" if folder.is_symlink() else "a file"
        raise NotADirectoryError(
            errno.ENOTDIR,
            f"Events of the run are kept in this folder, found {found}. Move it away",
            str(folder),
        ) from None


def write_events(output_dir: str | os.PathLike[str], events: Iterable[dict[str, Any]]) -> None:
    """Replace the file of events in one step.

    Raises:
        OSError: If it cannot be written.
    """
    path = events_path(output_dir)
    make_events_folder(output_dir)
    write_bytes_atomic(path, _lines(events))
    failpoint("events written")


def append_events(output_dir: str | os.PathLike[str], events: Iterable[dict[str, Any]]) -> None:
    """Add events at the end of the file. Killed in between, the last line is one that readers leave out.

    Raises:
        OSError: If it cannot be written.
    """
    path = events_path(output_dir)
    make_events_folder(output_dir)
    with open(path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(_lines(events))
    failpoint("events written")


def _lines(events: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(to_strict(event), allow_nan=False) + "\n" for event in events).encode()
