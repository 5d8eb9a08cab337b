"""The manifest of a checkpoint: every file that belongs to it, written last."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_divguard.errors import CheckpointSaveError
from hf_divguard.storage.jsonio import encode_json, read_json, to_strict, write_bytes_atomic
from hf_divguard.storage.names import (
    INCOMPLETE_NAME,
    MANIFEST_NAME,
    TEMPORARY_PREFIX,
    checkpoint_step,
)
from hf_divguard.storage.record import FORMAT_VERSION, Fields, Quarantine, RecordError, sealed
from hf_divguard.storage.regular_files import file_sha256, flush_tree, kind_in_words, list_files, named_file
from hf_divguard.storage.sidecar import WRITER

__all__ = [
    "FileEntry",
    "Manifest",
    "ManifestError",
    "build_manifest",
    "check_manifest",
    "encode_manifest",
    "manifest_problems",
    "read_manifest",
    "remove_manifest",
    "write_manifest",
]

_MAX_BYTES = 64 << 20
_MAX_DEPTH = 8
_MAX_FILES = 200_000
_MAX_RANKS = 100_000
_LONGEST_NAME = 4096
_MAX_LEVELS = 100
_DRIVE = re.compile(r"[A-Za-z]:")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ManifestError(RecordError):
    """A manifest is broken, breaks a limit, or has a format of the future."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint: its size in bytes and, if asked for, its SHA-256."""

    size: int
    sha256: str | None = None


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
        ranks: The processes that wrote into this folder: all of them on a shared disk.
        quarantine: Why this checkpoint must never be resumed; ``None`` for a good one.
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
    ranks: tuple[int, ...] = (0,)
    quarantine: Quarantine | None = None
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
) -> Manifest:
    """List what stands in ``folder`` now, as the manifest of a checkpoint that is whole.

    Call it when every process has finished writing. Our temporary files and the Trainer's
    marker of an unfinished checkpoint are left out.

    Args:
        folder: The checkpoint folder.
        step: Optimizer step of the checkpoint.
        run_id: Name of the run.
        sequence: Number of this save in the run folder.
        world_size: How many processes train.
        metric_name: Name of the ranking metric.
        metric: Its value at this step.
        greater_is_better: Its direction.
        checksums: Read every file and note its SHA-256. Finds changed bytes later, and costs
            about the time of reading the checkpoint once.
        ranks: The processes that wrote into this folder; ``None`` stands for all.

    Raises:
        CheckpointSaveError: If a process wrote its random state and another did not, or the
            folder holds something that is not a regular file.
        OSError: If the folder cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "trainer_state.json").write_text("{}")
        ...     build_manifest(folder, step=20, run_id="a", sequence=1, world_size=1).files
        {'trainer_state.json': FileEntry(size=2, sha256=None)}
    """
    try:
        sizes, others = list_files(folder, limit=_MAX_FILES)
    except ValueError as error:
        raise CheckpointSaveError(str(error)) from None
    for name, kind in others.items():
        raise CheckpointSaveError(f"A checkpoint must hold only files and folders, found {kind} at {name!r}.")
    for name in (MANIFEST_NAME, INCOMPLETE_NAME):
        sizes.pop(name, None)
    for name in sizes:
        if (problem := _name_problem(name)) is not None:
            raise CheckpointSaveError(f"The file name {name!r} {problem}. Rename it.")
    ranks = tuple(range(world_size)) if ranks is None else tuple(ranks)
    for name in _missing_rng_files(sizes, world_size, ranks):
        raise CheckpointSaveError(
            f"{named_file(name)} must be there before a checkpoint is whole; it was not written."
        )
    files = {
        name: FileEntry(size, file_sha256(Path(folder, name)) if checksums else None)
        for name, size in sizes.items()
    }
    return Manifest(
        step=step,
        run_id=run_id,
        sequence=sequence,
        world_size=world_size,
        metric_name=metric_name,
        metric=metric,
        greater_is_better=greater_is_better,
        files=files,
        ranks=ranks,
    )


def _missing_rng_files(
    names: Iterator[str] | dict[str, int] | dict[str, FileEntry], world_size: int, ranks: Sequence[int]
) -> list[str]:
    """Return the RNG files that ``ranks`` should have written, none if no process wrote one."""
    present = set(names)
    if not any(re.fullmatch(r"rng_state(_[0-9]+)?\.pth", name) for name in present):
        return []
    expected = ["rng_state.pth"] if world_size <= 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    return [name for name in expected if name not in present]


def _name_problem(name: str) -> str | None:
    """Return why ``name`` must not stand in a manifest, ``None`` for a good one."""
    if not name or len(name) > _LONGEST_NAME:
        return f"must have 1 to {_LONGEST_NAME} characters"
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
    write_bytes_atomic(Path(folder, MANIFEST_NAME), data, flush=flush)


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes that ``write_manifest`` writes.

    Raises:
        ManifestError: If they could not be read again.
    """
    data = {
        "format": FORMAT_VERSION,
        **{name: to_strict(getattr(manifest, name)) for name in Manifest.__slots__ if name != "files"},
        "files": {
            name: {"size": entry.size, "sha256": entry.sha256} for name, entry in manifest.files.items()
        },
    }
    _parse(data)
    return encode_json(sealed(data), max_bytes=_MAX_BYTES, max_depth=_MAX_DEPTH)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of the checkpoint in ``folder``.

    Raises:
        FileNotFoundError: If it has none.
        ManifestError: If it is broken, breaks a limit, names a path outside the folder, or a
            newer version wrote it.
        OSError: If it cannot be read.
    """
    try:
        return _parse(read_json(Path(folder, MANIFEST_NAME), max_bytes=_MAX_BYTES, max_depth=_MAX_DEPTH))
    except ManifestError:
        raise
    except ValueError as error:
        raise ManifestError(str(error)) from None


