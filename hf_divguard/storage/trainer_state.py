"""What ``trainer_state.json`` says, read as data: the host's NaN and Infinity tokens are understood."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["TRAINER_STATE_NAME", "log_history", "logged_metric", "read_trainer_state"]

TRAINER_STATE_NAME = "trainer_state.json"

# A day of logging every step is some tens of megabytes; nothing honest comes near this.
_MAX_BYTES = 1 << 30


def read_trainer_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a ``trainer_state.json``.

    Args:
        path: The file, or a checkpoint folder that holds it.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not a whole JSON object, or larger than 1 GiB.
    """
    file = Path(path)
    if file.is_dir():
        file = file / TRAINER_STATE_NAME
    size = file.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"`{file}` has {size} bytes; a trainer state has at most {_MAX_BYTES}.")
    try:
        state = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{file}` is not whole JSON: {error}.") from error
    if not isinstance(state, dict):
        raise ValueError(f"`{file}` must hold a JSON object, it holds a {type(state).__name__}.")
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
    values = {}
    for entry in history:
        step, value = entry.get("step"), entry.get(key)
        if isinstance(step, int) and isinstance(value, (int, float)) and not isinstance(value, bool):
            values[step] = float(value)
    return values
