"""Marking a checkpoint as one that must not be resumed, or as one that may be ruined."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

from hf_divguard.storage.checksums import digest_of
from hf_divguard.storage.failpoints import failpoint
from hf_divguard.storage.jsonio import write_bytes_atomic
from hf_divguard.storage.manifest import FileEntry, Manifest, ManifestError, encode_manifest, read_manifest
from hf_divguard.storage.names import MANIFEST_NAME, SIDECAR_NAME, checkpoint_step
from hf_divguard.storage.record import Quarantine
from hf_divguard.storage.regular_files import flush_folder
from hf_divguard.storage.sidecar import Sidecar, SidecarError, encode_sidecar, read_sidecar

__all__ = ["clear_suspect", "mark_suspect", "quarantine", "quarantine_note"]


def quarantine_note(reason: str, onset_step: int | None = None, now: float | None = None) -> Quarantine:
    """Return what a manifest or a sidecar says of a quarantined or suspect checkpoint.

    Args:
        reason: One sentence for a person.
        onset_step: First bad step, where known.
        now: Seconds since 1970; ``None`` takes the clock.
    """
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    return {"reason": _one_line(reason), "onset_step": onset_step, "time": when}


def quarantine(
    folder: str | os.PathLike[str],
    *,
    reason: str,
    onset_step: int | None = None,
    now: float | None = None,
    flush: bool = False,
) -> None:
    """Make the checkpoint in ``folder`` one that is never resumed, and note why.

    The new manifest comes first, then the sidecar; either alone is enough for a reader. With
    neither, a sidecar is written. The folder keeps its time of change, by which the Trainer's
    own rotation orders folders.

    Args:
        folder: The checkpoint folder.
        reason: One sentence for a person.
        onset_step: First bad step, where known.
        now: Seconds since 1970; ``None`` takes the clock.
        flush: Wait until it is on the disk.

    Raises:
        OSError: If a file could not be read or written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     quarantine(folder, reason="The loss diverged from step 35 on.", onset_step=35, now=0)
        ...     read_sidecar(folder).quarantine["onset_step"]
        35
    """
    note = quarantine_note(reason, onset_step, now)
    _annotate(Path(folder), {"quarantine": note}, flush=flush)
    failpoint("checkpoint quarantined")


def mark_suspect(
    folder: str | os.PathLike[str],
    *,
    reason: str,
    onset_step: int | None = None,
    now: float | None = None,
    flush: bool = False,
) -> None:
    """Note in the checkpoint in ``folder`` that it was saved under a fault that may have ruined it.

    It is then passed over as ``quarantine`` does, until :func:`clear_suspect`. The arguments are
    those of :func:`quarantine`.

    Raises:
        OSError: If a file could not be read or written.
    """
    _annotate(Path(folder), {"suspect": quarantine_note(reason, onset_step, now)}, flush=flush)
    failpoint("checkpoint marked as suspect")


def clear_suspect(folder: str | os.PathLike[str], *, flush: bool = False) -> None:
    """Take back :func:`mark_suspect`: the fault ended without harm. A checkpoint without a mark is left as it is.

    Killed in between, the checkpoint stays suspect.

    Raises:
        OSError: If a file could not be read or written.
    """
    _annotate(Path(folder), {"suspect": None}, flush=flush)
    failpoint("suspect cleared")


def _annotate(folder: Path, notes: dict[str, Quarantine | None], *, flush: bool) -> None:
    """Write ``notes`` into manifest and sidecar, and the new size of the sidecar into the manifest."""
    before = os.stat(folder)
    manifest = sidecar = None
    with contextlib.suppress(FileNotFoundError, ManifestError):
        manifest = read_manifest(folder)
    with contextlib.suppress(FileNotFoundError, SidecarError):
        sidecar = read_sidecar(folder)
    is_clearing = not any(notes.values())
    if is_clearing and not any(record is not None and record.suspect for record in (manifest, sidecar)):
        return
    if sidecar is None:
        sidecar = _sidecar_without_history(folder, manifest)
    sidecar_data = encode_sidecar(replace(sidecar, damaged=(), **notes))  # type: ignore[arg-type]
    new = {SIDECAR_NAME: sidecar_data}
    if manifest is not None:
        has_digests = any(entry.digest for entry in manifest.files.values())
        digest = digest_of(sidecar_data, manifest.algorithm) if has_digests else None
        files = {**manifest.files, SIDECAR_NAME: FileEntry(len(sidecar_data), digest)}
        # A mark counts from the first file on. Taking it back counts only when both files agree.
        data = encode_manifest(replace(manifest, files=files, **notes))  # type: ignore[arg-type]
        new = {**new, MANIFEST_NAME: data} if is_clearing else {MANIFEST_NAME: data, **new}
    for name, data in new.items():
        write_bytes_atomic(folder / name, data, flush=flush)
        failpoint("note written")
    with contextlib.suppress(OSError):
        os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
        if flush:
            flush_folder(folder)


def _sidecar_without_history(folder: Path, manifest: Manifest | None) -> Sidecar:
    """Return a sidecar for a folder that has no readable one; an empty run id says it knows no order."""
    if manifest is None:
        return Sidecar(step=checkpoint_step(folder.name) or 0, run_id="", sequence=0)
    return Sidecar(manifest.step, manifest.run_id, manifest.sequence, manifest_expected=True)


def _one_line(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)[:1000]
