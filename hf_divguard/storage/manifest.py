"""The manifest of a checkpoint: every file that belongs to it, written last."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from hf_divguard.errors import CheckpointSaveError
from hf_divguard.storage.checksums import ALGORITHM, DIGEST_LENGTHS, file_digests
from hf_divguard.storage.failpoints import failpoint
from hf_divguard.storage.jsonio import encode_json, read_json, to_strict, write_bytes_atomic
from hf_divguard.storage.layout import missing_parts
from hf_divguard.storage.layouts import layout_of
from hf_divguard.storage.names import (
    INCOMPLETE_NAME,
    MANIFEST_NAME,
    TEMPORARY_PREFIX,
)
from hf_divguard.storage.record import (
    FORMAT_VERSION,
    LARGEST_INTEGER,
    LONGEST_PATH,
    Fields,
    Quarantine,
    RecordError,
    sealed,
)
from hf_divguard.storage.regular_files import (
    flush_tree,
    list_files,
    named_file,
)
from hf_divguard.storage.sidecar import WRITER, Sidecar, SidecarError, read_sidecar

__all__ = [
    "FileEntry",
    "Manifest",
    "ManifestError",
    "build_manifest",
    "encode_manifest",
    "missing_rng_files",
    "name_problem",
    "read_manifest",
    "write_manifest",
]

_MAX_BYTES = 64 << 20
_MAX_FILES = 100_000
_MAX_RANKS = 100_000
_MAX_LEVELS = 100
_DIGEST = re.compile(r"[0-9a-f]*")
# Almost every name is of this kind, and then no further question is asked.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,200}(?:\.[A-Za-z0-9_-]{1,200}){0,5}", re.ASCII)
_DRIVE = re.compile(r"[A-Za-z]:")
_RNG_FILE = re.compile(r"rng_state(_[0-9]+)?\.pth")


class ManifestError(RecordError):
    """A manifest is broken, breaks a limit, or has a format of the future."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint: its size in bytes and, if asked for, its checksum."""

    size: int
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that ``divguard_manifest.json`` holds.

    Args:
        step: Optimizer step of the checkpoint.
        run_id: Name of the run that saved it.
        sequence: Grows with every save in one run folder, over all runs.
        world_size: How many processes trained.
        metric_name: Name of the metric that ranks checkpoints.
        metric: Its value at this very step.
        greater_is_better: Its direction.
        files: Every file by its POSIX path inside the folder, the manifest itself left out.
        algorithm: The hash function of the checksums.
        ranks: The processes that wrote into this folder: all of them on a shared disk.
        quarantine: Why this checkpoint must never be resumed; ``None`` for a good one.
        suspect: Why this checkpoint may have been saved under a fault; ``None`` for a good one.
        writer: Name and version of the program that wrote it.
    """

    step: int
    run_id: str
    sequence: int
    world_size: int
    metric_name: str | None = None
    metric: float | None = None
    greater_is_better: bool | None = None
    files: dict[str, FileEntry] = field(default_factory=dict)
    algorithm: str = ALGORITHM
    ranks: tuple[int, ...] = (0,)
    quarantine: Quarantine | None = None
    suspect: Quarantine | None = None
    writer: str = WRITER


def build_manifest(
    folder: str | os.PathLike[str],
    *,
    step: int,
    run_id: str,
    sequence: int,
    world_size: int,
    metric_name: str | None = None,
    metric: float | None = None,
    greater_is_better: bool | None = None,
    checksums: bool = False,
    ranks: Sequence[int] | None = None,
    weights: bool = False,
    training_state: bool = False,
    sidecar: Sidecar | None = None,
) -> Manifest:
    """List what stands in ``folder`` now, as the manifest of a complete checkpoint.

    Call it when every process has finished writing. Our temporary files and the Trainer's
    marker of an unfinished checkpoint are left out. A note in the sidecar that the checkpoint is
    quarantined or suspect is taken over.

    Args:
        folder: The checkpoint folder.
        step: Optimizer step of the checkpoint.
        run_id: Name of the run.
        sequence: Number of this save in the run folder.
        world_size: How many processes train.
        metric_name: Name of the ranking metric.
        metric: Its value at this step.
        greater_is_better: Its direction.
        checksums: Read every file and note its checksum. Finds changed bytes later, and costs
            about the time of reading the checkpoint once.
        ranks: The processes that wrote into this folder; ``None`` stands for all.
        weights: Whether the folder must hold the weights of the model.
        training_state: Whether it must hold optimizer, scheduler, random states and trainer state.
        sidecar: The sidecar that was written into the folder; it is read if it is not given.

    Raises:
        CheckpointSaveError: If something that must be there is missing, a process wrote its random
            state and another did not, or the folder holds something that is not a file.
        OSError: If the folder cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "trainer_state.json").write_text("{}")
        ...     build_manifest(folder, step=20, run_id="a", sequence=1, world_size=1).files
        {'trainer_state.json': FileEntry(size=2, digest=None)}
    """
    sizes = _files_of_checkpoint(folder)
    ranks = tuple(range(world_size)) if ranks is None else tuple(ranks)
    missing = [
        *missing_parts(sizes, weights=weights, training_state=training_state),
        *map(named_file, missing_rng_files(sizes, world_size, ranks)),
    ]
    if (layout := layout_of(sizes)) is not None and (weights or training_state):
        problems = layout.parts(Path(folder), sizes, ranks).problems
        missing += [f"{named_file(name)}, which {problem}," for name, problem in problems.items()]
    if missing:
        raise CheckpointSaveError(
            f"A checkpoint must hold {missing[0]} before it counts as complete. It was not written, or another process "
            f"removed it from {os.fspath(folder)!r}"
        )
    digests = file_digests(folder, sizes) if checksums else {}
    for digest in digests.values():
        if not isinstance(digest, str):
            raise digest
    notes = _notes_of_sidecar(folder) if sidecar is None else (sidecar.quarantine, sidecar.suspect)
    return Manifest(
        step=step,
        run_id=run_id,
        sequence=sequence,
        world_size=world_size,
        metric_name=metric_name,
        metric=metric,
        greater_is_better=greater_is_better,
        files={name: FileEntry(size, digests.get(name)) for name, size in sizes.items()},  # type: ignore[arg-type]
        ranks=ranks,
        quarantine=notes[0],
        suspect=notes[1],
    )


def _files_of_checkpoint(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Return the sizes of the files that belong to a checkpoint; refuse what no manifest can name."""
    try:
        sizes, others = list_files(folder, limit=_MAX_FILES)
    except ValueError as error:
        raise CheckpointSaveError(str(error)) from None
    for name, kind in others.items():
        raise CheckpointSaveError(f"A checkpoint must hold only files and folders, found {kind} at {name!r}.")
    for name in (MANIFEST_NAME, INCOMPLETE_NAME):
        sizes.pop(name, None)
    for name in sizes:
        if (problem := name_problem(name)) is not None:
            raise CheckpointSaveError(f"The file name {name!r} {problem}. Rename it.")
    return sizes


