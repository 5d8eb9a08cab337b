"""What ``trainer_state.json`` says, read as data: the host's NaN and Infinity tokens are understood."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from hf_divguard.storage.jsonio import parse_json
from hf_divguard.storage.regular_files import read_bytes

__all__ = ["LFS_POINTER", "TRAINER_STATE_NAME", "log_history", "logged_metric", "read_trainer_state"]

TRAINER_STATE_NAME = "trainer_state.json"

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS has left in the place of the real one."""

_MAX_BYTES = 32 << 20  # a day of logging every step is some 20 megabytes


def read_trainer_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a ``trainer_state.json``.

    Args:
        path: The file, or a checkpoint folder that holds it.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not a complete JSON object, larger than 32 MiB, or not a regular file.
        OSError: If it cannot be read.
    """
    file = Path(path)
    if file.is_dir():
        file = file / TRAINER_STATE_NAME
    data = read_bytes(file, max_bytes=_MAX_BYTES)
    state = parse_json(data, what=repr(os.fspath(file)), allow_nan=True)
    if not isinstance(state, dict):
        raise ValueError(f"{os.fspath(file)!r} must hold a JSON object, it holds a {type(state).__name__}.")
    return state


def log_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the log entries of a trainer state; entries that are not objects are left out.

    Raises:
        FileNotFoundError: If there is no trainer state.
        ValueError: If it cannot be read.
    """
    history = read_trainer_state(path).get("log_history", [])
    return [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []


def logged_metric(path: str | os.PathLike[str], key: str) -> dict[int, float]:
    """Return the values of ``key`` by the step at which they were logged, the last of each step.

    A trainer state that is missing or broken has logged nothing.
    """
    try:
        history = log_history(path)
    except (OSError, ValueError):
        return {}
    values: dict[int, float] = {}
    for entry in history:
        step, value = entry.get("step"), entry.get(key)
        if isinstance(step, int) and isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                values[step] = float(value)
            except OverflowError:  # an integer that no float can hold
                values[step] = math.inf if value > 0 else -math.inf
    return values
