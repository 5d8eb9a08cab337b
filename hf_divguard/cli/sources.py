"""Where training histories come from: the Trainer's own files, JSON Lines, CSV and TensorBoard event files."""

from __future__ import annotations

import csv
import datetime
import io
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_divguard.cli.event_files import read_event_files
from hf_divguard.cli.exits import CommandError
from hf_divguard.cli.folders import open_folder, runs_below, saved_at
from hf_divguard.history import History, read_history
from hf_divguard.storage.jsonio import parse_json
from hf_divguard.storage.names import checkpoint_folders
from hf_divguard.storage.regular_files import error_words, read_bytes
from hf_divguard.storage.trainer_state import TRAINER_STATE_NAME

__all__ = ["Source", "find_sources", "read_source"]

_MAX_BYTES = 512 << 20
_LFS = b"version https://git-lfs.github.com/spec/"
_STEP_KEYS = ("step", "global_step", "train/global_step", "_step", "Step", "iteration", "iter")
_TIME_KEYS = ("_timestamp", "timestamp", "time", "wall_time", "Wall time", "Wall Time", "_runtime")


@dataclass
class Source:
    """One training history.

    Args:
        path: Where it was found.
        history: Its entries.
        times: Time of entries in seconds, by step, where the log has times.
        seconds_per_step: How long a step took, where only that is known.
        notes: What reading it showed.
    """

    path: str
    history: History
    times: dict[int, float] = field(default_factory=dict)
    seconds_per_step: float | None = None
    notes: list[str] = field(default_factory=list)

    def seconds_between(self, first: int, last: int) -> float | None:
        """Return the time from step ``first`` to step ``last``; ``None`` if it is not known."""
        if self.times:
            before = [step for step in self.times if step <= first]
            after = [step for step in self.times if step <= last]
            if before and after and max(after) > max(before):
                return max(0.0, self.times[max(after)] - self.times[max(before)])
        return None if self.seconds_per_step is None else (last - first) * self.seconds_per_step


def find_sources(path: str) -> list[str]:
    """Return the files and folders at ``path`` that hold a history each: itself, or the runs below it."""
    if os.path.isfile(path) or not os.path.isdir(path):
        return [path]
    open_folder(path)
    if _has_state(path) or _event_files(path):
        return [path]
    below = [each for each in runs_below(path) if _has_state(each)]
    if not below:
        raise CommandError(
            f"`{path}` holds no history: no `{TRAINER_STATE_NAME}`, no checkpoint, no run in a folder below it."
        )
    return below


def _has_state(folder: str) -> bool:
    return os.path.lexists(os.path.join(folder, TRAINER_STATE_NAME)) or bool(checkpoint_folders(folder))


def _event_files(folder: str) -> list[str]:
    return sorted(
        os.path.join(folder, name) for name in os.listdir(folder) if name.startswith("events.out.tfevents.")
    )


def read_source(path: str, metric: str) -> list[Source]:
    """Return the histories at ``path``, one of :func:`find_sources`: several for a table of several runs.

    Raises:
        HistoryError: If it is no history.
        CommandError: The same, with the way out.
    """
    if os.path.isdir(path):
        if not _has_state(path):
            return [_from_events(path, _event_files(path))]
        return [_from_state(path)]
    if "tfevents" in os.path.basename(path) and os.path.exists(path):
        return [_from_events(path, [path])]
    data = _bytes_of(path)
    suffix = Path(path).suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _from_table(path, data, metric, delimiter="\t" if suffix == ".tsv" else ",")
    if suffix in (".jsonl", ".ndjson") or _is_json_lines(data):
        return [_from_rows(path, *_json_lines(path, data), metric)]
    return [_from_json(path, data)]


