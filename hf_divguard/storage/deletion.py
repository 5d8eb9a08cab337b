"""Deleting a checkpoint so that, interrupted anywhere, no part of it counts as a checkpoint."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

from hf_divguard.storage.failpoints import failpoint
from hf_divguard.storage.names import (
    DELETING_PREFIX,
    MANIFEST_NAME,
    SIDECAR_NAME,
    checkpoint_step,
)
from hf_divguard.storage.trainer_state import TRAINER_STATE_NAME

__all__ = ["delete_checkpoint", "remove_tree"]

# Network file systems keep a removed file's name while another process has it open, and virus
# scanners hold files for a moment. Five tries over 1.5 seconds outlast both.
_PAUSES_SECONDS = (0.05, 0.15, 0.4, 0.9)
_PASSING = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, getattr(errno, "ESTALE", errno.EBUSY)})
if os.name == "nt":
    _PASSING |= {errno.EACCES, errno.EPERM}


def delete_checkpoint(path: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> None:
    """Delete the checkpoint in the folder ``path``, which stands directly in ``output_dir``.

    The folder is first renamed to a name that no reader takes for a checkpoint, which happens
    at once or not at all; ``staging.recover`` finishes a deletion that was interrupted. Where
    folders cannot be renamed, the files go one by one in an order that keeps the rest from
    counting: the manifest, then ``trainer_state.json``, without which neither the Trainer nor
    we take the folder for complete, and the sidecar, which says that a manifest is missing, last.

    A folder that is gone already is fine. Files that vanish meanwhile, and folders that are
    not empty or busy for a moment, are tried again.

    Args:
        path: The folder, named ``checkpoint-<step>``.
        output_dir: The run folder it must stand in.

    Raises:
        ValueError: If ``path`` is not such a folder: another name, another place, a symbolic
            link (what it leads to belongs to someone else) or a file. Nothing has been touched then.
        OSError: If something is left that cannot be removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     Path(run, "checkpoint-20").mkdir()
        ...     delete_checkpoint(Path(run, "checkpoint-20"), run)
        ...     os.listdir(run)
        []
    """
    folder = _checked(Path(path), Path(output_dir))
    if folder is None:
        return
    target = folder.with_name(f"{DELETING_PREFIX}{checkpoint_step(folder.name)}")
    try:
        remove_tree(target)  # what an earlier removal of the same step left
        os.rename(folder, target)
    except FileNotFoundError:
        return
    except OSError:
        target = folder
    else:
        failpoint("deletion renamed")
    remove_tree(target)
    failpoint("checkpoint deleted")


def _checked(path: Path, output_dir: Path) -> Path | None:
    """Return the folder as a child of the resolved ``output_dir``, ``None`` if it is gone."""
    shown, run = repr(os.fspath(path)), repr(os.fspath(output_dir))
    if checkpoint_step(path.name) is None:
        raise ValueError(f"Only folders named `checkpoint-<step>` are deleted, got {shown}.")
    real_run = Path(os.path.realpath(output_dir))
    if path.parent != output_dir and Path(os.path.realpath(path.parent)) != real_run:
        raise ValueError(f"A checkpoint must stand directly in {run} to be deleted, got {shown}.")
    folder = real_run / path.name
    try:
        mode = os.lstat(folder).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(mode):
        raise ValueError(
            f"A checkpoint must be a real folder to be deleted, {shown} is a symbolic link. Linked checkpoints are "
            "left alone; remove the link yourself."
        )
    if not stat.S_ISDIR(mode):
        raise ValueError(f"A checkpoint must be a folder to be deleted, {shown} is a file.")
    return folder


def remove_tree(folder: str | os.PathLike[str]) -> None:
    """Remove ``folder`` and all in it, the manifest first and the sidecar last; a missing one is fine.

    Symbolic links are removed themselves, never what they lead to.

    Raises:
        OSError: If something is left that cannot be removed.
    """
    folder = Path(folder)
    for pause in (*_PAUSES_SECONDS, None):
        try:
            _remove_once(folder)
            return
        except FileNotFoundError:
            if not os.path.lexists(folder):
                return
            if pause is None:
                raise
        except OSError as error:
            if pause is None or error.errno not in _PASSING:
                raise
        time.sleep(pause or 0)


def _remove_once(folder: Path) -> None:
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            os.unlink(folder)
            return
        with os.scandir(folder) as entries:
            present = sorted(entries, key=lambda entry: (_place_in_order(entry.name), entry.name))
    except FileNotFoundError:
        return
    for entry in present:
        if entry.is_dir(follow_symlinks=False):
            _remove_once(Path(entry.path))
        else:
            try:
                os.unlink(entry.path)
            except FileNotFoundError:
                continue
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return


def _place_in_order(name: str) -> int:
    return {MANIFEST_NAME: 0, TRAINER_STATE_NAME: 1, SIDECAR_NAME: 3}.get(name, 2)
