"""The story of a run's incidents: one JSON object a line, newest last."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_divguard.storage.jsonio import to_strict, write_bytes_atomic

__all__ = ["EVENTS_FOLDER", "EVENTS_NAME", "events_path", "read_events", "write_events"]

EVENTS_FOLDER = "divguard"
EVENTS_NAME = "events.jsonl"

_MAX_BYTES = 64 << 20


def events_path(output_dir: str | os.PathLike[str]) -> Path:
    """Return where the events of a run are kept.

    Example:
        >>> events_path("out").as_posix()
        'out/divguard/events.jsonl'
    """
    return Path(output_dir, EVENTS_FOLDER, EVENTS_NAME)


def read_events(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the events of a run, oldest first; broken lines and foreign ones are left out."""
    path = events_path(output_dir)
    try:
        if path.stat().st_size > _MAX_BYTES:
            return []
        lines = path.read_bytes().splitlines()
    except OSError:
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


def write_events(output_dir: str | os.PathLike[str], events: Iterable[dict[str, Any]]) -> None:
    """Write all events anew: the file is whole at every moment.

    Raises:
        OSError: If it cannot be written.
    """
    path = events_path(output_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(to_strict(event), allow_nan=False) + "\n" for event in events)
    write_bytes_atomic(path, text.encode())
