"""Where training histories come from: the Trainer's own files, tables, and what trackers leave on the disk."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path
from typing import Any

from hf_divguard.cli.event_files import read_event_files
from hf_divguard.cli.exits import CommandError
from hf_divguard.cli.folders import open_folder, runs_below, saved_at
from hf_divguard.cli.plain_text import MAX_BYTES, plain_text
from hf_divguard.cli.source import Source, source_of_rows, sources_of_runs
from hf_divguard.cli.tables import is_json_lines, read_json_lines, read_parquet, read_table, rows_of_json
from hf_divguard.cli.tracker_files import read_trackio, read_wandb
from hf_divguard.errors import HistoryError
from hf_divguard.history import read_history
from hf_divguard.storage.jsonio import parse_json
from hf_divguard.storage.names import checkpoint_folders
from hf_divguard.storage.regular_files import error_words, read_bytes
from hf_divguard.storage.trainer_state import LFS_POINTER, TRAINER_STATE_NAME

__all__ = ["find_sources", "read_source"]

_EVENTS = ".tfevents."
_MOST_FOLDERS = 20_000


def find_sources(path: str) -> list[str]:
    """Return the files and folders at ``path`` that hold a history each: itself, or the runs below it."""
    if os.path.isfile(path) or not os.path.isdir(path):
        return [path]
    open_folder(path)
    if _has_state(path):
        return [path]
    below = [each for each in runs_below(path) if _has_state(each)]
    tracked = [] if below else _tracked(path)
    if not below and not tracked:
        raise CommandError(
            f"`{path}` holds no history: no `{TRAINER_STATE_NAME}`, no checkpoint, no files of TensorBoard, W&B or "
            "trackio, and no run in a folder below it."
        )
    return below or tracked


def _has_state(folder: str) -> bool:
    return os.path.lexists(os.path.join(folder, TRAINER_STATE_NAME)) or bool(checkpoint_folders(folder))


def _tracked(path: str) -> list[str]:
    """Return what trackers have written in ``path`` and below: folders of event files, files of W&B and trackio."""
    found: list[str] = []
    for seen, (folder, names, files) in enumerate(os.walk(path)):
        if seen > _MOST_FOLDERS:
            break
        names[:] = sorted(name for name in names if not os.path.islink(os.path.join(folder, name)))
        found += [folder] if any(_EVENTS in name for name in files) else []
        found += [os.path.join(folder, name) for name in sorted(files) if name.endswith((".wandb", ".db"))]
    return found


def _event_files(folder: str) -> list[str]:
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if _EVENTS in name)


def read_source(path: str, metric: str) -> list[Source]:
    """Return the histories at ``path``, one of :func:`find_sources`: several for a table of several runs.

    Raises:
        HistoryError: If it is no history.
        CommandError: The same, with the way out.
    """
    if os.path.isdir(path):
        if _has_state(path):
            return [_from_state(path)]
        return [source_of_rows(path, *read_event_files(_event_files(path)), metric)]
    name = os.path.basename(path)
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    if os.path.isfile(path):
        if _EVENTS in name:
            return [source_of_rows(path, *read_event_files([path]), metric)]
        if suffix == ".wandb":
            return [source_of_rows(path, *read_wandb(path), metric)]
        if suffix in (".db", ".sqlite"):
            return sources_of_runs(path, read_trackio(path), [], metric)
        if suffix == ".parquet":
            return read_parquet(path, metric)
    data = _bytes_of(path)
    if suffix in (".csv", ".tsv"):
        return read_table(path, data, metric)
    if suffix in (".jsonl", ".ndjson") or is_json_lines(data):
        return read_json_lines(path, data, metric)
    content = _parsed(path, data)
    rows = rows_of_json(content, metric)
    return [_from_json(path, content)] if rows is None else sources_of_runs(path, rows, [], metric)


def _bytes_of(path: str) -> bytes:
    try:
        data = plain_text(read_bytes(path, max_bytes=MAX_BYTES))
    except FileNotFoundError:
        raise CommandError(_missing(path)) from None
    except (OSError, ValueError) as error:
        raise CommandError(f"`{path}` cannot be read: {error_words(error)}.") from None
    if data.startswith(LFS_POINTER):
        raise CommandError(
            f"`{path}` is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`."
        )
    if not data.strip():
        raise CommandError(f"`{path}` is empty. Take the copy of an older checkpoint.")
    return data


def _missing(path: str) -> str:
    try:
        open_folder(path)
    except CommandError as error:
        return str(error).replace("There is no folder", "There is no file or folder")
    return f"There is no file or folder `{path}`."


# ---- the Trainer's own


def _from_state(folder: str) -> Source:
    """Return the history of a run from its furthest trainer state that can be read."""
    states = [Path(folder, TRAINER_STATE_NAME)]
    checkpoints = list(checkpoint_folders(folder).values())
    errors: list[CommandError] = []
    best: tuple[int, Path, Any] | None = None
    for path in [*states, *(each / TRAINER_STATE_NAME for each in reversed(checkpoints))]:
        if best is not None and path.parent != Path(folder) and _step_of(path) <= best[0]:
            break
        try:
            content = _parsed(str(path), _bytes_of(str(path)))
        except CommandError as error:
            errors += [error] if os.path.lexists(path) else []
            continue
        step = content.get("global_step") if isinstance(content, dict) else None
        best = max(
            best or (-1, path, content), (step if type(step) is int else 0, path, content), key=lambda b: b[0]
        )
        if path.parent != Path(folder):
            break
    if best is None:
        raise errors[0] if errors else CommandError(f"`{folder}` holds no readable `{TRAINER_STATE_NAME}`.")
    source = _from_json(str(best[1]), best[2])
    notes = [f"Skipped: {error}" for error in errors[:3]]
    return Source(folder, source.history, {}, _pace(checkpoints) or source.seconds_per_step, notes)


def _step_of(state: Path) -> int:
    return int(state.parent.name.rpartition("-")[2])


def _pace(checkpoints: list[Path]) -> float | None:
    """Return the median time of a step between the last checkpoints."""
    saves = [(_step_of(each / "x"), moment) for each in checkpoints[-20:] if (moment := saved_at(str(each)))]
    paces = sorted(
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for earlier, later in itertools.pairwise(saves)
        if later[1] > earlier[1]
    )
    return paces[len(paces) // 2] if paces else None


def _parsed(path: str, data: bytes) -> Any:
    try:
        return parse_json(data, what=f"`{path}`", allow_nan=True)
    except ValueError as error:
        raise CommandError(
            f"{error} It may have been cut off while it was written; an older checkpoint has an older copy."
        ) from None


def _from_json(path: str, content: Any) -> Source:
    is_history = isinstance(content, list) or (
        isinstance(content, dict)
        and (
            "log_history" in content or (content and all(isinstance(each, list) for each in content.values()))
        )
    )
    if not is_history:
        kind = (
            " It is the config of a model." if isinstance(content, dict) and "model_type" in content else ""
        )
        raise CommandError(
            f"`{path}` is no training history: it has neither a `log_history` nor lists of values.{kind} Give a "
            f"`{TRAINER_STATE_NAME}`, a checkpoint or an output folder."
        )
    log = content.get("log_history") if isinstance(content, dict) else None
    last = log[-1] if isinstance(log, list) and log and isinstance(log[-1], dict) else {}
    runtime, step = last.get("train_runtime"), last.get("step")
    pace = float(runtime or 0) / float(step or 1) if _is_positive(runtime) and _is_positive(step) else None
    try:
        history = read_history(content)
    except HistoryError as error:
        raise CommandError(str(error).replace("The history", f"`{path}`", 1)) from None
    return Source(path, history, {}, pace)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
