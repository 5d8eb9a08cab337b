"""Saving a checkpoint so that it is complete or does not count, on one rank or many.

The steps of a save, each agreed on by all ranks before the next one begins:

1. prepare: room on the disk, an empty place to write to;
2. write: the host's own save, every rank its part;
3. publish: on each file system one rank adds the sidecar, writes the manifest last and
   gives the folder its name.

An error on one rank becomes the same error on all; then nothing is published.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from hf_divguard.errors import CheckpointSaveError
from hf_divguard.hf.ranks import Ranks
from hf_divguard.storage.free_space import require_free_space, tree_bytes
from hf_divguard.storage.layout import checkpoint_name
from hf_divguard.storage.manifest import build_manifest, remove_manifest, write_manifest
from hf_divguard.storage.sidecar import Sidecar, write_sidecar
from hf_divguard.storage.staging import (
    discard_staging,
    folders_can_be_renamed,
    publish,
    recover,
    staging_folder,
)

__all__ = ["CheckpointSaver"]

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Writes the checkpoints of one run folder.

    Args:
        run_dir: Folder that gets the ``checkpoint-N`` folders.
        ranks: The processes of the run.
        safe_save: ``"staged"``, ``"in_place"``, ``"off"``, or ``"auto"`` for the first of
            the two that the file system can do.
        checksums: Whether the manifest holds a SHA-256 of every file.
        flush: Whether files are flushed to the disk before a checkpoint counts.
    """

    def __init__(self, run_dir: str, ranks: Ranks, *, safe_save: str, checksums: bool, flush: bool) -> None:
        self.run_dir = Path(run_dir)
        self.redirect: str | None = None
        self._ranks = ranks
        self._checksums = checksums
        self._flush = flush
        self._last_bytes = 0
        self._local_ranks = ranks.on_same_file_system(self.run_dir)
        self.leads = ranks.rank == self._local_ranks[0]
        self.mode = "off" if safe_save == "off" else self._choose_mode(safe_save)

    def _choose_mode(self, safe_save: str) -> str:
        error: OSError | None = None
        renames = True
        if self.leads:
            try:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                for line in recover(self.run_dir):
                    logger.warning("%s", line)
                if safe_save == "auto":
                    renames = folders_can_be_renamed(self.run_dir)
            except OSError as caught:
                error = caught
        self._ranks.agree(error, f"Preparing {self.run_dir} for checkpoints")
        if safe_save != "auto":
            return safe_save
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
        write: Callable[[], None],
        finish: Callable[[Path], None],
        sidecar: Callable[[], Sidecar],
    ) -> None:
        """Write the checkpoint of ``step`` and publish it.

        Args:
            step: Optimizer step.
            write: The host's own save; it asks for its folder through ``redirect``.
            finish: Corrects the files in the folder it is given, on the rank that leads.
            sidecar: Makes the sidecar, on the rank that leads.

        Raises:
            CheckpointSaveError: On every rank, if any of them failed. Checkpoints that
                were complete before still are.
        """
        final = self.run_dir / checkpoint_name(step)
        what = f"Saving {final}"
        folder = staging_folder(self.run_dir) / checkpoint_name(step) if self.mode == "staged" else final
        try:
            self._do(what, lambda: self._prepare(step, folder, sidecar))
            self.redirect = str(folder.parent) if self.mode == "staged" else None
            try:
                self._do(what, write, every_rank=True)
            finally:
                self.redirect = None
            self._do(what, lambda: self._publish(step, folder, finish, sidecar))
        except CheckpointSaveError as error:
            self._clean_up(folder)
            raise self._explain(error) from error.__cause__

    def _do(self, what: str, part: Callable[[], None], *, every_rank: bool = False) -> None:
        """Run one part of the save where it belongs and agree on how it went."""
        error: BaseException | None = None
        if every_rank or self.leads:
            try:
                part()
            except Exception as caught:
                error = caught
        self._ranks.agree(error, what)

    def _prepare(self, step: int, folder: Path, sidecar: Callable[[], Sidecar]) -> None:
        require_free_space(self.run_dir, self._last_bytes)
        if self.mode == "staged":
            discard_staging(self.run_dir)
            folder.parent.mkdir(parents=True, exist_ok=True)
            return
        if self.mode == "in_place":
            if folder.is_dir():
                remove_manifest(folder)
                shutil.rmtree(folder)
            # From here on the folder says of itself that it waits for a manifest.
            folder.mkdir(parents=True)
            write_sidecar(folder, sidecar())

    def _publish(
        self, step: int, folder: Path, finish: Callable[[Path], None], sidecar: Callable[[], Sidecar]
    ) -> None:
        finish(folder)
        record = sidecar()
        write_sidecar(folder, record, flush=self._flush)
        if self.mode != "off":
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
            )
            write_manifest(folder, manifest, flush=self._flush)
        if self.mode == "staged":
            folder = publish(self.run_dir, step, flush=self._flush)
        self._last_bytes = tree_bytes(folder)

    def _clean_up(self, folder: Path) -> None:
        """Give back the room of what could not be finished."""
        if not self.leads:
            return
        try:
            if self.mode == "staged":
                discard_staging(self.run_dir)
            elif self.mode == "in_place":
                shutil.rmtree(folder)
        except OSError as error:
            logger.warning("The unfinished %s could not be removed (%s); it does not count.", folder, error)

    def _explain(self, error: CheckpointSaveError) -> CheckpointSaveError:
        need = self._last_bytes
        try:
            free = shutil.disk_usage(self.run_dir).free
        except OSError:
            return error
        room = f" The last checkpoint took {_megabytes(need)}; {_megabytes(free)} are free in {self.run_dir}."
        return CheckpointSaveError(
            f"{error}.{room if need else ''} Complete checkpoints from before are untouched."
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
