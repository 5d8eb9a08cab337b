"""Training histories, read from wherever they are kept into one list of entries."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hf_divguard.errors import HistoryError
from hf_divguard.storage.jsonio import parse_json
from hf_divguard.storage.names import checkpoint_folders
from hf_divguard.storage.regular_files import read_bytes
from hf_divguard.storage.trainer_state import LFS_POINTER, TRAINER_STATE_NAME

__all__ = ["Entry", "History", "HistorySource", "read_history"]

_MAX_BYTES = 256 << 20  # a week of logging every step
_EXACT = 1 << 53
_KNOWN = ("loss", "eval_loss")
_TEXT_NUMBERS = {"nan": math.nan, "inf": math.inf, "infinity": math.inf, "+inf": math.inf, "-inf": -math.inf}


class Entry(NamedTuple):
    """What was logged at one step: numbers by their log keys."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class History:
    """The entries of a run in the order of their logging, and what reading them showed."""

    entries: list[Entry]
    has_steps: bool = True
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[Entry]:
        """Return the entries that hold ``key``."""
        return [entry for entry in self.entries if key in entry.values]


HistorySource = str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Mapping[str, Any] | History
"""A file or folder, a ``log_history``, a mapping of plain sequences, or a history that was read before."""


def read_history(source: HistorySource) -> History:
    """Read a training history.

    Args:
        source: Path of a ``trainer_state.json``, of a checkpoint or of an output folder (its
            furthest ``trainer_state.json`` is taken); a ``log_history`` list; the content of a
            ``trainer_state.json``; or a mapping of plain sequences: ``loss``, and where known
            ``steps``, ``grad_norm``, and ``eval_loss`` with ``eval_steps``. ``None`` stands for
            a value that was not logged, ``"nan"`` and ``"inf"`` for themselves.

    Raises:
        HistoryError: If there is nothing to read, or it is not a history.

    Example:
        >>> history = read_history({"steps": [10, 20], "loss": [2.5, "nan"], "grad_norm": [1.0, None]})
        >>> [dict(entry.values) for entry in history.entries]
        [{'grad_norm': 1.0, 'loss': 2.5}, {'loss': nan}]
    """
    if isinstance(source, History):
        return source
    if isinstance(source, (str, os.PathLike)):
        path = _state_file(Path(source))
        return _from_content(_load(path), f"`{path}`")
    return _from_content(source, "The history")


def _state_file(path: Path) -> Path:
    if not path.exists():
        raise HistoryError(
            f"A history must be an existing file or folder, but `{path}` is neither. "
            f"Give a `{TRAINER_STATE_NAME}`, a checkpoint folder or an output folder."
        )
    if not path.is_dir():
        return path
    folders = [path, *checkpoint_folders(path).values()]
    readable = []
    for state in [folder / TRAINER_STATE_NAME for folder in folders]:
        try:
            step = _load(state).get("global_step", 0)
        except (HistoryError, AttributeError):
            continue
        readable.append((step if isinstance(step, (int, float)) else 0, state))
    if not readable:
        raise HistoryError(
            f"`{path}` holds no readable `{TRAINER_STATE_NAME}`, neither itself nor in a `checkpoint-<step>` folder. "
            "The Trainer writes one into each checkpoint, and into the output folder at `save_state()`."
        )
    return max(readable, key=lambda pair: pair[0])[1]


def _load(path: Path) -> Any:
    try:
        data = read_bytes(path, max_bytes=_MAX_BYTES)
    except (OSError, ValueError) as error:
        raise HistoryError(f"`{path}` cannot be read: {error}") from error
    if data.startswith(LFS_POINTER):
        raise HistoryError(
            f"`{path}` is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`."
        )
    try:
        return parse_json(data, what=f"`{path}`", allow_nan=True)
    except ValueError as error:
        raise HistoryError(
            f"{error} It may have been cut off while it was written; an older checkpoint has an older copy."
        ) from error


def _from_content(content: Any, name: str) -> History:
    if isinstance(content, Mapping) and "log_history" in content:
        content = content["log_history"]
    if isinstance(content, Mapping):
        if content and not any(key in _KNOWN or _is_column(values) for key, values in content.items()):
            kind = " It is the config of a model." if "model_type" in content else ""
            raise HistoryError(
                f"{name} is no training history: it has neither a `log_history` nor lists of values.{kind} Give a "
                f"`{TRAINER_STATE_NAME}`, a checkpoint or an output folder."
            )
        return _from_sequences(content)
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        if all(entry.__class__ is dict or isinstance(entry, Mapping) for entry in content):
            return _from_log(content, name)
        raise HistoryError(
            f"{name} must be a list of log entries (mappings such as {{'loss': 2.5, 'step': 10}}). "
            "Give bare numbers as a mapping: {'steps': [...], 'loss': [...]}."
        )
    raise HistoryError(
        f"{name} must hold a `log_history`, a list of log entries or a mapping of sequences, "
        f"got {type(content).__name__}."
    )


