"""Whether a checkpoint is complete, and if not, what is wrong with it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

from hf_divguard.storage.contents import judge_contents, problems_sentence
from hf_divguard.storage.layout import foreign_layout, has_training_state, weight_files
from hf_divguard.storage.layouts import layout_of
from hf_divguard.storage.manifest import Manifest, read_manifest
from hf_divguard.storage.manifest_check import check_manifest
from hf_divguard.storage.names import INCOMPLETE_NAME, MANIFEST_NAME, SIDECAR_NAME, checkpoint_step
from hf_divguard.storage.record import Quarantine, RecordError
from hf_divguard.storage.regular_files import error_words, is_unreadable
from hf_divguard.storage.sidecar import Sidecar, read_sidecar
from hf_divguard.storage.verdict import Status, Verdict

__all__ = ["Status", "Verdict", "verify_checkpoint", "verify_with_record"]

_R = TypeVar("_R", Manifest, Sidecar)


def verify_checkpoint(path: str | os.PathLike[str], *, checksums: bool | None = None) -> Verdict:
    """Return whether the checkpoint in the folder ``path`` is complete, and if not, what is wrong.

    A manifest decides if there is one. A checkpoint without one, as the Trainer alone writes
    it, is judged by its contents: the files that belong to it, JSON that parses, safetensors
    as long as their header says, archives with their end. Nothing is unpickled and no tensor is
    loaded. Links to files are read through.

    Args:
        path: The folder. Its name does not matter, but if it is ``checkpoint-<step>``, the
            contents must be of that step.
        checksums: Whether to read the files completely and compare checksums. ``None`` does so
            where the manifest has them; ``False`` compares sizes alone; ``True`` also reads the
            archives of a checkpoint without a manifest.

    Returns:
        The verdict; a path that is no checkpoint at all gets one too.

    Example:
        >>> verdict = verify_checkpoint("no-such-folder")
        >>> verdict.status, verdict.reason
        ('incomplete', "There is no folder 'no-such-folder'.")
    """
    return verify_with_record(path, checksums=checksums)[0]


def verify_with_record(
    path: str | os.PathLike[str], *, checksums: bool | None = None, sizes: Mapping[str, int] | None = None
) -> tuple[Verdict, Manifest | Sidecar | None]:
    """Return the verdict with the manifest that it rests on, or the sidecar where there is no manifest.

    ``sizes`` are those of regular files directly in the folder, by name, if they have just been looked at.
    """
    shown = repr(os.fspath(path))
    folder = os.path.abspath(path)
    record: Manifest | Sidecar | None = None
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            problem = "it is not a folder"
            return Verdict("incomplete", f"{shown} is a file, not a folder.", (problem,)), None
        found = _read_records(folder)
        record = found.manifest or found.sidecar
        return _judge(folder, found, checksums, sizes), record
    except (FileNotFoundError, NotADirectoryError):
        what = "The link {} leads nowhere." if os.path.islink(path) else "There is no folder {}."
        return Verdict("incomplete", what.format(shown), ("the folder is missing",)), record
    except (OSError, ValueError) as error:
        status: Status = "unreadable" if isinstance(error, OSError) and is_unreadable(error) else "incomplete"
        problem = f"cannot be read: {error_words(error)}"
        return Verdict(status, f"{shown} {problem}.", (f"it {problem}",)), record


@dataclass(frozen=True, slots=True)
class _Records:
    """Our two files in a checkpoint folder, or why one that is there cannot be used.

    The sidecar is read only where no manifest speaks: the manifest holds all that counts here.
    """

    manifest: Manifest | None = None
    sidecar: Sidecar | None = None
    manifest_error: RecordError | None = None
    sidecar_error: RecordError | None = None


def _read_records(folder: str) -> _Records:
    manifest, manifest_error = _read(read_manifest, folder)
    if manifest is not None:
        return _Records(manifest)
    sidecar, sidecar_error = _read(read_sidecar, folder)
    return _Records(manifest, sidecar, manifest_error, sidecar_error)


def _read(reader: Callable[[str], _R], folder: str) -> tuple[_R | None, RecordError | None]:
    try:
        return reader(folder), None
    except FileNotFoundError:
        return None, None
    except RecordError as error:
        return None, error
    except OSError as error:
        if is_unreadable(error):
            raise
        return None, RecordError(
            f"A file of {os.path.basename(folder)} cannot be read: {error_words(error)}."
        )


def _judge(folder: str, found: _Records, checksums: bool | None, sizes: Mapping[str, int] | None) -> Verdict:
    verdict = _judge_files(folder, found, checksums, sizes)
    record = found.manifest or found.sidecar
    if record is None:
        return verdict
    if record.quarantine is not None:
        reason = _sentence("It is quarantined: it was saved after a divergence", record.quarantine)
        return replace(verdict, status="quarantined", reason=reason, resumable=False)
    is_whole = verdict.status == "complete" or verdict.lacks_only_sidecar
    if record.suspect is not None and is_whole:
        reason = _sentence("It is suspect: it was saved under a fault", record.suspect)
        return replace(verdict, status="suspect", reason=reason)
    return verdict


def _sentence(start: str, note: Quarantine) -> str:
    onset = "" if note["onset_step"] is None else f" (from step {note['onset_step']} on)"
    return f"{start}{onset}. {note['reason'][:1].upper()}{note['reason'][1:]}"


def _judge_files(
    folder: str, found: _Records, checksums: bool | None, sizes: Mapping[str, int] | None
) -> Verdict:
    if found.manifest_error is not None:
        problem = str(found.manifest_error)
        return Verdict("unknown" if found.manifest_error.newer else "incomplete", problem, (problem,))
    is_marked = os.path.lexists(f"{folder}/{INCOMPLETE_NAME}")
    if found.sidecar_error is not None:
        # The sidecar holds the states of callbacks. Whether the rest is there, the contents say.
        status: Status = "unknown" if found.sidecar_error.newer else "incomplete"
        rest = judge_contents(
            folder, step=checkpoint_step(os.path.basename(folder)), read_all=checksums is True
        )
        can_resume = rest.status == "complete" and rest.resumable and not is_marked
        problem = str(found.sidecar_error)
        return Verdict(status, problem, (problem,), rest.loadable, lacks_only_sidecar=can_resume)
    if is_marked:
        problem = f"`{INCOMPLETE_NAME}` says that its save did not finish"
        return Verdict("incomplete", problem + ".", (problem,), has_manifest=found.manifest is not None)
    if found.manifest is not None:
        return _judge_by_manifest(folder, found.manifest, checksums, sizes)
    if found.sidecar is not None and found.sidecar.manifest_expected:
        problem = f"`{MANIFEST_NAME}` is missing: the save or the deletion of this checkpoint did not finish"
        return Verdict("incomplete", problem + ".", (problem,))
    return judge_contents(folder, step=checkpoint_step(os.path.basename(folder)), read_all=checksums is True)


@lru_cache(maxsize=64)
def _kinds_of(names: tuple[str, ...]) -> tuple[str | None, list[str], bool]:
    """Return layout, weight files, and whether there is a training state; most checkpoints of a run are alike."""
    known = layout_of(names)
    layout = foreign_layout(names) if known is None else known.name
    return layout, weight_files(names), has_training_state(names)


def _judge_by_manifest(
    folder: str, manifest: Manifest, checksums: bool | None, sizes: Mapping[str, int] | None
) -> Verdict:
    problems = check_manifest(folder, manifest, checksums=checksums, sizes=sizes)
    layout, weights, has_state = _kinds_of(tuple(manifest.files))
    loadable = (bool(weights) or layout is not None) and problems.keys().isdisjoint(weights)
    resumable = loadable and (layout is not None or has_state)
    if problems:
        words = tuple(problems.values())
        return Verdict(
            "incomplete",
            problems_sentence(words),
            words,
            loadable and layout is None,
            has_manifest=True,
            lacks_only_sidecar=resumable and problems.keys() == {SIDECAR_NAME},
        )
    has_checksums = any(entry.digest is not None for entry in manifest.files.values())
    compared = "size and checksum" if has_checksums and checksums is not False else "size"
    reason = f"All {len(manifest.files)} files of its manifest are there with their {compared}."
    if not resumable:
        reason = reason[:-1] + ", but training cannot go on from it: no optimizer's state was saved."
    return Verdict("complete", reason, (), loadable, resumable, True)