def _parse(data: dict[str, object]) -> Manifest:
    fields = Fields(data, f"`{MANIFEST_NAME}`", ManifestError)
    fields.check_format()
    return Manifest(
        step=fields.integer("step"),
        run_id=fields.text("run_id"),
        sequence=fields.integer("sequence"),
        world_size=fields.integer("world_size"),
        metric_name=fields.text_or_none("metric_name"),
        metric=fields.number_or_none("metric"),
        greater_is_better=fields.boolean_or_none("greater_is_better"),
        files={
            name: _parse_entry(name, entry)
            for name, entry in fields.mapping("files", limit=_MAX_FILES).items()
        },
        ranks=fields.integers("ranks", limit=_MAX_RANKS),
        quarantine=fields.quarantine(),
        writer=fields.text("writer"),
    )


def _parse_entry(name: str, data: object) -> FileEntry:
    shown = ascii(name[:80])
    if (problem := _name_problem(name)) is not None:
        raise ManifestError(f"The file name {shown} in `{MANIFEST_NAME}` {problem}.")
    fields = Fields(data, f"the entry {shown} of `{MANIFEST_NAME}`", ManifestError)
    sha256 = fields.text_or_none("sha256")
    if sha256 is not None and _SHA256.fullmatch(sha256) is None:
        fields.refuse("sha256", "64 hexadecimal digits or null")
    return FileEntry(fields.integer("size"), sha256)


def check_manifest(
    folder: str | os.PathLike[str], manifest: Manifest, *, checksums: bool | None = None
) -> list[str]:
    """Compare the files in ``folder`` with ``manifest``; return what is wrong, in words.

    Args:
        folder: The checkpoint folder.
        manifest: What it should hold. Files that it does not name are not looked at.
        checksums: Whether to read the files and compare their SHA-256. ``None`` does so where
            the manifest has one; ``True`` too; ``False`` compares sizes alone.

    Returns:
        One sentence part per problem; empty if all is as it should be.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     check_manifest(folder, Manifest(step=20, run_id="a", sequence=1, world_size=1,
        ...                                     files={"optimizer.pt": FileEntry(size=9)}))
        ['`optimizer.pt` is missing']
    """
    return list(manifest_problems(folder, manifest, checksums=checksums).values())


def manifest_problems(
    folder: str | os.PathLike[str], manifest: Manifest, *, checksums: bool | None = None
) -> dict[str, str]:
    """Return what ``check_manifest`` does, by the file that each problem is about."""
    folder = Path(folder)
    problems = {
        name: f"{named_file(name)} is missing, also from the manifest"
        for name in _missing_rng_files(manifest.files, manifest.world_size, manifest.ranks)
    }
    step = checkpoint_step(folder.name)
    if step is not None and step != manifest.step:
        problems[MANIFEST_NAME] = f"`{MANIFEST_NAME}` is of step {manifest.step}, not of {folder.name}"
    real_folders: dict[str, bool] = {"": True}
    for name, entry in manifest.files.items():
        if (problem := _file_problem(folder, name, entry, checksums is not False, real_folders)) is not None:
            problems[name] = f"{named_file(name)} {problem}"
    return problems


def _file_problem(
    folder: Path, name: str, entry: FileEntry, checksums: bool, real_folders: dict[str, bool]
) -> str | None:
    if (problem := _name_problem(name)) is not None:
        return problem
    try:
        if not _is_inside(folder, name.rpartition("/")[0], real_folders):
            return "stands behind a symbolic link"
        status = os.lstat(folder / name)
        if not stat.S_ISREG(status.st_mode):
            return f"is {kind_in_words(status.st_mode)} instead of a file"
        if status.st_size != entry.size:
            words = (
                "empty" if status.st_size == 0 else "too short" if status.st_size < entry.size else "too long"
            )
            return f"is {words}: {status.st_size} bytes instead of {entry.size}"
        if checksums and entry.sha256 is not None and file_sha256(folder / name) != entry.sha256:
            return "has other contents than when it was saved: its SHA-256 differs"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return None


def _is_inside(folder: Path, name: str, known: dict[str, bool]) -> bool:
    """Return whether each part of the sub-folder ``name`` is a real folder and no symbolic link."""
    if name not in known:
        known[name] = _is_inside(folder, name.rpartition("/")[0], known) and not stat.S_ISLNK(
            os.lstat(folder / name).st_mode
        )
    return known[name]


def remove_manifest(folder: str | os.PathLike[str]) -> None:
    """Remove the manifest of ``folder``: the checkpoint counts as incomplete until a new one is written.

    Raises:
        OSError: If there is one and it cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(Path(folder, MANIFEST_NAME))