def _bytes_of(path: str) -> bytes:
    try:
        data = read_bytes(path, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        raise CommandError(_missing(path)) from None
    except (OSError, ValueError) as error:
        raise CommandError(f"`{path}` cannot be read: {error_words(error)}.") from None
    if data.startswith(_LFS):
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
    source = _from_json(str(best[1]), b"", best[2])
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
        return parse_json(data, what="it", allow_nan=True)
    except ValueError as error:
        raise CommandError(
            f"`{path}` is not complete JSON ({error}) It may have been cut off while it was written; an older "
            "checkpoint has an older copy."
        ) from None


def _from_json(path: str, data: bytes, content: Any = None) -> Source:
    content = _parsed(path, data) if content is None else content
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
    return Source(path, read_history(content), {}, pace)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


# ---- rows


def _is_json_lines(data: bytes) -> bool:
    first, _, rest = data.lstrip().partition(b"\n")
    if not rest.strip():
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: str, data: bytes) -> tuple[list[Mapping[str, Any]], list[str]]:
    rows: list[Mapping[str, Any]] = []
    lines = data.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines) and rows:
                return rows, [f"Line {number} is cut off and was left out."]
            raise CommandError(
                f"Line {number} of `{path}` is not JSON. Each line must be one log entry."
            ) from None
        if not isinstance(row, dict):
            raise CommandError(
                f'Line {number} of `{path}` must be a log entry such as {{"step": 1, "loss": 2.5}}.'
            )
        rows.append(row)
    return rows, []


def _from_table(path: str, data: bytes, metric: str, *, delimiter: str) -> list[Source]:
    """Return the history of each run in a CSV file: columns `<run> - <key>` belong to a run each."""
    try:
        text = data.decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise CommandError(f"`{path}` cannot be read as CSV: {error}.") from None
    columns = [name for name in (rows[0] if rows else {}) if isinstance(name, str)]
    if not rows or not columns:
        raise CommandError(f"`{path}` has no rows below its heading.")
    curves = [name for name in columns if " - " in name and not name.endswith(("__MIN", "__MAX"))]
    runs = sorted({name.rpartition(" - ")[0] for name in curves})
    if not runs:
        return [_from_rows(path, rows, [], metric)]
    shared = [name for name in columns if " - " not in name]
    sources = []
    for run in runs:
        own = {name: name.rpartition(" - ")[2] for name in curves if name.rpartition(" - ")[0] == run}
        renamed = [{**{n: row[n] for n in shared}, **{own[n]: row[n] for n in own if row[n]}} for row in rows]
        source = _from_rows(path, [row for row in renamed if len(row) > len(shared)], [], metric)
        sources.append(Source(f"{path} [{run}]", source.history, source.times, None, source.notes))
    return sources


def _from_rows(path: str, rows: Iterable[Mapping[Any, Any]], notes: list[str], metric: str) -> Source:
    log: list[dict[str, Any]] = []
    times: dict[int, float] = {}
    for row in rows:
        entry = {_log_key(key, metric): value for key, value in row.items() if isinstance(key, str)}
        named = next((row[key] for key in _STEP_KEYS if row.get(key) not in (None, "")), None)
        step = _finite(named)
        if step is not None:
            entry["step"] = int(step)
            moment = next((t for key in _TIME_KEYS if (t := _seconds(row.get(key))) is not None), None)
            if moment is not None:
                times[int(step)] = moment
        else:
            entry.pop("step", None)
        log.append({key: value for key, value in entry.items() if value not in (None, "")})
    if not any(metric in entry for entry in log):
        keys = sorted({key for entry in log[:1000] for key in entry} - {"step"})
        raise CommandError(
            f"`{path}` holds no `{metric}`. Its keys are: {', '.join(keys[:20]) or 'none'}. Name one with --metric."
        )
    return Source(path, read_history(log), times, None, notes)


def _log_key(key: str, metric: str) -> str:
    """Return the Trainer's own name of a key of a tracker."""
    key = key.strip()
    if key in ("Value", "value"):
        return metric  # what TensorBoard saves of one curve
    if key in _STEP_KEYS or key in _TIME_KEYS:
        return "step" if key in _STEP_KEYS else f"_{key}"
    if key == "train_loss":
        return key
    first, _, rest = key.partition("/")
    return {"train": rest, "eval": f"eval_{rest}"}.get(first, key) if rest else key


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and abs(number) < 1e15 else None


def _seconds(value: Any) -> float | None:
    number = _finite(value)
    if number is not None or not isinstance(value, str):
        return number
    try:
        return datetime.datetime.fromisoformat(value.strip().replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return None


def _from_events(path: str, files: list[str]) -> Source:
    rows = [
        {"step": step, key: value, "wall_time": moment}
        for step, key, value, moment in read_event_files(files)
    ]
    return _from_rows(path, rows, [], "loss")
