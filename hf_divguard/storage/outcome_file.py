"""How a run ended: one strict JSON file that is written at its end and removed when training goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from hf_divguard.core.state import StateError, decode, encode
from hf_divguard.storage.events import EVENTS_FOLDER, make_events_folder
from hf_divguard.storage.failpoints import failpoint
from hf_divguard.storage.jsonio import encode_json, from_strict, read_json, to_strict, write_bytes_atomic

__all__ = [
    "OUTCOME_NAME",
    "RunEnd",
    "Status",
    "outcome_path",
    "read_outcome",
    "remove_outcome",
    "write_outcome",
]

logger = logging.getLogger(__name__)

OUTCOME_NAME = "outcome.json"
"""File in the folder of events. A run that goes on, that crashed or that was killed has none."""

Status = Literal["finished", "ended_early", "stopped", "gave_up", "interrupted"]

_VERSION = 1
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class RunEnd:
    """How a run ended.

    Args:
        status: ``"finished"``: all steps were trained; ``"ended_early"``: a callback ended it, as
            early stopping does, or the data; ``"stopped"``: a detector ended it; ``"gave_up"``:
            rollbacks did not help; ``"interrupted"``: it saved and ended on a signal.
        step: The last optimizer step.
        max_steps: How many there were to be.
        run_id: Name of the training, kept across a resume.
        time: When it ended, in seconds since 1970.
        train_loss: The training loss that ``train()`` returned.
        reason: Why it ended, in words, unless it finished.
        resume_from: Checkpoint to resume from; ``None`` if there is none.
        loaded: Folder name of the checkpoint whose weights the model was given at the end.
        metrics: The metrics that ``train()`` returned.
    """

    status: Status
    step: int
    max_steps: int
    run_id: str
    time: float
    train_loss: float | None = None
    reason: str | None = None
    resume_from: str | None = None
    loaded: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def outcome_path(run_dir: str | os.PathLike[str]) -> Path:
    """Return where the end of a run is noted.

    Example:
        >>> outcome_path("out").as_posix()
        'out/divguard/outcome.json'
    """
    return Path(run_dir, EVENTS_FOLDER, OUTCOME_NAME)


def write_outcome(run_dir: str | os.PathLike[str], end: RunEnd) -> None:
    """Write how the run in ``run_dir`` ended, in one step.

    Raises:
        OSError: If the file cannot be written.
        TypeError: If a metric is no value that JSON can hold.
    """
    path = outcome_path(run_dir)
    make_events_folder(run_dir)
    values = {entry.name: to_strict(getattr(end, entry.name)) for entry in fields(end)}
    values["train_loss"] = encode(end.train_loss)
    write_bytes_atomic(path, encode_json({"version": _VERSION, **values}, max_bytes=_MAX_BYTES))
    failpoint("outcome written")


def read_outcome(run_dir: str | os.PathLike[str]) -> RunEnd | None:
    """Return how the run in ``run_dir`` ended; ``None`` if it did not, or if that cannot be read.

    Example:
        >>> read_outcome("no such folder") is None
        True
    """
    path = outcome_path(run_dir)
    try:
        values = read_json(path, max_bytes=_MAX_BYTES)
        if values.pop("version", None) != _VERSION:
            raise StateError(f"`version` must be {_VERSION}.")
        if values.get("status") not in get_args(Status):
            raise StateError(f"`status` must be one of {list(get_args(Status))}.")
        metrics = from_strict(values.get("metrics"))
        if not isinstance(metrics, dict):
            raise StateError("`metrics` must be a mapping.")
        hints = typing.get_type_hints(RunEnd)
        kinds = {entry.name: hints[entry.name] for entry in fields(RunEnd)}
        kinds["status"] = str
        del kinds["metrics"]
        known = {name: decode(kind, values.get(name), f"`{name}`") for name, kind in kinds.items()}
        return RunEnd(metrics=metrics, **known)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("How the run ended cannot be read from %s (%s).", path, error)
        return None


def remove_outcome(run_dir: str | os.PathLike[str]) -> None:
    """Remove the file, as training goes on; nothing happens without one.

    Raises:
        OSError: If it cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        outcome_path(run_dir).unlink()
