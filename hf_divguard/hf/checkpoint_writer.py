"""Writing a checkpoint so that it is complete or does not count, on one rank or many.

The steps of a save, each agreed on by all ranks before the next one begins:

1. prepare: room on the disk, an empty place to write to;
2. write: the host's own save, each rank its part;
3. seal: on each file system one rank adds the sidecar and, last, the manifest;
4. publish: the same rank moves the sealed folder to its final name.

An error on one rank becomes the same error on all; then nothing is published.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hf_divguard.errors import CheckpointSaveError
from hf_divguard.hf.ranks import Ranks
from hf_divguard.storage.deletion import remove_tree
from hf_divguard.storage.failpoints import failpoint
from hf_divguard.storage.free_space import require_free_space, tree_bytes
from hf_divguard.storage.jsonio import write_bytes_atomic
from hf_divguard.storage.manifest import (
    ManifestError,
    build_manifest,
    read_manifest,
    write_manifest,
)
from hf_divguard.storage.manifest_check import check_manifest
from hf_divguard.storage.names import INCOMPLETE_NAME, TEMPORARY_PREFIX, checkpoint_name, checkpoint_step
from hf_divguard.storage.replacing import aside_of, finish_move, remove_aside, set_aside
from hf_divguard.storage.sidecar import Sidecar, write_sidecar
from hf_divguard.storage.staging import (
    discard_staging,
    folders_can_be_renamed,
    publish,
    recover,
    staging_folder,
)

__all__ = ["CheckpointWriter"]

logger = logging.getLogger(__name__)

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)})


class CheckpointWriter:
    """Writes the checkpoints of one run folder.

    Args:
        run_dir: Folder that gets the ``checkpoint-N`` folders.
        ranks: The processes of the run.
        save_mode: ``"staged"``, ``"in_place"``, ``"off"``, or ``"auto"`` for the first of
            the two that the file system can do.
        checksums: Whether the manifest holds a checksum of every file.
        flush: Whether files are flushed to the disk before a checkpoint counts.
        weights: Whether a checkpoint must hold the weights to be certified.
        training_state: Whether it must hold optimizer, schedule, random and trainer state.
        resumed_from: Checkpoint that training goes on from, if any.
        continues_after_errors: Whether training goes on after a save that failed.
    """

    def __init__(
        self,
        run_dir: str,
        ranks: Ranks,
        *,
        save_mode: str,
        checksums: bool,
        flush: bool,
        weights: bool = False,
        training_state: bool = False,
        resumed_from: str | None = None,
        continues_after_errors: bool = False,
    ) -> None:
        self._expects = {"weights": weights, "training_state": training_state}
        self._continues_after_errors = continues_after_errors
        self.run_dir = Path(run_dir)
        self._ranks = ranks
        self._checksums = checksums
        self._flush = flush
        self._last_bytes = 0
        # In place: whether what stands under the name is being written by us.
        self._is_writing = False
        self._last_step = _step_in(self.run_dir, resumed_from)
        self._local_ranks = ranks.on_same_file_system(self.run_dir)
        self.leads = ranks.rank == self._local_ranks[0]
        self.mode = "off" if save_mode == "off" else self._choose_mode(save_mode)

    def _choose_mode(self, save_mode: str) -> str:
        error: OSError | None = None
        renames = True
        if self.leads:
            try:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                _try_to_write(self.run_dir)
                for line in recover(self.run_dir):
                    logger.warning("%s", line)
                if save_mode == "auto":
                    renames = folders_can_be_renamed(self.run_dir)
            except OSError as caught:
                error = caught
        self._ranks.raise_if_any_failed(error, f"Preparing {self.run_dir} for checkpoints")
        if save_mode != "auto":
            return save_mode
        if all(self._ranks.gather(renames)):
            return "staged"
        if self._ranks.rank == 0:
            logger.warning(
                "The file system of %s does not rename folders reliably: checkpoints are written in place and count "
                "when their manifest is there.",
                self.run_dir,
            )
        return "in_place"

    def save(
        self,
        step: int,
        *,
        write: Callable[[str | None], None],
        finish: Callable[[Path], None],
        sidecar: Callable[[], Sidecar],
        replace: bool = False,
    ) -> bool:
        """Write the checkpoint of ``step`` and publish it.

        Args:
            step: Optimizer step.
            write: The host's own save; gets the folder that stands in for the run folder, ``None``
                for the run folder itself.
            finish: Corrects the files in the folder it is given, on the rank that leads.
            sidecar: Makes the sidecar, on the rank that leads.
            replace: Whether a checkpoint of this step that exists must be replaced.

        Returns:
            Whether it was written. Written in place, a checkpoint that this very training has
            published at this very step already is left as it is: to write it again would leave
            a moment without it.

        Raises:
            CheckpointSaveError: On every rank, if any of them failed. Checkpoints that
                were complete before still are.
        """
        final = self.run_dir / checkpoint_name(step)
        what = f"Saving {final}"
        self._is_writing = False
        folder = staging_folder(self.run_dir) / checkpoint_name(step) if self.mode == "staged" else final
        if self._is_there(step, final) and self.mode == "in_place" and not replace:
            return False
        try:
            self._do(what, lambda: self._prepare(step, folder, final, sidecar), folder)
            failpoint("save begun")
            stand_in = str(folder.parent) if self.mode == "staged" else None
            self._do(what, lambda: write(stand_in), folder, every_rank=True)
            failpoint("host wrote")
            self._do(what, lambda: self._seal(step, folder, finish, sidecar), folder)
            failpoint("sealed")
            self._do(what, lambda: self._publish(step), folder)
        except CheckpointSaveError as error:
            self._clean_up(step, folder)
            raise CheckpointSaveError(
                f"{error} Complete checkpoints from before are untouched."
            ) from error.__cause__
        self._last_step = step
        return True

    def _do(self, what: str, part: Callable[[], None], folder: Path, *, every_rank: bool = False) -> None:
        """Run one part of the save where it belongs and agree on how it went."""
        error: BaseException | None = None
        if every_rank or self.leads:
            try:
                part()
            except Exception as caught:
                error = caught
        self._ranks.raise_if_any_failed(
            error, what, self._room(error, folder), ends_run=not self._continues_after_errors
        )

    def _is_there(self, step: int, final: Path) -> bool:
        """Return whether this training has published ``step`` already; if so, no marker says otherwise.

        The host's save on SIGTERM puts its marker of an unfinished checkpoint into the final
        folder before it calls us, complete as the folder may be.
        """
        if step != self._last_step or self.mode == "off":
            return False
        there = True
        if self.leads:
            try:
                there = not check_manifest(final, read_manifest(final), checksums=False)
                if there:
                    (final / INCOMPLETE_NAME).unlink(missing_ok=True)
            except (OSError, ManifestError):
                there = False
        return all(self._ranks.gather(there))

    def _prepare(self, step: int, folder: Path, final: Path, sidecar: Callable[[], Sidecar]) -> None:
        require_free_space(self.run_dir, self._last_bytes)
        if self.mode == "off":
            return
        if os.path.lexists(final) and (final.is_symlink() or not final.is_dir()):
            raise FileExistsError(
                errno.EEXIST, "A checkpoint needs this name for its folder. Move away what has it", str(final)
            )
        if self.mode == "staged":
            discard_staging(self.run_dir)
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_if_it_holds_a_marker_alone(final)
            return
        set_aside(self.run_dir, step, flush=self._flush)
        self._is_writing = True
        # From here on the folder says of itself that it waits for a manifest.
        folder.mkdir(parents=True)
        write_sidecar(folder, sidecar())

    def _seal(
        self, step: int, folder: Path, finish: Callable[[Path], None], sidecar: Callable[[], Sidecar]
    ) -> None:
        finish(folder)
        record = sidecar()
        write_sidecar(folder, record, flush=self._flush)
        if self.mode == "off":
            self._last_bytes = tree_bytes(folder)
            return
        manifest = build_manifest(
            folder,
            step=step,
            run_id=record.run_id,
            sequence=record.sequence,
            world_size=self._ranks.world_size,
            metric_name=record.metric_name,
            metric=record.metric,
            greater_is_better=record.greater_is_better,
            checksums=self._checksums,
            ranks=self._local_ranks,
            sidecar=record,
            **self._expects,
        )
        write_manifest(folder, manifest, flush=self._flush)
        self._last_bytes = sum(entry.size for entry in manifest.files.values())

    def _publish(self, step: int) -> None:
        if self.mode == "staged":
            publish(self.run_dir, step, flush=self._flush)
        elif self.mode == "in_place":
            remove_aside(self.run_dir, step, flush=self._flush)

    def _clean_up(self, step: int, folder: Path) -> None:
        """Give back the room of what could not be finished."""
        if not self.leads or self.mode == "off":
            return
        try:
            if self.mode == "staged":
                discard_staging(self.run_dir)
                return
            if self._is_writing:
                remove_tree(folder)
            for line in finish_move(aside_of(self.run_dir, step)):
                logger.info("%s", line)
        except OSError as error:
            logger.warning("The unfinished %s could not be removed (%s); it does not count.", folder, error)

    def _room(self, error: BaseException | None, folder: Path) -> str:
        """Return how much room was needed and is there, if that may have been the reason of ``error``."""
        if error is None:
            return ""
        try:
            free = shutil.disk_usage(self.run_dir).free
        except OSError:
            return ""
        written = tree_bytes(folder)
        is_disk_error = isinstance(error, OSError) and error.errno in _DISK_ERRORS
        if not is_disk_error and free > 2 * max(written, self._last_bytes):
            return ""
        last = f" The last checkpoint took {_megabytes(self._last_bytes)}." if self._last_bytes else ""
        return (
            f"{last} Of this one {_megabytes(written)} had been written, {_megabytes(free)} are free in "
            f"{self.run_dir}."
        )


def _try_to_write(folder: Path) -> None:
    """Raise now, not after the first hours of training, if no file can be made in ``folder``."""
    write_bytes_atomic(folder / f"{TEMPORARY_PREFIX}-probe", b"")
    os.unlink(folder / f"{TEMPORARY_PREFIX}-probe")


def _step_in(run_dir: Path, checkpoint: str | None) -> int | None:
    """Return the step of ``checkpoint`` if it stands in ``run_dir``."""
    if checkpoint is None or os.path.realpath(Path(checkpoint).parent) != os.path.realpath(run_dir):
        return None
    return checkpoint_step(Path(checkpoint).name)


def _remove_if_it_holds_a_marker_alone(folder: Path) -> None:
    # The host's save on SIGTERM makes the final folder for its marker. While we write elsewhere, a stock reader
    # would take that folder for the newest checkpoint.
    with contextlib.suppress(OSError):
        if os.listdir(folder) == [INCOMPLETE_NAME]:
            remove_tree(folder)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