def _number(value: Any) -> float | None:
    """Return ``value`` as a float; ``None`` if it is not a number and does not read like one."""
    if value.__class__ is int and -_EXACT < value < _EXACT:
        return float(value)
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _TEXT_NUMBERS:
            return _TEXT_NUMBERS[text]
        try:
            return float(text)
        except ValueError:
            return None
    if value is None or isinstance(value, (bool, Mapping)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _step_and_numbers(logged: Mapping[str, Any]) -> tuple[float | None, dict[str, float]]:
    """Return the step of an entry, and what else in it is a number or reads like one."""
    step = logged.get("step")
    if step.__class__ is int and -_EXACT < step < _EXACT:
        values = dict(logged)
        del values["step"]
        for raw in values.values():
            if raw.__class__ is not float:
                break
        else:
            return step, values  # as the Trainer writes most of them
    values = {
        key: number
        for key, raw in logged.items()
        if (number := raw if raw.__class__ is float else _number(raw)) is not None
    }
    return values.pop("step", None), values


def _from_log(log: Sequence[Mapping[str, Any]], name: str) -> History:
    entries: list[Entry] = []
    without_step = trained = 0
    for logged in log:
        step, values = _step_and_numbers(logged)
        is_training = "loss" in values
        if step is None or not math.isfinite(step):
            without_step += 1
            # Evaluations and the closing summary belong to the training entry before them.
            step = trained + is_training
        if values:
            entries.append(Entry(int(step), values))
            trained += is_training
    if not entries:
        raise HistoryError(
            f"{name} holds no log entries, so there is nothing to replay. The Trainer logs every "
            "`logging_steps` steps, 500 by default: set it lower."
        )
    notes = []
    if without_step:
        notes.append(
            f"{without_step} of {len(log)} entries name no step (only an epoch, perhaps): steps are counted in entries."
        )
    return History(entries, has_steps=without_step == 0, notes=notes)


def _from_sequences(columns: Mapping[str, Any]) -> History:
    known = {key: _column(key, values) for key, values in columns.items() if values is not None}
    evaluation = {key for key in known if key.startswith("eval_")} - {"eval_steps"}
    training = known.keys() - evaluation - {"steps", "step", "eval_steps"}
    if not training and not evaluation:
        raise HistoryError(
            f"A mapping of sequences needs at least `loss` or `eval_loss`, got {sorted(columns)}."
        )
    length = max((len(known[key]) for key in training), default=0)
    steps = known.get("steps", known.get("step"))
    notes = [] if steps or not length else ["The history names no steps: they are counted in entries."]
    rows = _rows(known, training, steps, length)
    eval_length = max((len(known[key]) for key in evaluation), default=0)
    eval_steps = known.get("eval_steps")
    if eval_steps is None and evaluation and eval_length != length:
        raise HistoryError(
            f"`eval_steps` is missing: there are {eval_length} evaluations and {length} training entries, so the "
            "steps of the evaluations are not known. Give one step per evaluation."
        )
    eval_rows = _rows(known, evaluation, eval_steps or steps, eval_length)
    entries = sorted(rows + eval_rows, key=lambda entry: entry.step) if eval_rows else rows
    return History(entries, has_steps=steps is not None, notes=notes)


def _is_column(values: Any) -> bool:
    return isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping))


def _column(key: str, values: Any) -> list[Any]:
    if not _is_column(values):
        raise HistoryError(f"`{key}` must be a sequence of numbers, got {values!r}.")
    return list(values)


def _rows(
    known: Mapping[str, list[Any]], keys: Iterable[str], steps: list[Any] | None, length: int
) -> list[Entry]:
    keys = sorted(keys)
    named = list(range(1, length + 1)) if steps is None else steps
    for key in keys:
        if len(known[key]) != len(named):
            raise HistoryError(
                f"`{key}` must have one value per step, got {len(known[key])} values for {len(named)} steps. "
                "Use None where nothing was logged."
            )
    rows = []
    for index, raw in enumerate(named):
        step = _number(raw)
        if step is None or not math.isfinite(step):
            raise HistoryError(f"Steps must be whole numbers, got {raw!r}.")
        values = {key: number for key in keys if (number := _number(known[key][index])) is not None}
        if values:
            rows.append(Entry(int(step), values))
    return rows
