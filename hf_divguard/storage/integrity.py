"""Whether a checkpoint is complete, and if not, what is wrong with it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from hf_divguard.storage.contents import (
    foreign_layout,
    has_training_state,
    judge_contents,
    problems_sentence,
    weight_files,
)
from hf_divguard.storage.manifest import Manifest, manifest_problems, read_manifest
from hf_divguard.storage.names import INCOMPLETE_NAME, MANIFEST_NAME, SIDECAR_NAME, checkpoint_step
from hf_divguard.storage.record import Quarantine, RecordError
from hf_divguard.storage.sidecar import Sidecar, read_sidecar

__all__ = ["Status", "Verdict", "verify_checkpoint", "verify_with_records"]

_R = TypeVar("_R")

Status = Literal["complete", "incomplete", "quarantined", "unknown"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a checkpoint counts, and why.

    Args:
        status: ``"complete"``, ``"incomplete"``, ``"quarantined"`` (marked as never to be
            resumed) or ``"unknown"`` (a way of saving that cannot be judged by its files).
        reason: One sentence for a person.
        problems: What is wrong, each in words; empty for a complete one.
        loadable: Whether the model's weights are there and whole.
        resumable: Whether training can go on from it.
        has_manifest: Whether it was judged by its manifest.
        lacks_only_sidecar: Whether it is incomplete for its sidecar alone: training can go on from
            it at need, but callbacks start anew.
    """

    status: Status
    reason: str
    problems: tuple[str, ...] = ()
    loadable: bool = False
    resumable: bool = False
    has_manifest: bool = False
    lacks_only_sidecar: bool = False


def verify_checkpoint(path: str | os.PathLike[str], *, checksums: bool | None = None) -> Verdict:
    """Say whether the checkpoint in the folder ``path`` is complete, and if not, what is wrong.

    A manifest decides if there is one. A checkpoint without one, as the Trainer alone writes
    it, is judged by its contents: the files that belong to it, JSON that parses, safetensors
    as long as their header says, archives with their end. Nothing is unpickled, no tensor is
    loaded, and nothing outside the folder is read.

    Args:
        path: The folder. Its name does not matter, but if it is ``checkpoint-<step>``, the
            contents must be of that step.
        checksums: Whether to read the files whole and compare checksums. ``None`` does so where
            the manifest has them; ``False`` compares sizes alone; ``True`` also reads the
            archives of a checkpoint without a manifest.

    Returns:
        The verdict; a path that is no checkpoint at all gets one too.

    Example:
        >>> verdict = verify_checkpoint("no-such-folder")
        >>> verdict.status, verdict.reason
        ('incomplete', "There is no folder 'no-such-folder'.")
    """
    return verify_with_records(path, checksums=checksums)[0]


def verify_with_records(
    path: str | os.PathLike[str], *, checksums: bool | None = None
) -> tuple[Verdict, Manifest | None, Sidecar | None]:
    """Return the verdict with the manifest and the sidecar it rests on, where they can be read."""
    shown = repr(os.fspath(path))
    folder = Path(os.path.abspath(path))
    found = _Records()
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            verdict = Verdict("incomplete", f"{shown} is a file, not a folder.", ("it is not a folder",))
        else:
            found = _read_records(folder)
            verdict = _judge(folder, found, checksums)
    except (FileNotFoundError, NotADirectoryError):
        verdict = Verdict("incomplete", f"There is no folder {shown}.", ("the folder is missing",))
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        verdict = Verdict("incomplete", f"{shown} {problem}.", (f"it {problem}",))
    return verdict, found.manifest, found.sidecar


@dataclass(frozen=True, slots=True)
class _Records:
    """Our two files in a checkpoint folder, or why one that is there cannot be used."""

    manifest: Manifest | None = None
    sidecar: Sidecar | None = None
    manifest_error: RecordError | None = None
    sidecar_error: RecordError | None = None


