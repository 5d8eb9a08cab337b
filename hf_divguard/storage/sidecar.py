"""The sidecar of a checkpoint: its metric, its place in the run, the state of callbacks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hf_divguard._version import __version__
from hf_divguard.core.retention import CheckpointRecord
from hf_divguard.storage.failpoints import failpoint
from hf_divguard.storage.jsonio import encode_json, from_strict, read_json, to_strict, write_bytes_atomic
from hf_divguard.storage.names import SIDECAR_NAME
from hf_divguard.storage.record import FORMAT_VERSION, Fields, Quarantine, RecordError, sealed

__all__ = [
    "WRITER",
    "CheckpointRecord",
    "ExternalRecord",
    "Sidecar",
    "SidecarError",
    "encode_sidecar",
    "fit_callbacks",
    "read_sidecar",
    "write_sidecar",
]

_T = TypeVar("_T")

WRITER = f"hf_divguard {__version__}"
"""Who writes our files, with the version."""

_MAX_BYTES = 64 << 20
_MAX_CALLBACK_BYTES = 60 << 20
_MAX_RECORDS = 100_000
_MAX_CALLBACKS = 10_000


class SidecarError(RecordError):
    """A sidecar is broken, breaks a limit, or has a format of the future."""


@dataclass(frozen=True, slots=True)
class ExternalRecord:
    """A checkpoint of the lineage that stands outside of the run folder.

    Args:
        path: Its folder, as an absolute path.
        step: Its optimizer step.
        sequence: Its number among the saves of its own run folder; ``None`` if it has none.
        metric: Value of the ranking metric at its step.
    """

    path: str
    step: int
    sequence: int | None
    metric: float | None


@dataclass(frozen=True, slots=True)
class Sidecar:
    """Everything that ``divguard_state.json`` holds. Its size does not grow with the number of checkpoints.

    Args:
        step: Optimizer step of the checkpoint.
        run_id: Name of the run that saved it.
        sequence: Grows with every save in one run folder, over all runs.
        metric_name: Name of the metric that ranks checkpoints.
        metric: Its value at this very step.
        greater_is_better: Its direction.
        records: The last few checkpoints of the run folder and the best ones of the lineage, in the
            order of saving, this one last. They give the place of folders that have no sidecar.
        is_partial: Whether older checkpoints were left out of ``records``.
        lineage: The checkpoints that this one comes from, itself included: first and last
            sequence number of each unbroken row of saves.
        home: Absolute path of the run folder when this was saved.
        elsewhere: Checkpoints of the lineage that stand in other folders.
        callbacks: State of each callback, by name.
        manifest_expected: Whether a manifest follows. Without it such a checkpoint is incomplete.
        quarantine: Why this checkpoint must never be resumed; ``None`` for a good one.
        suspect: Why this checkpoint may have been saved under a fault; ``None`` for a good one.
        writer: Name and version of the program that wrote it.
        damaged: What could not be read and was left out, in words. It is not written.
    """

    step: int
    run_id: str
    sequence: int
    metric_name: str | None = None
    metric: float | None = None
    greater_is_better: bool | None = None
    records: tuple[CheckpointRecord, ...] = ()
    is_partial: bool = False
    lineage: tuple[tuple[int, int], ...] = ()
    home: str | None = None
    elsewhere: tuple[ExternalRecord, ...] = ()
    callbacks: dict[str, Any] = field(default_factory=dict)
    manifest_expected: bool = False
    quarantine: Quarantine | None = None
    suspect: Quarantine | None = None
    writer: str = WRITER
    damaged: tuple[str, ...] = field(default=(), compare=False)


def write_sidecar(folder: str | os.PathLike[str], sidecar: Sidecar, *, flush: bool = False) -> None:
    """Write ``sidecar`` into the checkpoint ``folder``, replacing an older one in one step.

    Args:
        folder: The checkpoint folder; it must exist.
        sidecar: What to write. Callback states may hold whatever ``to_strict`` takes; see
            :func:`fit_callbacks`.
        flush: Wait until it is on the disk.

    Raises:
        TypeError: If a callback's state holds what JSON cannot; the message says where.
        ValueError: If it could not be read again: a negative step, a text of several lines, more
            than 64 MiB.
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_sidecar(folder, Sidecar(step=20, run_id="a", sequence=1, metric=float("nan")))
        ...     read_sidecar(folder).metric
        nan
    """
    write_bytes_atomic(Path(folder, SIDECAR_NAME), encode_sidecar(sidecar), flush=flush)
    failpoint("sidecar written")


def encode_sidecar(sidecar: Sidecar) -> bytes:
    """Return the bytes that ``write_sidecar`` writes.

    Raises:
        TypeError: If a callback's state holds what JSON cannot; the message says where.
        ValueError: If it could not be read again: a negative step, a text of several lines, more
            than 64 MiB.
    """
    apart = ("records", "elsewhere", "callbacks", "damaged")
    data = {
        "format": FORMAT_VERSION,
        **{name: to_strict(getattr(sidecar, name)) for name in Sidecar.__slots__ if name not in apart},
        "records": [to_strict(asdict(record)) for record in sidecar.records],
        "elsewhere": [to_strict(asdict(record)) for record in sidecar.elsewhere],
        "callbacks": {name: to_strict(state) for name, state in sidecar.callbacks.items()},
    }
    read_again = _parse(data)
    if read_again.damaged:
        raise SidecarError(read_again.damaged[0])
    return encode_json(sealed(data), max_bytes=_MAX_BYTES)


def fit_callbacks(
    states: Mapping[str, Any], *, max_bytes: int = _MAX_CALLBACK_BYTES
) -> tuple[dict[str, Any], list[str]]:
    """Return the callback states that fit into a sidecar, and a sentence for each that does not.

    A state that JSON cannot hold is left out. Of states that are too large together, the
    largest is left out first.

    Args:
        states: State of each callback, by name.
        max_bytes: How large they may be together, as JSON text.

    Example:
        >>> kept, problems = fit_callbacks({"small": [1], "large": "x" * 100, "odd": {1}}, max_bytes=50)
        >>> kept
        {'small': [1]}
        >>> len(problems)
        2
    """
    kept: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    problems = []
    for name, state in states.items():
        try:
            strict = to_strict(state)
            sizes[name] = len(json.dumps(strict)) + len(json.dumps(name))
            kept[name] = state
        except (TypeError, ValueError, RecursionError) as error:
            problems.append(f"The state of callback {name!r} cannot be saved: {error}")
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if sum(sizes.values()) <= max_bytes:
            break
        problems.append(
            f"The state of callback {name!r} is not saved: it has {sizes.pop(name)} bytes as JSON text, and the states "
            f"of all callbacks together may have {max_bytes}. Keep large data in files of your own."
        )
        del kept[name]
    return kept, problems


def read_sidecar(folder: str | os.PathLike[str]) -> Sidecar:
    """Read the sidecar of the checkpoint in ``folder``.

    An entry that is damaged, such as the state of one callback, is left out; ``damaged`` of the
    sidecar names it.

    Raises:
        FileNotFoundError: If it has none.
        SidecarError: If it is broken, breaks a limit, or a newer version wrote it.
        OSError: If it cannot be read.
    """
    try:
        return _parse(read_json(os.path.join(folder, SIDECAR_NAME), max_bytes=_MAX_BYTES))
    except SidecarError:
        raise
    except (ValueError, RecursionError) as error:
        raise SidecarError(str(error)) from None


class _Tolerant:
    """Reads what a sidecar can do without: notes what is damaged, and gives something else in its place."""

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self.damaged: list[str] = []

    def read(self, read: Callable[..., _T], otherwise: _T, *arguments: object) -> _T:
        """Return what ``read`` gives, ``otherwise`` if it fails."""
        try:
            return read(*arguments)
        except (ValueError, RecursionError) as error:
            self.damaged.append(str(error))
            return otherwise

    def entries(self, key: str, parse: Callable[[object], _T]) -> tuple[_T, ...]:
        """Return the entries of a list that can be read; none if there is no such list."""
        entries: list[Any] = []
        if key in self._fields:
            entries = self.read(lambda: self._fields.entries(key, limit=_MAX_RECORDS), entries)
        parsed: list[_T | None] = [self.read(parse, None, entry) for entry in entries]
        return tuple(entry for entry in parsed if entry is not None)

    def callbacks(self) -> dict[str, Any]:
        """Return the states of callbacks that can be read."""
        lost = object()
        states: dict[str, Any] = {}
        states = self.read(lambda: self._fields.mapping("callbacks", limit=_MAX_CALLBACKS), states)
        read = {name: self.read(from_strict, lost, state) for name, state in states.items()}
        return {name: state for name, state in read.items() if state is not lost}


def _parse(data: dict[str, Any]) -> Sidecar:
    fields = Fields(data, f"`{SIDECAR_NAME}`", SidecarError)
    fields.check_format()
    tolerant = _Tolerant(fields)
    callbacks = tolerant.callbacks()
    return Sidecar(
        step=fields.integer("step"),
        run_id=fields.text("run_id"),
        sequence=fields.integer("sequence"),
        metric_name=tolerant.read(lambda: fields.text_or_none("metric_name"), None),
        metric=tolerant.read(lambda: fields.number_or_none("metric"), None),
        greater_is_better=tolerant.read(lambda: fields.boolean_or_none("greater_is_better"), None),
        records=tolerant.entries("records", _parse_record),
        is_partial=tolerant.read(lambda: fields.boolean_or_none("is_partial"), None) or False,
        lineage=tolerant.entries("lineage", _parse_span),
        home=tolerant.read(lambda: fields.path_or_none("home"), None),
        elsewhere=tolerant.entries("elsewhere", _parse_external),
        callbacks=callbacks,
        manifest_expected=fields.boolean("manifest_expected"),
        quarantine=fields.note("quarantine"),
        suspect=fields.note("suspect"),
        writer=tolerant.read(lambda: fields.text("writer"), ""),
        damaged=tuple(tolerant.damaged),
    )


def _parse_record(data: object) -> CheckpointRecord:
    fields = Fields(data, f"`records` of `{SIDECAR_NAME}`", SidecarError)
    return CheckpointRecord(
        step=fields.integer("step"),
        sequence=fields.integer("sequence"),
        metric=fields.number_or_none("metric"),
        in_lineage=fields.boolean("in_lineage"),
    )


def _parse_external(data: object) -> ExternalRecord:
    fields = Fields(data, f"`elsewhere` of `{SIDECAR_NAME}`", SidecarError)
    return ExternalRecord(
        path=fields.path("path"),
        step=fields.integer("step"),
        sequence=fields.integer_or_none("sequence"),
        metric=fields.number_or_none("metric"),
    )


def _parse_span(data: object) -> tuple[int, int]:
    first, last = Fields({"span": data}, f"`lineage` of `{SIDECAR_NAME}`", SidecarError).integers(
        "span", limit=2, least=2
    )
    return first, last
