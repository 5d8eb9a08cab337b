"""Keeping the checkpoint of a step under another name while a new one is written under its own.

Folders are renamed where the file system can do that, and copied file by file where it cannot.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from hf_divguard.storage.deletion import remove_tree
from hf_divguard.storage.failpoints import failpoint
from hf_divguard.storage.integrity import verify_with_record
from hf_divguard.storage.names import (
    DELETING_PREFIX,
    MANIFEST_NAME,
    REPLACED_PREFIX,
    SIDECAR_NAME,
    checkpoint_name,
)
from hf_divguard.storage.regular_files import flush_folder, flush_tree, list_files, open_regular_file
from hf_divguard.storage.trainer_state import TRAINER_STATE_NAME

__all__ = ["aside_of", "finish_move", "move", "remove_aside", "set_aside"]

_MOST_FILES = 100_000


def aside_of(run_dir: str | os.PathLike[str], step: int) -> Path:
    """Return where the older checkpoint of ``step`` stands while it is replaced.

    Example:
        >>> aside_of("out", 20).as_posix()
        'out/_divguard_replaced-20'
    """
    return Path(run_dir, f"{REPLACED_PREFIX}{step}")


def set_aside(run_dir: str | os.PathLike[str], step: int, *, flush: bool = False) -> None:
    """Free the name of the checkpoint of ``step``; one that is complete is kept aside.

    It is kept until :func:`remove_aside`. After a kill, ``staging.recover`` gives it its name back
    unless the new one is complete. Where folders cannot be renamed it is copied, which takes the
    room of one more checkpoint.

    Args:
        run_dir: The run folder.
        step: Optimizer step.
        flush: Put the copy on the disk before the name is free.

    Raises:
        OSError: If it can be neither renamed nor copied. It has its name then.
    """
    final, aside = Path(run_dir, checkpoint_name(step)), aside_of(run_dir, step)
    if not os.path.lexists(final):
        return
    if verify_with_record(final, checksums=False)[0].status not in ("complete", "unreadable"):
        remove_tree(final)
        return
    remove_tree(aside)
    move(final, aside, flush=flush)
    failpoint("old checkpoint set aside")


def remove_aside(run_dir: str | os.PathLike[str], step: int, *, flush: bool = False) -> None:
    """Remove the checkpoint that was set aside: the new one is complete. What is left goes at the next start.

    Args:
        run_dir: The run folder.
        step: Optimizer step.
        flush: Put the name of the new one on the disk before.
    """
    if flush:
        flush_folder(run_dir)
    with contextlib.suppress(OSError):
        remove_tree(aside_of(run_dir, step))
        failpoint("old checkpoint removed")


def finish_move(aside: Path) -> Iterator[str]:
    """Give a checkpoint that was set aside its name back unless the new one is complete; say what was done.

    Args:
        aside: What :func:`aside_of` returns. A missing one needs nothing.
    """
    if not os.path.lexists(aside):
        return
    step = int(aside.name.removeprefix(REPLACED_PREFIX))
    final = aside.with_name(checkpoint_name(step))
    old = verify_with_record(aside, checksums=False)[0].status if _is_folder(aside) else "incomplete"
    taken = os.path.lexists(final)
    new = verify_with_record(final, checksums=False)[0].status if taken and _is_folder(final) else "complete"
    if "unreadable" in (old, new if taken else ""):
        yield f"The older {final.name} is left as {aside.name}: one of the two cannot be read now."
        return
    if old == "incomplete" or (taken and new != "incomplete"):
        yield _removed(aside, f"the older {final.name} that was replaced")
        return
    try:
        if taken:
            unfinished = final.with_name(f"{DELETING_PREFIX}{step}")
            remove_tree(unfinished)
            _rename_or_remove(final, unfinished)
            yield _removed(unfinished, f"the unfinished {final.name}")
        move(aside, final, flush=True)
        failpoint("old checkpoint restored")
    except OSError as error:
        yield f"The older {final.name} could not get its name back: {error}."
        return
    yield f"The older {final.name} has its name back: the save that should replace it did not finish."


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _removed(path: Path, what: str) -> str:
    try:
        remove_tree(path)
    except OSError as error:
        return f"Could not remove {what}: {error}."
    failpoint("unfinished checkpoint removed")
    return f"Removed {what}."


def _rename_or_remove(folder: Path, to: Path) -> None:
    try:
        os.rename(folder, to)
    except OSError:
        remove_tree(folder)


def move(folder: Path, to: Path, *, flush: bool) -> None:
    """Rename ``folder``, or copy and remove it: one of the two is complete at each moment.

    Args:
        folder: A checkpoint.
        to: Its new name, which is free.
        flush: Put the names, and what was copied, on the disk.

    Raises:
        OSError: If neither is possible. ``folder`` is as it was then.
    """
    try:
        os.rename(folder, to)
    except FileNotFoundError:
        raise
    except OSError:
        pass  # some file systems cannot, and overlays not with what is in a lower layer
    else:
        if flush:
            flush_folder(to.parent)
        return
    try:
        _copy(folder, to, flush=flush)
    except OSError:
        with contextlib.suppress(OSError):
            remove_tree(to)
        raise
    failpoint("checkpoint copied")
    remove_tree(folder)


def _copy(folder: Path, to: Path, *, flush: bool) -> None:
    """Copy a checkpoint so that no part of it counts: the sidecar first, the manifest last, as it was written."""
    names = sorted(list_files(folder, limit=_MOST_FILES)[0], key=_place_in_order)
    to.mkdir()
    for name in names:
        if flush and name == MANIFEST_NAME:
            flush_tree(to)
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        with (
            open(open_regular_file(folder / name), "rb", buffering=0) as source,
            open(os.open(to / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    if flush:
        flush_tree(to)
        flush_folder(to.parent)
    status = os.stat(folder)
    os.utime(to, ns=(status.st_atime_ns, status.st_mtime_ns))


def _place_in_order(name: str) -> tuple[int, str]:
    return {SIDECAR_NAME: 0, TRAINER_STATE_NAME: 2, MANIFEST_NAME: 3}.get(name, 1), name
