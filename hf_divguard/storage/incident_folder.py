"""The folder of an incident: what is known of a finding, for people who look at it later. Bounded in size and number."""

from __future__ import annotations

import csv
import io
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_divguard.storage.events import EVENTS_FOLDER
from hf_divguard.storage.jsonio import encode_json, to_strict, write_bytes_atomic

__all__ = [
    "INCIDENT_NAME",
    "PICTURE_NAME",
    "VALUES_NAME",
    "incident_folders",
    "incident_name",
    "remove_old_incidents",
    "write_incident",
]

INCIDENT_NAME = "incident.json"
"""Finding, arguments, versions and rows. It is written last."""

VALUES_NAME = "values.csv"
"""The last steps: loss, gradient norm and learning rate of each."""

PICTURE_NAME = "curves.svg"
"""The same as a picture."""

_NAME = re.compile(r"incident-([0-9]{1,18})")
_MAX_BYTES = 1 << 20


def incident_name(step: int) -> str:
    """Return the name of the folder of an incident.

    Example:
        >>> incident_name(224)
        'incident-224'
    """
    return f"incident-{step}"


def incident_folders(run_dir: str | os.PathLike[str]) -> dict[int, Path]:
    """Return the folders of incidents in a run folder by step, lowest first.

    Example:
        >>> incident_folders("no such folder")
        {}
    """
    try:
        with os.scandir(Path(run_dir, EVENTS_FOLDER)) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return {}
    steps = {int(match[1]): name for name in names if (match := _NAME.fullmatch(name))}
    return {step: Path(run_dir, EVENTS_FOLDER, steps[step]) for step in sorted(steps)}


def write_incident(
    run_dir: str | os.PathLike[str],
    step: int,
    content: Mapping[str, Any],
    *,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    picture: str,
) -> Path:
    """Write the folder of an incident; one of the same step is replaced.

    Args:
        run_dir: The run folder.
        step: Step of the event.
        content: What ``incident.json`` holds; a value that JSON cannot hold becomes text.
        columns: Names of the columns of ``values.csv``.
        rows: Its rows; ``None`` is an empty cell.
        picture: The picture, as SVG.

    Raises:
        OSError: If it cannot be written.
        ValueError: If ``content`` has more than a megabyte.
    """
    folder = Path(run_dir, EVENTS_FOLDER, incident_name(step))
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_bytes_atomic(folder / VALUES_NAME, text.getvalue().encode())
    write_bytes_atomic(folder / PICTURE_NAME, picture.encode())
    data = {str(key): _storable(value) for key, value in content.items()}
    write_bytes_atomic(folder / INCIDENT_NAME, encode_json(data, max_bytes=_MAX_BYTES))
    return folder


def _storable(value: Any) -> Any:
    """Return ``value`` as JSON can hold it; what has no such form as text, cut at 200 characters."""
    if isinstance(value, Mapping):
        return {str(key): _storable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(entry) for entry in value]
    try:
        return to_strict(value)
    except TypeError:
        return str(value)[:200]


def remove_old_incidents(run_dir: str | os.PathLike[str], keep: int) -> None:
    """Remove the folders of incidents beyond the ``keep`` that were written last.

    Only files directly inside of them are removed; a folder that holds another one stays.

    Raises:
        OSError: If one cannot be removed.
    """
    folders = sorted(incident_folders(run_dir).values(), key=_written_at)
    for folder in folders[: max(0, len(folders) - keep)]:
        names = os.listdir(folder)
        if any(stat.S_ISDIR((folder / name).lstat().st_mode) for name in names):
            continue
        for name in names:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _written_at(folder: Path) -> int:
    """Return when an incident was written: the time of the folder changes with what others put into it."""
    try:
        return (folder / INCIDENT_NAME).lstat().st_mtime_ns
    except OSError:  # it has none: it was not finished
        return folder.lstat().st_mtime_ns