def _notes_of_sidecar(folder: str | os.PathLike[str]) -> tuple[Quarantine | None, Quarantine | None]:
    try:
        sidecar = read_sidecar(folder)
    except (FileNotFoundError, SidecarError):
        return None, None
    return sidecar.quarantine, sidecar.suspect


def missing_rng_files(names: Iterable[str], world_size: int, ranks: Sequence[int]) -> list[str]:
    """Return the RNG files that ``ranks`` should have written, none if no process wrote one."""
    present = {name for name in names if name.startswith("rng_state") and _RNG_FILE.fullmatch(name)}
    if not present:
        return []
    expected = ["rng_state.pth"] if world_size <= 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    return [name for name in expected if name not in present]


@lru_cache(maxsize=4096)
def name_problem(name: str) -> str | None:
    """Return why ``name`` must not stand in a manifest, ``None`` for a good one."""
    if _PLAIN_NAME.fullmatch(name) and name != MANIFEST_NAME:
        return None
    if not name or len(name) > LONGEST_PATH:
        return f"must have 1 to {LONGEST_PATH} characters"
    if "\0" in name or "\\" in name or name.startswith("/") or _DRIVE.match(name):
        return "must be a relative path with forward slashes"
    parts = name.split("/")
    if len(parts) > _MAX_LEVELS or any(part in ("", ".", "..") for part in parts):
        return f"must not lead outside the folder, have empty parts or more than {_MAX_LEVELS}"
    if name == MANIFEST_NAME or name.rpartition("/")[2].startswith(TEMPORARY_PREFIX):
        return "must not be the manifest itself or a temporary file"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return "must be text that the file system can hold"
    return None


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest, *, flush: bool = False) -> None:
    """Write ``manifest`` into ``folder`` in one step; from then on the checkpoint is complete.

    Args:
        folder: The checkpoint folder.
        manifest: What ``build_manifest`` gave.
        flush: Put every file of the folder on the disk first, then the manifest, so that it
            never survives a power cut which its files did not.

    Raises:
        ManifestError: If it could not be read again.
        OSError: If it cannot be written.
    """
    data = encode_manifest(manifest)
    if flush:
        flush_tree(folder)
        failpoint("checkpoint flushed")
    write_bytes_atomic(Path(folder, MANIFEST_NAME), data, flush=flush)
    failpoint("manifest written")


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes that ``write_manifest`` writes.

    Raises:
        ManifestError: If they could not be read again.
    """
    data = {
        "format": FORMAT_VERSION,
        **{name: to_strict(getattr(manifest, name)) for name in Manifest.__slots__ if name != "files"},
        "files": {
            name: {"size": entry.size, "digest": entry.digest} for name, entry in manifest.files.items()
        },
    }
    _parse(data)
    return encode_json(sealed(data), max_bytes=_MAX_BYTES)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of the checkpoint in ``folder``.

    Raises:
        FileNotFoundError: If it has none.
        ManifestError: If it is broken, breaks a limit, names a path outside the folder, or a
            newer version wrote it.
        OSError: If it cannot be read.
    """
    try:
        return _parse(read_json(os.path.join(folder, MANIFEST_NAME), max_bytes=_MAX_BYTES))
    except ManifestError:
        raise
    except (ValueError, RecursionError) as error:
        raise ManifestError(str(error)) from None


