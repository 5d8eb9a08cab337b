"""Whether a checkpoint is complete, and if not, what is wrong with it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hf_divguard.storage.contents import (
    foreign_layout,
    has_training_state,
    judge_contents,
    problems_sentence,
    weight_files,
)
from hf_divguard.storage.fields import Quarantine
from hf_divguard.storage.layout import INCOMPLETE_NAME, MANIFEST_NAME, SIDECAR_NAME, checkpoint_step
from hf_divguard.storage.manifest import Manifest, ManifestError, manifest_problems, read_manifest
from hf_divguard.storage.sidecar import Sidecar, SidecarError, read_sidecar

__all__ = ["Status", "Verdict", "verify_checkpoint", "verify_with_records"]

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
    """

    status: Status
    reason: str
    problems: tuple[str, ...] = ()
    loadable: bool = False
    resumable: bool = False
    has_manifest: bool = False


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
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            return (
                Verdict("incomplete", f"{shown} is a file, not a folder.", ("it is not a folder",)),
                None,
                None,
            )
        sidecar, sidecar_error = _sidecar_or_error(folder)
        manifest, manifest_error = _manifest_or_error(folder)
        verdict = _judge(folder, checksums, sidecar, sidecar_error, manifest, manifest_error)
        return verdict, manifest, sidecar
    except (FileNotFoundError, NotADirectoryError):
        return Verdict("incomplete", f"There is no folder {shown}.", ("the folder is missing",)), None, None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return (
            Verdict("incomplete", f"{shown} cannot be read: {reason}.", (f"it cannot be read ({reason})",)),
            None,
            None,
        )


def _sidecar_or_error(folder: Path) -> tuple[Sidecar | None, SidecarError | None]:
    try:
        return read_sidecar(folder), None
    except FileNotFoundError:
        return None, None
    except SidecarError as error:
        return None, error
    except OSError as error:
        return None, SidecarError(f"`{SIDECAR_NAME}` cannot be read: {error.strerror or error}.")


def _manifest_or_error(folder: Path) -> tuple[Manifest | None, ManifestError | None]:
    try:
        return read_manifest(folder), None
    except FileNotFoundError:
        return None, None
    except ManifestError as error:
        return None, error
    except OSError as error:
        return None, ManifestError(f"`{MANIFEST_NAME}` cannot be read: {error.strerror or error}.")


def _judge(
    folder: Path,
    checksums: bool | None,
    sidecar: Sidecar | None,
    sidecar_error: SidecarError | None,
    manifest: Manifest | None,
    manifest_error: ManifestError | None,
) -> Verdict:
    verdict = _judge_files(folder, checksums, sidecar, sidecar_error, manifest, manifest_error)
    for record in (manifest, sidecar):
        if record is not None and record.quarantine is not None:
            return replace(
                verdict, status="quarantined", reason=_quarantine_sentence(record.quarantine), resumable=False
            )
    return verdict


def _quarantine_sentence(note: Quarantine) -> str:
    onset = "" if note["onset_step"] is None else f" (from step {note['onset_step']} on)"
    return f"It was marked as never to be resumed{onset}: {note['reason']}"


def _judge_files(
    folder: Path,
    checksums: bool | None,
    sidecar: Sidecar | None,
    sidecar_error: SidecarError | None,
    manifest: Manifest | None,
    manifest_error: ManifestError | None,
) -> Verdict:
    has_manifest = manifest is not None
    for error in (manifest_error, sidecar_error if manifest is None else None):
        if error is not None:
            return Verdict("unknown" if error.newer else "incomplete", str(error), (str(error),))
    if os.path.lexists(folder / INCOMPLETE_NAME):
        problem = f"`{INCOMPLETE_NAME}` says that its save did not finish"
        return Verdict("incomplete", problem + ".", (problem,), has_manifest=has_manifest)
    if manifest is not None:
        return _judge_by_manifest(folder, manifest, checksums)
    if sidecar is not None and sidecar.manifest_expected:
        problem = f"`{MANIFEST_NAME}` is missing: the save or the removal of this checkpoint did not finish"
        return Verdict("incomplete", problem + ".", (problem,))
    found = judge_contents(folder, step=checkpoint_step(folder.name), read_all=checksums is True)
    return Verdict(found.status, found.reason, found.problems, found.loadable, found.resumable)


def _judge_by_manifest(folder: Path, manifest: Manifest, checksums: bool | None) -> Verdict:
    problems = manifest_problems(folder, manifest, checksums=checksums)
    layout = foreign_layout(manifest.files)
    weights = weight_files(manifest.files)
    loadable = (bool(weights) or layout is not None) and problems.keys().isdisjoint(weights)
    if problems:
        words = tuple(problems.values())
        return Verdict(
            "incomplete", problems_sentence(list(words)), words, loadable and layout is None, False, True
        )
    resumable = loadable and (has_training_state(manifest.files) or layout is not None)
    compared = "size" if checksums is False or not _has_checksums(manifest) else "size and checksum"
    reason = f"All {len(manifest.files)} files of its manifest are there with their {compared}."
    if not resumable:
        reason = reason[:-1] + ", but training cannot go on from it: no optimizer's state was saved."
    return Verdict("complete", reason, (), loadable, resumable, True)


def _has_checksums(manifest: Manifest) -> bool:
    return any(entry.sha256 is not None for entry in manifest.files.values())
