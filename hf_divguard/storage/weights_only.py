"""Reducing a checkpoint to its weights: what only a resume needs is deleted, and it stays complete."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from hf_divguard.storage.failpoints import failpoint
from hf_divguard.storage.layout import TRAINING_STATE, foreign_layout
from hf_divguard.storage.layouts import layout_of
from hf_divguard.storage.manifest import Manifest, read_manifest, write_manifest

__all__ = ["reduce_to_weights", "training_state_files", "why_not_reducible"]


def why_not_reducible(folder: str | os.PathLike[str]) -> str | None:
    """Return why the checkpoint in ``folder`` cannot be reduced to its weights, ``None`` if it can.

    Example:
        >>> why_not_reducible("no such folder")
        'it has no manifest'
    """
    if os.path.islink(folder):
        return "a symbolic link is left as it is"
    try:
        names = read_manifest(folder).files
    except FileNotFoundError:
        return "it has no manifest"
    except (OSError, ValueError):
        return "its manifest cannot be read"
    layout = layout_of(names)
    name = layout.name if layout is not None else foreign_layout(names)
    return None if name is None else f"the files of {name} hold more than weights"


def training_state_files(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Return the files in ``folder`` that only a resume needs, with the bytes that deleting them frees.

    Those are optimizer, scheduler, loss scaler and random states. A file that has another name
    elsewhere frees nothing.

    Raises:
        OSError: If the folder cannot be read.
    """
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if TRAINING_STATE.fullmatch(entry.name):
                status = entry.stat(follow_symlinks=False)
                found[entry.name] = status.st_size if status.st_nlink == 1 else 0
    return found


def reduce_to_weights(folder: str | os.PathLike[str]) -> int:
    """Delete what only a resume needs from the checkpoint in ``folder``; return the bytes that were freed.

    A new manifest that lists the rest is written first. Interrupted after it, the checkpoint is
    complete, and a second call deletes what is left.

    Raises:
        ValueError: If it cannot be reduced; see :func:`why_not_reducible`. Nothing is changed then.
        OSError: If the manifest cannot be written or a file cannot be deleted.
    """
    if (reason := why_not_reducible(folder)) is not None:
        raise ValueError(f"{os.fspath(folder)!r} cannot be reduced to its weights: {reason}.")
    surplus = training_state_files(folder)
    manifest = read_manifest(folder)
    if not surplus.keys().isdisjoint(manifest.files):
        write_manifest(folder, _without(manifest, surplus))
        failpoint("manifest reduced")
    freed = 0
    for name, size in surplus.items():
        Path(folder, name).unlink(missing_ok=True)
        freed += size
    return freed


def _without(manifest: Manifest, names: dict[str, int]) -> Manifest:
    kept = {name: entry for name, entry in manifest.files.items() if name not in names}
    return replace(manifest, files=kept)
