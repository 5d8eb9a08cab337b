"""The checkpoints of one run: saved, ranked, rotated."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_divguard.core.findings import Finding
from hf_divguard.errors import CheckpointSaveError
from hf_divguard.hf.checkpoint_writer import CheckpointWriter
from hf_divguard.hf.engines.sharded_files import plain_errors
from hf_divguard.hf.host import Host
from hf_divguard.hf.ranks import Ranks
from hf_divguard.storage.deletion import delete_checkpoint
from hf_divguard.storage.ledger import CheckpointLedger
from hf_divguard.storage.names import checkpoint_step
from hf_divguard.storage.quarantine import clear_suspect, mark_suspect, quarantine_note
from hf_divguard.storage.record import Quarantine
from hf_divguard.storage.sidecar import Sidecar, fit_callbacks

__all__ = ["Checkpoints"]

logger = logging.getLogger(__name__)


class Checkpoints:
    """Saves the checkpoints of one ``train()`` call and deletes those that need not stay.

    Args:
        host: The host.
        options: The options.
        ranks: The processes of the run.
        run_dir: Folder that gets the checkpoints.
        resumed_from: Checkpoint that training resumes from, if any.
        is_active: Whether checkpoints are saved by us at all. If not, the host does it.
    """

    def __init__(
        self,
        host: Host,
        options: Any,
        ranks: Ranks,
        run_dir: str,
        resumed_from: str | None,
        *,
        is_active: bool,
    ) -> None:
        self._host = host
        self._options = options
        self._ranks = ranks
        self._writer: CheckpointWriter | None = None
        self._pushes: dict[int, Any] = {}
        self._last_saved: int | None = None
        self._condition: Finding | None = None
        self._marked: set[int] = set()
        self.preserves_best = bool(options.preserve_best_model)
        self._metric_key = options.divguard_ranking_key
        self._direction = options.divguard_greater_is_better
        self.greater_is_better = bool(self._direction)
        self.protected_steps: Callable[[], set[int]] = set
        """Returns the steps that rotation must not delete, beside the last and the best."""
        self.pending_since: Callable[[], int | None] = lambda: None
        """Returns the first step of what may become a finding, ``None`` if nothing may."""
        self.ledger = CheckpointLedger(run_dir=run_dir, run_id="", records=[])
        if is_active:
            self._writer = CheckpointWriter(
                run_dir,
                ranks,
                save_mode=options.divguard_save_mode,
                checksums=options.divguard_checksums,
                flush=options.divguard_fsync,
                weights=ranks.rank == 0 and bool(host.args.should_save),
                training_state=bool(host.args.should_save and not host.args.save_only_model),
                resumed_from=resumed_from,
                continues_after_errors=options.divguard_on_save_error == "continue",
            )
            read = ranks.run_on_main(lambda: CheckpointLedger.read(run_dir, resumed_from, self._metric_key))
            # Each rank's own spelling of the folder, which is another one where ranks have disks of their own.
            self.ledger = replace(read, run_dir=run_dir)

    @property
    def is_active(self) -> bool:
        """Whether checkpoints are saved by us."""
        return self._writer is not None

    @property
    def save_mode(self) -> str:
        """How checkpoints become complete: ``"staged"``, ``"in_place"`` or ``"off"``."""
        return "off" if self._writer is None else self._writer.mode

    @property
    def leads(self) -> bool:
        """Whether this rank moves, marks and deletes checkpoints on its file system."""
        return self._writer is not None and self._writer.leads

    # ---- suspects

    def follow_condition(self, condition: Finding | None) -> bool:
        """Mark what was saved since ``condition`` began as suspect; clear it when the condition is over.

        A suspect is not ranked, not resumed unless it is named, and does not push a good
        checkpoint out. On all ranks.

        Args:
            condition: The lasting condition with the earliest onset; ``None`` if there is none.

        Returns:
            Whether a checkpoint that exists was marked or cleared.
        """
        if not self.is_active or condition == self._condition:
            return False
        self._condition = condition
        if condition is None:
            cleared, self._marked = sorted(self._marked & self.ledger.suspects), set()
            self.ledger.suspects = self.ledger.suspects - set(cleared)
            self._annotate(cleared, lambda folder: clear_suspect(folder, flush=self._options.divguard_fsync))
            if cleared and self._ranks.rank == 0:
                logger.warning("%s count again: what was found is over.", self._names(cleared))
            return bool(cleared)
        since = [
            record.step
            for record in self.ledger.records
            if record.in_lineage
            and record.step >= condition.onset_step - 1
            and record.step not in self.ledger.quarantined
        ]
        new = [step for step in since if step not in self.ledger.suspects]
        for step in new:
            self.ledger.mark_suspect(step)
        # Those that were marked before a resume, too.
        self._marked |= set(since)
        reason, flush = _suspect_reason(condition), self._options.divguard_fsync
        self._annotate(
            new,
            lambda folder: mark_suspect(folder, reason=reason, onset_step=condition.onset_step, flush=flush),
        )
        if new and self._ranks.rank == 0:
            logger.warning("%s are suspect: %s", self._names(new), reason)
        return bool(new)

    def _annotate(self, steps: list[int], write: Callable[[str], None]) -> None:
        for step in steps if self.leads else []:
            try:
                write(self.ledger.path(step))
            except (OSError, ValueError) as error:
                logger.warning(
                    "%s could not be marked (%s); choose by hand what to resume.",
                    self.ledger.path(step),
                    error,
                )

    def _names(self, steps: list[int]) -> str:
        return f"Checkpoints {', '.join(map(str, steps))} in {self.ledger.run_dir}"

    # ---- saving

    def save(
        self,
        *,
        write: Callable[[], None],
        note_best: Callable[[], None],
        metric: float | None,
        callback_states: dict[str, Any],
        damaged_by: Finding | None,
    ) -> bool:
        """Save a checkpoint of the present step, publish it, rotate.

        Args:
            write: The host's own save.
            note_best: Has the host record its best metric, where it does so at a save.
            metric: The ranking metric of this step, ``None`` if it was not evaluated.
            callback_states: The states of the callbacks.
            damaged_by: The finding after which this checkpoint must never be resumed; ``None`` for a
                good one.

        Returns:
            Whether the checkpoint is there: written now, or before by this very training.

        Raises:
            CheckpointSaveError: On every rank, if any of them failed and
                ``divguard_on_save_error`` is ``"raise"``.
        """
        assert self._writer is not None
        state, step = self._host.state, self._host.state.global_step
        before = replace(self.ledger)
        best_before = state.best_metric, state.best_global_step, state.best_model_checkpoint
        self.ledger.add(step, metric)
        quarantine, suspect = self._mark_as_added(step, damaged_by)
        note_best()
        pushes: list[str] = []

        def write_aside(stand_in: str | None) -> None:
            with self._host.saving_to(stand_in) as saving, plain_errors("The host's save"):
                write()
            pushes.extend(saving.pushes)

        try:
            written = self._writer.save(
                step,
                write=write_aside,
                finish=lambda folder: self._correct_trainer_state(step, folder),
                sidecar=lambda: self._sidecar(step, callback_states, quarantine, suspect),
                replace=step in before.quarantined | before.suspects,
            )
        except CheckpointSaveError as error:
            self._undo(before, best_before)
            if self._options.divguard_on_save_error == "raise" or self._ranks.is_ending:
                raise
            if self._ranks.rank == 0:
                logger.warning("%s Training goes on without this checkpoint.", error)
            return False
        if not written:
            self.ledger.rewind_to(before)
            return True
        self._last_saved = step
        self.point_to_best()
        if pushes:
            self._pushes[step] = self._host.push(self.ledger.path(step))
        if quarantine is not None and self._ranks.rank == 0:
            logger.warning("%s was saved and quarantined: it is never resumed.", self.ledger.path(step))
        self._host.rotate(self.ledger.run_dir)
        return True

    def _mark_as_added(
        self, step: int, damaged_by: Finding | None
    ) -> tuple[Quarantine | None, Quarantine | None]:
        """Quarantine or suspect the checkpoint that was just added; return the two notes for its sidecar."""
        if damaged_by is not None:
            self.ledger.quarantine_after(step - 1)
            return quarantine_note(damaged_by.message, damaged_by.onset_step), None
        condition = self._condition
        if condition is None:
            return None, None
        self.ledger.mark_suspect(step)
        self._marked.add(step)
        return None, quarantine_note(_suspect_reason(condition), condition.onset_step)

    def _correct_trainer_state(self, step: int, folder: Path) -> None:
        """Let the best checkpoint that the host has just written into ``folder`` be the one that counts."""
        self.point_to_best(being_saved=step)
        if self._host.args.should_save:
            self._host.rewrite_best(os.path.join(folder, "trainer_state.json"))

    def _undo(self, before: CheckpointLedger, best_before: tuple[Any, Any, Any]) -> None:
        """After a failed save, know again what was known before it."""
        state = self._host.state
        self.ledger.rewind_to(before)
        if not self._ranks.is_ending:
            self._ranks.run_on_main(self.ledger.drop_missing)
            self.ledger.records = self._ranks.broadcast(self.ledger.records)
        state.best_metric, state.best_global_step, state.best_model_checkpoint = best_before
        self.point_to_best()

    def _sidecar(
        self,
        step: int,
        callback_states: dict[str, Any],
        quarantine: Quarantine | None,
        suspect: Quarantine | None,
    ) -> Sidecar:
        assert self._writer is not None
        kept, problems = fit_callbacks(callback_states)
        for problem in problems:
            logger.warning("%s", problem)
        sidecar = self.ledger.sidecar(
            step,
            metric_name=self._metric_key,
            greater_is_better=self._direction,
            callbacks=kept,
            manifest_expected=self._writer.mode != "off",
        )
        return replace(sidecar, quarantine=quarantine, suspect=suspect)

    # ---- the best one

    def point_to_best(self, being_saved: int | None = None) -> None:
        """Let the host's pointer to the best checkpoint, metric and step agree with what is on disk."""
        if not self.is_active:
            return
        state = self._host.state
        if not self.preserves_best:
            # As the host does it, with the folder under its final name.
            step = state.best_global_step
            if step and (step == being_saved or os.path.exists(self.ledger.path(step))):
                state.best_model_checkpoint = self.ledger.path(step)
            return
        best = self.ledger.finite_best(self.greater_is_better)
        state.best_model_checkpoint = best.path if best else None
        state.best_metric = best.metric if best else None
        state.best_global_step = best.step if best else None

    # ---- rotation

    def rotate(self) -> None:
        """Delete what neither the last ``save_total_limit`` nor the best ``preserve_n_best`` keep. On all ranks."""
        surplus = set(self._surplus()) - self.protected_steps() - self._good_before_suspicion()
        # A quarantined checkpoint would be deleted at once; the one that a stop has asked for stays to be examined.
        surplus.discard(-1 if self._last_saved is None else self._last_saved)
        uploading = {step for step, job in self._pushes.items() if job is not None and not job.is_done()}
        for step in self._ranks.broadcast(sorted(surplus - uploading)):
            self._pushes.pop(step, None)
            self.ledger.forget(step)
            if self.leads:
                self._delete(step)

    def _good_before_suspicion(self) -> set[int]:
        """Return the newest and the best checkpoints from before what a detector suspects but has not found yet."""
        since = self.pending_since()
        if since is None or not self.is_active:
            return set()
        old = [record for record in self.ledger.records if record.step <= since - 2]
        old = [record for record in old if record.step in set(self.ledger.usable_steps())]
        best = self._options.preserve_n_best if self.preserves_best else 1
        ranked = self.ledger.ranked(old, self.greater_is_better)[:best]
        return {record.step for record in ranked} | {max((record.step for record in old), default=-1)}

    def _surplus(self) -> list[int]:
        limit = self._host.args.save_total_limit
        if self.preserves_best:
            return self.ledger.to_delete(limit, self._options.preserve_n_best, self.greater_is_better)
        best = self._host.state.best_model_checkpoint
        return self.ledger.to_delete_as_stock(
            limit, checkpoint_step(os.path.basename(best)) if best else None
        )

    def _delete(self, step: int) -> None:
        path = self.ledger.folder(step)
        try:
            logger.info("Deleting older checkpoint %s (save_total_limit, preserve_n_best).", path)
            delete_checkpoint(path, self.ledger.run_dir)
        except (OSError, ValueError) as error:
            logger.warning("Checkpoint %s could not be deleted (%s); training goes on.", path, error)
            self.ledger.deletion_failed(step)


def _suspect_reason(condition: Finding) -> str:
    return f"saved at or after step {condition.onset_step - 1}, while: {condition.message}"