def _read_records(folder: Path) -> _Records:
    manifest, manifest_error = _read(read_manifest, folder, MANIFEST_NAME)
    sidecar, sidecar_error = _read(read_sidecar, folder, SIDECAR_NAME)
    return _Records(manifest, sidecar, manifest_error, sidecar_error)


def _read(reader: Callable[[Path], _R], folder: Path, name: str) -> tuple[_R | None, RecordError | None]:
    try:
        return reader(folder), None
    except FileNotFoundError:
        return None, None
    except RecordError as error:
        return None, error
    except OSError as error:
        return None, RecordError(f"`{name}` cannot be read: {error.strerror or error}.")


def _judge(folder: Path, found: _Records, checksums: bool | None) -> Verdict:
    verdict = _judge_files(folder, found, checksums)
    for record in (found.manifest, found.sidecar):
        if record is not None and record.quarantine is not None:
            sentence = _quarantine_sentence(record.quarantine)
            return replace(verdict, status="quarantined", reason=sentence, resumable=False)
    return verdict


def _quarantine_sentence(note: Quarantine) -> str:
    onset = "" if note["onset_step"] is None else f" (from step {note['onset_step']} on)"
    return f"It was marked as never to be resumed{onset}: {note['reason']}"


def _judge_files(folder: Path, found: _Records, checksums: bool | None) -> Verdict:
    for error in (found.manifest_error, found.sidecar_error if found.manifest is None else None):
        if error is not None:
            status: Status = "unknown" if error.newer else "incomplete"
            if error is found.manifest_error:
                return Verdict(status, str(error), (str(error),))
            # The sidecar alone, which tells of callbacks: whether the rest is there, its contents say.
            rest = judge_contents(folder, step=checkpoint_step(folder.name), read_all=checksums is True)
            is_marked = os.path.lexists(folder / INCOMPLETE_NAME)
            can_resume = rest.status == "complete" and rest.resumable and not is_marked
            return Verdict(status, str(error), (str(error),), rest.loadable, lacks_only_sidecar=can_resume)
    if os.path.lexists(folder / INCOMPLETE_NAME):
        problem = f"`{INCOMPLETE_NAME}` says that its save did not finish"
        return Verdict("incomplete", problem + ".", (problem,), has_manifest=found.manifest is not None)
    if found.manifest is not None:
        return _judge_by_manifest(folder, found.manifest, checksums)
    if found.sidecar is not None and found.sidecar.manifest_expected:
        problem = f"`{MANIFEST_NAME}` is missing: the save or the removal of this checkpoint did not finish"
        return Verdict("incomplete", problem + ".", (problem,))
    judged = judge_contents(folder, step=checkpoint_step(folder.name), read_all=checksums is True)
    return Verdict(judged.status, judged.reason, judged.problems, judged.loadable, judged.resumable)


def _judge_by_manifest(folder: Path, manifest: Manifest, checksums: bool | None) -> Verdict:
    problems = manifest_problems(folder, manifest, checksums=checksums)
    layout = foreign_layout(manifest.files)
    weights = weight_files(manifest.files)
    loadable = (bool(weights) or layout is not None) and problems.keys().isdisjoint(weights)
    resumable = loadable and (has_training_state(manifest.files) or layout is not None)
    if problems:
        words = tuple(problems.values())
        return Verdict(
            "incomplete",
            problems_sentence(list(words)),
            words,
            loadable and layout is None,
            has_manifest=True,
            lacks_only_sidecar=resumable and problems.keys() == {SIDECAR_NAME},
        )
    compared = "size" if checksums is False or not _has_checksums(manifest) else "size and checksum"
    reason = f"All {len(manifest.files)} files of its manifest are there with their {compared}."
    if not resumable:
        reason = reason[:-1] + ", but training cannot go on from it: no optimizer's state was saved."
    return Verdict("complete", reason, (), loadable, resumable, True)


def _has_checksums(manifest: Manifest) -> bool:
    return any(entry.sha256 is not None for entry in manifest.files.values())
