"""Marking a checkpoint as one that must never be resumed."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

from hf_divguard.storage.jsonio import write_bytes_atomic
from hf_divguard.storage.manifest import FileEntry, Manifest, ManifestError, encode_manifest, read_manifest
from hf_divguard.storage.names import MANIFEST_NAME, SIDECAR_NAME, checkpoint_step
from hf_divguard.storage.record import Quarantine
from hf_divguard.storage.regular_files import flush_folder
from hf_divguard.storage.sidecar import Sidecar, SidecarError, encode_sidecar, read_sidecar

__all__ = ["quarantine", "quarantine_note"]


def quarantine_note(reason: str, onset_step: int | None = None, now: float | None = None) -> Quarantine:
    """Return what a manifest or a sidecar says of a checkpoint that must never be resumed.

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
    """Make the checkpoint in ``folder`` one that is never resumed, and say why in it.

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
        OSError: If neither file could be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     quarantine(folder, reason="The loss diverged from step 35 on.", onset_step=35, now=0)
        ...     read_sidecar(folder).quarantine["onset_step"]
        35
    """
    folder = Path(folder)
    before = os.stat(folder)
    note = quarantine_note(reason, onset_step, now)
    manifest = None
    with contextlib.suppress(FileNotFoundError, ManifestError):
        manifest = read_manifest(folder)
    try:
        sidecar = read_sidecar(folder)
    except (OSError, SidecarError):
        sidecar = _sidecar_without_history(folder, manifest)
    sidecar_data = encode_sidecar(replace(sidecar, quarantine=note))
    if manifest is not None:
        files = {**manifest.files, SIDECAR_NAME: FileEntry(len(sidecar_data))}
        data = encode_manifest(replace(manifest, quarantine=note, files=files))
        write_bytes_atomic(folder / MANIFEST_NAME, data, flush=flush)
    write_bytes_atomic(folder / SIDECAR_NAME, sidecar_data, flush=flush)
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
