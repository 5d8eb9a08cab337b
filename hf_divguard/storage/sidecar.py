"""The sidecar of a checkpoint: its metric, its place in the run's history, the state of callbacks."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_divguard._version import __version__
from hf_divguard.core.retention import CheckpointRecord
from hf_divguard.storage.jsonio import encode_json, from_strict, read_json, to_strict, write_bytes_atomic
from hf_divguard.storage.names import SIDECAR_NAME
from hf_divguard.storage.record import FORMAT_VERSION, Fields, Quarantine, RecordError, sealed

__all__ = [
    "WRITER",
    "CheckpointRecord",
    "Sidecar",
    "SidecarError",
    "encode_sidecar",
    "read_sidecar",
    "write_sidecar",
]

WRITER = f"hf_divguard {__version__}"
"""Who writes our files, with the version."""

_MAX_BYTES = 64 << 20
_MAX_DEPTH = 64
_MAX_RECORDS = 100_000
_MAX_CALLBACKS = 10_000


class SidecarError(RecordError):
    """A sidecar is broken, breaks a limit, or has a format of the future."""


@dataclass(frozen=True, slots=True)
class Sidecar:
    """Everything that ``divguard_state.json`` holds.

    Args:
        step: Optimizer step of the checkpoint.
        run_id: Name of the run that saved it.
        sequence: Grows with every save in one run folder, over all runs.
        metric_name: Name of the metric that ranks checkpoints.
        metric: Its value at this very step.
        greater_is_better: Its direction.
        records: Every checkpoint folder that stood beside this one when it was saved, in the
            order of saving, this one last. It is the ranking memory, and it gives the age of
            folders that have no sidecar.
        callbacks: State of each callback, by name.
        manifest_expected: Whether a manifest follows. Without it such a checkpoint is incomplete.
        quarantine: Why this checkpoint must never be resumed; ``None`` for a good one.
        writer: Name and version of the program that wrote it.
    """

    step: int
    run_id: str
    sequence: int
    metric_name: str | None = None
    metric: float | None = None
    greater_is_better: bool | None = None
    records: tuple[CheckpointRecord, ...] = ()
    callbacks: dict[str, Any] = field(default_factory=dict)
    manifest_expected: bool = False
    quarantine: Quarantine | None = None
    writer: str = WRITER


def write_sidecar(folder: str | os.PathLike[str], sidecar: Sidecar, *, flush: bool = False) -> None:
    """Write ``sidecar`` into the checkpoint ``folder``, replacing an older one in one step.

    Args:
        folder: The checkpoint folder; it must exist.
        sidecar: What to write. Callback states may hold whatever ``to_strict`` takes.
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


def encode_sidecar(sidecar: Sidecar) -> bytes:
    """Return the bytes that ``write_sidecar`` writes.

    Raises:
        TypeError: If a callback's state holds what JSON cannot; the message says where.
        ValueError: If it could not be read again: a negative step, a text of several lines, more
            than 64 MiB.
    """
    plain = {
        name: to_strict(getattr(sidecar, name))
        for name in Sidecar.__slots__
        if name not in ("records", "callbacks")
    }
    data = {
        "format": FORMAT_VERSION,
        **plain,
        "records": [to_strict(asdict(record)) for record in sidecar.records],
        "callbacks": {name: to_strict(state) for name, state in sidecar.callbacks.items()},
    }
    _parse(data)
    return encode_json(sealed(data), max_bytes=_MAX_BYTES, max_depth=_MAX_DEPTH)


def read_sidecar(folder: str | os.PathLike[str]) -> Sidecar:
    """Read the sidecar of the checkpoint in ``folder``.

    Raises:
        FileNotFoundError: If it has none.
        SidecarError: If it is broken, breaks a limit, or a newer version wrote it.
        OSError: If it cannot be read.
    """
    path = Path(folder, SIDECAR_NAME)
    try:
        data = read_json(path, max_bytes=_MAX_BYTES, max_depth=_MAX_DEPTH)
        return _parse(data)
    except SidecarError:
        raise
    except ValueError as error:
        raise SidecarError(str(error)) from None


def _parse(data: dict[str, Any]) -> Sidecar:
    fields = Fields(data, f"`{SIDECAR_NAME}`", SidecarError)
    fields.check_format()
    return Sidecar(
        step=fields.integer("step"),
        run_id=fields.text("run_id"),
        sequence=fields.integer("sequence"),
        metric_name=fields.text_or_none("metric_name"),
        metric=fields.number_or_none("metric"),
        greater_is_better=fields.boolean_or_none("greater_is_better"),
        records=tuple(_parse_record(entry) for entry in fields.entries("records", limit=_MAX_RECORDS)),
        callbacks={
            name: from_strict(state)
            for name, state in fields.mapping("callbacks", limit=_MAX_CALLBACKS).items()
        },
        manifest_expected=fields.boolean("manifest_expected"),
        quarantine=fields.quarantine(),
        writer=fields.text("writer"),
    )


def _parse_record(data: object) -> CheckpointRecord:
    fields = Fields(data, f"`records` of `{SIDECAR_NAME}`", SidecarError)
    return CheckpointRecord(
        step=fields.integer("step"),
        sequence=fields.integer("sequence"),
        metric=fields.number_or_none("metric"),
        in_lineage=fields.boolean("in_lineage"),
    )