def _parse(data: dict[str, object]) -> Manifest:
    fields = Fields(data, f"`{MANIFEST_NAME}`", ManifestError)
    fields.check_format()
    algorithm = fields.text("algorithm")
    if algorithm not in DIGEST_LENGTHS:
        fields.refuse("algorithm", f"one of {sorted(DIGEST_LENGTHS)}")
    return Manifest(
        step=fields.integer("step"),
        run_id=fields.text("run_id"),
        sequence=fields.integer("sequence"),
        world_size=fields.integer("world_size"),
        metric_name=fields.text_or_none("metric_name"),
        metric=fields.number_or_none("metric"),
        greater_is_better=fields.boolean_or_none("greater_is_better"),
        files={
            name: _parse_entry(name, entry, algorithm)
            for name, entry in fields.mapping("files", limit=_MAX_FILES).items()
        },
        algorithm=algorithm,
        ranks=fields.integers("ranks", limit=_MAX_RANKS),
        quarantine=fields.note("quarantine"),
        suspect=fields.note("suspect"),
        writer=fields.text("writer"),
    )


def _parse_entry(name: str, data: object, algorithm: str) -> FileEntry:
    if (problem := name_problem(name)) is not None:
        raise ManifestError(f"The file name {name[:80]!a} in `{MANIFEST_NAME}` {problem}.")
    size = data.get("size") if isinstance(data, dict) else None
    digest = data.get("digest") if isinstance(data, dict) else None
    if type(size) is int and 0 <= size <= LARGEST_INTEGER:
        if digest is None:
            return FileEntry(size)
        if isinstance(digest, str) and len(digest) == DIGEST_LENGTHS[algorithm] and _DIGEST.fullmatch(digest):
            return FileEntry(size, digest)
    raise ManifestError(
        f"The entry {name[:80]!a} of `{MANIFEST_NAME}` must hold a size in bytes and a checksum or null."
    )
