"""Giving a finished checkpoint its name in one step, and repairing what a kill left in between."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from hf_divguard.storage.deletion import remove_tree
from hf_divguard.storage.failpoints import failpoint
from hf_divguard.storage.integrity import verify_with_record
from hf_divguard.storage.names import (
    DELETING_PREFIX,
    REPLACED_PREFIX,
    STAGING_NAME,
    TEMPORARY_PREFIX,
    checkpoint_folders,
    checkpoint_name,
    checkpoint_step,
)
from hf_divguard.storage.regular_files import flush_folder, flush_tree
from hf_divguard.storage.replacing import aside_of, finish_move, move, remove_aside

__all__ = ["discard_staging", "folders_can_be_renamed", "publish", "recover", "staging_folder"]

_PROBE_PREFIX = "_divguard_probe-"
_OURS = re.compile(
    f"(?P<kind>{re.escape(REPLACED_PREFIX)}|{re.escape(DELETING_PREFIX)})(?P<step>0|[1-9][0-9]{{0,17}})"
)


def staging_folder(run_dir: str | os.PathLike[str]) -> Path:
    """Return the folder in which a checkpoint is written before it gets its name; it may not exist.

    Example:
        >>> staging_folder("out").as_posix()
        'out/_divguard_staging'
    """
    return Path(run_dir, STAGING_NAME)


def folders_can_be_renamed(run_dir: str | os.PathLike[str]) -> bool:
    """Return whether a folder with a file in it can be moved within ``run_dir``, by trying it.

    The folder is moved from a sub-folder up into ``run_dir``, as ``publish`` does, and looked
    for under both names. Anything that fails on the way is a no.

    Args:
        run_dir: An existing folder.
    """
    run_dir = Path(run_dir)
    mark = secrets.token_hex(4)
    start, end = run_dir / f"{_PROBE_PREFIX}{mark}", run_dir / f"{_PROBE_PREFIX}{mark}-moved"
    try:
        (start / "folder").mkdir(parents=True)
        (start / "folder" / "file").write_bytes(b"probe")
        os.rename(start / "folder", end)
        moved = (end / "file").read_bytes() == b"probe" and not os.path.lexists(start / "folder")
        # A second move of the same name is what saving a step again needs.
        os.rename(end, start / "folder")
        return moved and (start / "folder" / "file").read_bytes() == b"probe" and not os.path.lexists(end)
    except OSError:
        return False
    finally:
        for leftover in (start, end):
            with contextlib.suppress(OSError):
                remove_tree(leftover)


def publish(run_dir: str | os.PathLike[str], step: int, *, flush: bool = False) -> Path:
    """Move the finished checkpoint of ``step`` out of the staging folder to its name.

    A checkpoint that has the name already is moved aside first and removed afterwards. Between
    the two moves neither stands under the name; ``recover`` then finishes or undoes it, so the
    old or the new one is always there.

    Args:
        run_dir: The run folder.
        step: Optimizer step of the checkpoint.
        flush: Put the checkpoint on the disk before, and its new name after.

    Returns:
        The folder ``<run_dir>/checkpoint-<step>``.

    Raises:
        OSError: If it cannot be moved. The old one, if any, has its name again then.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     (staging_folder(run) / "checkpoint-20").mkdir(parents=True)
        ...     publish(run, 20).name, sorted(os.listdir(run))
        ('checkpoint-20', ['checkpoint-20'])
    """
    run_dir = Path(run_dir)
    staged = staging_folder(run_dir) / checkpoint_name(step)
    final = run_dir / checkpoint_name(step)
    aside = aside_of(run_dir, step)
    for folder in (staging_folder(run_dir), staged):
        if not _is_folder(folder):
            raise NotADirectoryError(
                errno.ENOTDIR, "A staged checkpoint must be a real folder", os.fspath(folder)
            )
    if flush:
        flush_tree(staged)
    moved_aside = os.path.lexists(final)
    if moved_aside:
        if not _is_folder(final):
            raise NotADirectoryError(errno.ENOTDIR, "Only a real folder can be replaced", os.fspath(final))
        remove_tree(aside)
        move(final, aside, flush=flush)
        failpoint("old checkpoint moved aside")
    try:
        os.rename(staged, final)
    except OSError:
        if moved_aside:
            move(aside, final, flush=flush)
        raise
    failpoint("checkpoint published")
    if flush:
        flush_folder(staging_folder(run_dir))
        flush_folder(run_dir)
    # The checkpoint is published. What is left of the old one is no reason to fail the save:
    # `recover` removes it at the next start.
    remove_aside(run_dir, step)
    with contextlib.suppress(OSError):
        os.rmdir(staging_folder(run_dir))
    return final


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def discard_staging(run_dir: str | os.PathLike[str]) -> None:
    """Remove the staging folder and all in it; a missing one is fine.

    A symbolic link of that name is removed itself, not what it leads to.

    Raises:
        OSError: If something is left that cannot be removed.
    """
    remove_tree(staging_folder(run_dir))


def recover(run_dir: str | os.PathLike[str]) -> list[str]:
    """Repair what a killed save or deletion left in ``run_dir``, and return in words what was done.

    Call it when no process writes there. A staged checkpoint that is complete by its manifest
    gets its name, unless a complete and newer one has it. A checkpoint that was moved aside and
    not replaced gets its name back. Whatever else carries one of our unfinished names is
    removed, unless it cannot be read now. Nothing of another name is touched.

    Args:
        run_dir: The run folder. A missing one needs no repair.

    Returns:
        One sentence per thing done or found impossible; empty if there was nothing to do.

    Raises:
        OSError: If the run folder cannot be listed.

    Example:
        >>> recover("no-such-folder")
        []
    """
    run_dir = Path(run_dir)
    if not _is_folder_or_link_to_one(run_dir):
        return []
    return [
        *_publish_complete_ones(run_dir),
        *_finish_moves_and_deletions(run_dir),
        *_remove_unfinished_files(run_dir),
    ]


def _is_folder_or_link_to_one(path: Path) -> bool:
    # The user may well have linked the output folder elsewhere; only names inside it must be real.
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return False


def _publish_complete_ones(run_dir: Path) -> Iterator[str]:
    staging = staging_folder(run_dir)
    if not os.path.lexists(staging):
        return
    names = sorted(os.listdir(staging)) if _is_folder(staging) else []
    for name in names:
        step = checkpoint_step(name)
        should = step is not None and _should_be_published(staging / name, run_dir / name)
        if should is None:
            yield f"The staged {name} cannot be read now, so it is left in {STAGING_NAME}."
            return
        if step is None or not should:
            continue
        try:
            publish(run_dir, step)
        except OSError as error:
            yield f"{name} was saved completely but could not get its name: {error}."
            return
        yield f"{name} was saved completely when the last run was killed; it has its name now."
    unfinished = [name for name in names if os.path.lexists(staging / name)]
    what = f"the unfinished {' and '.join(unfinished)}" if unfinished else f"the empty {STAGING_NAME}"
    if os.path.lexists(staging):
        yield from _remove(staging, what)


def _should_be_published(staged: Path, final: Path) -> bool | None:
    """Return whether ``staged`` is complete, and nothing that would be missed has its name.

    ``None`` says that one of the two cannot be read.
    """
    verdict, record = verify_with_record(staged)
    if verdict.status == "unreadable":
        return None
    keeps = verdict.status in ("complete", "suspect", "quarantined")
    if not keeps or not verdict.has_manifest or record is None or not _is_folder(staged):
        return False
    if not os.path.lexists(final):
        return True
    if not _is_folder(final):
        return False
    there, other = verify_with_record(final, checksums=False)
    if there.status == "unreadable":
        return None
    if there.status == "incomplete" or (there.status == "quarantined" and verdict.status == "complete"):
        return True
    return other is not None and other.run_id == record.run_id and other.sequence < record.sequence


def _finish_moves_and_deletions(run_dir: Path) -> Iterator[str]:
    for name in sorted(os.listdir(run_dir)):
        match = _OURS.fullmatch(name)
        if name.startswith(_PROBE_PREFIX):
            yield from _remove(run_dir / name, f"{name}, left of a test whether folders can be renamed")
        elif match is not None and match["kind"] == DELETING_PREFIX:
            yield from _remove(run_dir / name, f"what was left of the deleted checkpoint-{match['step']}")
        elif match is not None:
            yield from finish_move(run_dir / name)


def _remove(path: Path, what: str) -> Iterator[str]:
    try:
        remove_tree(path)
    except OSError as error:
        yield f"Could not remove {what}: {error}."
    else:
        failpoint("unfinished checkpoint removed")
        yield f"Removed {what}."


def _remove_unfinished_files(run_dir: Path) -> Iterator[str]:
    for folder in (run_dir, *checkpoint_folders(run_dir).values()):
        if folder != run_dir and not _is_folder(folder):
            continue  # a link: what it leads to belongs to someone else
        try:
            before = os.stat(folder)
            names = [name for name in sorted(os.listdir(folder)) if name.startswith(TEMPORARY_PREFIX)]
        except OSError:
            continue
        for name in names:
            if not _is_folder(folder / name):
                yield from _remove(folder / name, f"the unfinished file {name} in {folder.name}")
        if names and folder != run_dir:
            # The Trainer's own rotation orders folders by their time of change.
            with contextlib.suppress(OSError):
                os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
