"""A training history from anywhere: rows of a table or a tracker, with its own names of keys, become log entries."""

from __future__ import annotations

import bisect
import datetime
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hf_divguard.cli.exits import CommandError
from hf_divguard.history import History, read_history

__all__ = ["Rows", "Source", "source_of_rows", "sources_of_runs"]

Rows = Iterable[Mapping[Any, Any]]

# The step of training comes before the tracker's own count of its entries.
_STEP_KEYS = ("train/global_step", "global_step", "step", "Step", "_step", "iteration", "iter")
_TIME_KEYS = ("_timestamp", "timestamp", "time", "wall_time", "Wall time", "Wall Time", "_runtime")
_RUN_KEYS = ("run_name", "run", "Run", "run_id")


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

    @cached_property
    def _timed_steps(self) -> list[int]:
        return sorted(self.times)

    def seconds_between(self, first: int, last: int) -> float | None:
        """Return the time from step ``first`` to step ``last``; ``None`` if it is not known."""
        steps = self._timed_steps
        before, after = bisect.bisect(steps, first), bisect.bisect(steps, last)
        if before and after > before:
            return max(0.0, self.times[steps[after - 1]] - self.times[steps[before - 1]])
        return None if self.seconds_per_step is None else (last - first) * self.seconds_per_step


def sources_of_runs(path: str, rows: Rows, notes: list[str], metric: str) -> list[Source]:
    """Return the history of each run in a table: rows that name their run are put together."""
    runs: dict[str, list[Mapping[Any, Any]]] = {}
    for row in rows:
        named = next((row[key] for key in _RUN_KEYS if row.get(key) not in (None, "")), "")
        runs.setdefault(str(named), []).append(row)
    if len(runs) <= 1:
        return [source_of_rows(path, next(iter(runs.values()), []), notes, metric)]
    return [source_of_rows(f"{path} [{name}]", own, notes, metric) for name, own in runs.items()]


def source_of_rows(path: str, rows: Rows, notes: list[str], metric: str) -> Source:
    """Return the history in ``rows``, with the Trainer's own names of keys.

    Raises:
        CommandError: If no row holds ``metric``.
    """
    log: list[dict[str, Any]] = []
    times: dict[int, float] = {}
    shapes: dict[tuple[Any, ...], _Shape] = {}
    for row in rows:
        in_row = tuple(row)
        shape = shapes.get(in_row) or shapes.setdefault(in_row, _Shape.of(in_row, metric))
        entry = {name: value for key, name in shape.names if (value := row[key]) is not None and value != ""}
        step = next((step for key in shape.steps if (step := _finite(row[key])) is not None), None)
        if step is not None:
            entry["step"] = number = int(step)
            moment = next((t for key in shape.times if (t := _seconds(row[key])) is not None), None)
            if moment is not None:
                times[number] = moment
        log.append(entry)
    if not any(metric in entry for entry in log):
        keys = sorted({key for entry in log[:1000] for key in entry} - {"step"})
        raise CommandError(
            f"`{path}` holds no `{metric}`. Its keys are: {', '.join(keys[:20]) or 'none'}. Name one with --metric."
        )
    return Source(path, read_history(log), times, None, notes)


@dataclass(frozen=True)
class _Shape:
    """What the keys of a row mean; most rows of a table have the same ones.

    Args:
        names: Keys with their names in a log, without those of the step.
        steps: Keys of the step, in the order in which they count.
        times: Keys of the time.
    """

    names: list[tuple[str, str]]
    steps: list[str]
    times: list[str]

    @classmethod
    def of(cls, keys: Collection[Any], metric: str) -> _Shape:
        """Return the meaning of ``keys``."""
        names = [(key, _log_key(key, metric)) for key in keys if isinstance(key, str)]
        return cls(
            [(key, name) for key, name in names if name != "step"],
            [key for key in _STEP_KEYS if key in keys],
            [key for key in _TIME_KEYS if key in keys],
        )


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
    if value.__class__ is int and -1e15 < value < 1e15:
        return float(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and abs(number) < 1e15 else None


def _seconds(value: Any) -> float | None:
    number = _finite(value)
    if number is not None or not isinstance(value, (str, datetime.datetime)):
        return number
    try:
        moment = (
            datetime.datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
            if isinstance(value, str)
            else value
        )
        return moment.timestamp()
    except (ValueError, OverflowError):
        return None
