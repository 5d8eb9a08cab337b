"""What guards one call of ``train()``: its ledger, its saver, the state of its callbacks."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from hf_divguard.core.metrics import with_eval_prefix
from hf_divguard.core.retention import is_better
from hf_divguard.errors import CheckpointSaveError, MetricNotFoundError
from hf_divguard.hf.actions import saves_checkpoints, spoilt_note
from hf_divguard.hf.agreement import agree_on_what_follows
from hf_divguard.hf.arguments import options_of
from hf_divguard.hf.best_metric import recall_best
from hf_divguard.hf.callback_state import (
    collect_states,
    named_callbacks,
    read_callback_states,
    restore_states,
)
from hf_divguard.hf.checkpoint_saver import CheckpointSaver
from hf_divguard.hf.compat import hidden_save_limit, rewrite_best
from hf_divguard.hf.detectors import DivergenceDetector
from hf_divguard.hf.gradient_norm import gradient_norm
from hf_divguard.hf.loss_watch import LossWatch
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.rollback import Rollback
from hf_divguard.hf.running_loss import RUNNING_LOSS, RunningLoss
from hf_divguard.hf.stop_advice import STOPPED_BY, at_the_end, on_resume, what_stopped
from hf_divguard.storage.deletion import delete_checkpoint
from hf_divguard.storage.ledger import CheckpointLedger
from hf_divguard.storage.names import checkpoint_step
from hf_divguard.storage.sidecar import Sidecar, fit_callbacks
from hf_divguard.storage.survey import describe

__all__ = ["RunGuard"]

logger = logging.getLogger(__name__)

ROLLBACK_MEMORY = "divguard_rollback"
"""Name under which the memory of rollbacks is kept among the states of callbacks."""


class RunGuard(TrainerCallback):
    """Keeps the checkpoints of one ``train()`` call of a :class:`DivGuardTrainer`.

    It stands last in the list of callbacks while training runs, so that it sees the
    others after they have dealt with an event.

    Args:
        trainer: The trainer.
        run_dir: Folder that gets the checkpoints.
        resumed_from: Checkpoint that training resumes from, if any.
        initial_states: State of each stateful callback before its first training; one that is
            not in here trains for the first time.
    """

    def __init__(
        self, trainer: Any, run_dir: str, resumed_from: str | None, initial_states: dict[str, Any]
    ) -> None:
        self._trainer = trainer
        self._args = trainer.args
        self._options = options_of(trainer.args)
        self.run_dir = run_dir
        self._resumed_from = resumed_from
        self._initial_states = initial_states
        self._callbacks = named_callbacks(trainer.callback_handler.callbacks)
        self._metrics: dict[str, float] = {}
        self._metrics_step: int | None = None
        self._pushes: dict[int, Any] = {}
        self.pending_push: str | None = None
        self._host_gives_no_norm = False
        self._own_norm: Any = None
        self.is_saving = False
        self.owes_save = False
        """Whether the state of a rollback is still to be saved."""
        self.preserves = bool(self._options.preserve_best_model)
        self.ranking_key = self._options.divguard_ranking_key
        tracks_best = self._args.metric_for_best_model is not None
        self.points_to_saved = self.preserves or bool(self._options.eval_on_save and tracks_best)
        self.best_evaluated: float | None = None
        self.is_active = bool(self.preserves or self._options.eval_on_save or self._callbacks)
        save_mode = self._options.divguard_save_mode
        self.is_active |= save_mode not in ("auto", "off")
        self._ranks = Ranks(self._args.process_index, self._args.world_size)
        self.running_loss = RunningLoss(trainer, self._ranks)
        detectors = {name: cb for name, cb in self._callbacks.items() if isinstance(cb, DivergenceDetector)}
        self._is_watched = bool(detectors)
        rolls_back = any(detector.action == "rollback" for detector in detectors.values())
        self.watch = LossWatch(trainer, self._options.divguard_check_steps, always=rolls_back)
        self.ledger = CheckpointLedger(run_dir=run_dir, run_id="", records=[])
        self._saver: CheckpointSaver | None = None
        if self.is_active:
            self._saver = CheckpointSaver(
                run_dir,
                self._ranks,
                save_mode=save_mode,
                checksums=self._options.divguard_checksums,
                flush=self._options.divguard_fsync,
                resumed_from=resumed_from,
                # On Transformers 5 the first node alone writes the weights, also with `save_on_each_node`.
                weights=self._ranks.rank == 0,
                training_state=bool(self._args.should_save and not self._args.save_only_model),
            )
            read = self._ranks.run_on_main(
                lambda: CheckpointLedger.read(run_dir, resumed_from, self.ranking_key)
            )
            # Each rank's own spelling of the folder, which is another one where ranks have disks of their own.
            self.ledger = replace(read, run_dir=run_dir)
        self.rollback: Rollback | None = None
        if rolls_back:
            assert self._saver is not None
            self.rollback = Rollback(
                trainer,
                self._options,
                ledger=self.ledger,
                ranks=self._ranks,
                leads=self._saver.leads,
                detectors=detectors,
                on_left_behind=self._forget_after,
            )

    # ---- start of training

    @property
    def greater_is_better(self) -> bool:
        """Direction of the ranking metric."""
        return bool(self._options.divguard_greater_is_better)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the callbacks their state: from the checkpoint, or as before their first training."""
        self.watch.start(state.global_step)
        known = {name: cb for name, cb in self._callbacks.items() if name in self._initial_states}
        restore_states(known, self._initial_states)
        if self._resumed_from is not None:
            self._recall_evaluation(state)
            self._recall_best_evaluated(state, state.global_step)
            if self._callbacks:
                states = self._ranks.broadcast(
                    read_callback_states(self._resumed_from) if self._ranks.rank == 0 else None
                )
                if states is not None:
                    restore_states(self._callbacks, states)
                    self.running_loss.restore(states.get(RUNNING_LOSS))
                    if STOPPED_BY in states and self._ranks.rank == 0:
                        logger.warning("%s", on_resume(self._resumed_from, states[STOPPED_BY], self.ledger))
                    if self.rollback is not None and ROLLBACK_MEMORY in states:
                        restore_states({ROLLBACK_MEMORY: self.rollback}, states)
        self._point_to_best(state)
        if self.rollback is not None:
            self.rollback.begin(state)
        acts = self._options.divguard_action != "stop"
        if acts and not self._is_watched and self._ranks.rank == 0:
            logger.warning(
                "`divguard_action=%r` has no detector to act for, so nothing is guarded. Set `divguard_detector`, for "
                "example to 'adaptive'.",
                self._options.divguard_action,
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the watch that an epoch begins."""
        self.watch.begin_epoch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold the learning rate back while it warms up again after a rollback; see how large the gradients are."""
        if self.rollback is not None:
            self.rollback.hold_back_rates(state.global_step)
            if self._host_gives_no_norm and self.rollback.minds_explosions:
                self._own_norm = gradient_norm(self._trainer.model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the schedule its learning rate back."""
        if self.rollback is not None:
            self.rollback.release_rates()

    def _forget_after(self, target_step: int) -> None:
        """After a rollback, forget what evaluations of the steps behind ``target_step`` said."""
        state = self._trainer.state
        self._metrics, self._metrics_step = {}, None
        self._recall_best_evaluated(state, target_step)
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = 0
        if self.preserves:
            self._point_to_best(state)
        elif (
            self._args.metric_for_best_model is not None
            and state.best_metric is not None
            and (state.best_global_step or math.inf) > target_step
        ):
            recall_best(state, self._args, self.ledger, target_step)

    def initial_states(self) -> dict[str, Any]:
        """Return the states of the stateful callbacks before their first training, those that train now included."""
        new = {name: cb for name, cb in self._callbacks.items() if name not in self._initial_states}
        # A copy: many a callback hands out the very lists that it goes on filling.
        return {**copy.deepcopy(collect_states(new)), **self._initial_states}

    # ---- evaluation

    def note_evaluation(self, step: int, metrics: dict[str, float] | None) -> None:
        """Remember the results of the evaluation at ``step``."""
        self._metrics = dict(metrics or {})
        self._metrics_step = step

    def agree_on_what_follows(self) -> None:
        """Make what callbacks asked for at an evaluation the same on all ranks."""
        if self.is_active:
            agree_on_what_follows(self._ranks, self._trainer.state, self._trainer.control)

    def note_for_best(self, metrics: dict[str, float]) -> None:
        """Remember the best of all evaluations: the host's patience is measured against it, saved or not."""
        value = metrics.get(with_eval_prefix(self._args.metric_for_best_model))
        if value is None:
            return
        greater = bool(self._args.greater_is_better)
        if is_better(float(value), self.best_evaluated, greater_is_better=greater):
            self.best_evaluated = float(value)
        elif self.best_evaluated is None:  # as the host has it after an evaluation that was not finite
            self.best_evaluated = -math.inf if greater else math.inf

    def _recall_best_evaluated(self, state: Any, last_step: int) -> None:
        self.best_evaluated = None
        if self.points_to_saved:
            for entry in state.log_history:
                if 0 < entry["step"] <= last_step:
                    self.note_for_best(entry)

    def _recall_evaluation(self, state: Any) -> None:
        """Take the results for the step that training resumes at from its log."""
        for entry in state.log_history:
            metrics = {key: value for key, value in entry.items() if key.startswith("eval_")}
            if metrics and entry.get("step") == state.global_step:
                self.note_evaluation(state.global_step, {**self._metrics, **metrics})

    def has_evaluated(self, step: int) -> bool:
        """Return whether ``step`` was evaluated, in this run or in the one it resumes."""
        return self._metrics_step == step

    def metric_of_step(self, step: int) -> float | None:
        """Return the ranking metric that was evaluated at exactly ``step``, if it was."""
        if self._metrics_step != step or self.ranking_key not in self._metrics:
            return None
        return float(self._metrics[self.ranking_key])

    def is_new_best(self, metrics: dict[str, float]) -> bool:
        """Return whether an evaluation beats every checkpoint there is; decided on rank 0 for all.

        Raises:
            MetricNotFoundError: If the evaluation did not produce the ranking metric.
        """
        return self._ranks.run_on_main(lambda: self._beats_all(metrics))

    def _beats_all(self, metrics: dict[str, float]) -> bool:
        if self.ranking_key not in metrics:
            there = sorted(key for key in metrics if key.startswith("eval_"))
            raise MetricNotFoundError(
                f"`best_model_metric={self._options.best_model_metric!r}` ranks checkpoints, but the evaluation produced "
                f"no `{self.ranking_key}`. It produced {there}. Set `best_model_metric` to one of them, or let "
                "`compute_metrics` return it."
            )
        return self.ledger.would_be_best(float(metrics[self.ranking_key]), self.greater_is_better)

    # ---- the end of a step

    def end_step(self, host_acts: Callable[[], None], tr_loss: Any, grad_norm: Any, model: Any) -> None:
        """Show the step to the detectors, roll back if they ask for it, and let the host log, evaluate and save.

        Args:
            host_acts: Logs, evaluates and saves, as the trainer's control says.
            tr_loss: The host's running sum of losses.
            grad_norm: Norm of the step's gradient.
            model: The model as it is trained.
        """
        trainer = self._trainer
        if self._callbacks:
            self.running_loss.end_step(tr_loss, trainer.state.global_step)
        save_was_due = trainer.control.should_save
        # Transformers 4 measures gradients only to clip them.
        self._host_gives_no_norm = grad_norm is None
        values = self.watch.end_step(self._own_norm if grad_norm is None else grad_norm)
        rollback = self.rollback
        if rollback is None:
            host_acts()
            return
        try:
            if values is not None:
                rollback.watch(values)
                if rollback.perform_if_asked(model, tr_loss):
                    self._save_after_rollback(save_was_due)
                elif self.holds_back_saves:
                    trainer.control.should_save = False
            # Detectors that work on logs and evaluations speak while the host acts; others may ask for the end there.
            control = trainer.control
            may_find = control.should_log or control.should_evaluate
            save_was_due, was_ending = control.should_save, control.should_training_stop
            host_acts()
            ends_here = control.should_training_stop and not was_ending
            stopped_by = getattr(trainer.state, "divguard_finding", None)
            told = self._ranks.gather((self.has_to_go_back, stopped_by is not None)) if ends_here else []
            if any(back for back, _ in told) and not any(stopped for _, stopped in told):
                # What asked for the end has seen the state that is undone now.
                ends_here = control.should_training_stop = False
            if ends_here:
                rollback.watch([])
            if (may_find or ends_here) and rollback.perform_if_asked(model, tr_loss):
                self._save_after_rollback(save_was_due)
                host_acts()
        finally:
            self.owes_save = False
            # After the save: killed before it, the run resumes from before the rollback, and tells it anew.
            rollback.story.write()
        rollback.take_snapshot_if_due(trainer.state.global_step)

    def _save_after_rollback(self, was_due: bool) -> None:
        """Have the state that was gone back to saved under the present step, so that a kill does not undo it."""
        assert self.rollback is not None
        self.owes_save = saves_checkpoints(self._args) and not self.rollback.went_to_memory
        self._trainer.control.should_save = was_due or self.owes_save

    @property
    def has_to_go_back(self) -> bool:
        """Whether a detector has asked for a rollback that is still to come."""
        return getattr(self._trainer.state, "divguard_rollback_request", None) is not None

    @property
    def holds_back_saves(self) -> bool:
        """Whether what would be saved now is under a fault that a rollback has not ended."""
        return self.rollback is not None and self.rollback.holds_back_saves()

    def raise_if_given_up(self) -> None:
        """Raise the error of a run that rollbacks could not save.

        Raises:
            TrainingDivergedError: If there is one.
        """
        if self.rollback is not None and self.rollback.error is not None:
            raise self.rollback.error

    # ---- saving

    @property
    def redirect(self) -> str | None:
        """Folder that stands in for the run folder while the host saves."""
        return self._saver.redirect if self._saver else None

    def save(
        self,
        write: Callable[[], None],
        push: Callable[[str], None],
        note_best: Callable[[dict[str, float]], object],
    ) -> None:
        """Save a checkpoint of the present step, publish it, delete what need not stay.

        Args:
            write: The host's own save.
            push: The host's upload of a folder.
            note_best: Lets the host record the best metric, from the evaluation of this step.
        """
        assert self._saver is not None
        state = self._trainer.state
        step = state.global_step
        self.owes_save = False
        metric = self._ranks.broadcast(self.metric_of_step(step))
        running_loss = self.running_loss.collect()
        before = replace(self.ledger)
        self.ledger.add(step, metric)
        spoilt = spoilt_note(state)
        if spoilt is not None:
            self.ledger.quarantine_after(step - 1)
        best_before = state.best_metric, state.best_global_step, state.best_model_checkpoint
        if self.points_to_saved and not self.preserves and self.has_evaluated(step):
            note_best(self._ranks.broadcast(self._metrics))
        best_global_step = state.best_global_step

        def write_without_pointer() -> None:
            # The host would look for the best checkpoint beside the folder it writes to, behind a barrier that
            # a rank with an error never reaches. The pointer is set when the checkpoint is finished.
            state.best_global_step = None
            self.is_saving = True
            try:
                with hidden_save_limit(self._args):
                    write()
            finally:
                self.is_saving = False
                state.best_global_step = best_global_step

        def finish(folder: Path) -> None:
            self._point_to_best(state, being_saved=step)
            if self._args.should_save:
                rewrite_best(state, os.path.join(folder, "trainer_state.json"))

        try:
            written = self._saver.save(
                step,
                write=write_without_pointer,
                finish=finish,
                sidecar=lambda: replace(self._sidecar(step, running_loss), quarantine=spoilt),
                anew=step in before.quarantined,
            )
        except CheckpointSaveError as error:
            self.ledger.rewind_to(before)
            self._ranks.run_on_main(self.ledger.drop_missing)
            self.ledger.records = self._ranks.broadcast(self.ledger.records)
            state.best_metric, state.best_global_step, state.best_model_checkpoint = best_before
            self._point_to_best(state)
            self.pending_push = None
            if self._options.divguard_on_save_error == "raise":
                raise
            if self._ranks.rank == 0:
                logger.warning("%s Training goes on without this checkpoint.", error)
            return
        if not written:
            self.ledger.rewind_to(before)
            return
        self._point_to_best(state)
        if self.pending_push is not None:
            self.pending_push = None
            push(self.ledger.path(step))
            self._pushes[step] = getattr(self._trainer, "push_in_progress", None)
        if spoilt is not None and self._ranks.rank == 0:
            logger.warning("%s was saved, and marked as never to be resumed.", self.ledger.path(step))
        self._delete_surplus(just_saved=step)

    def _sidecar(self, step: int, running_loss: dict[str, Any] | None) -> Sidecar:
        assert self._saver is not None
        memories = {} if self.rollback is None else {ROLLBACK_MEMORY: self.rollback}
        states = collect_states({**self._callbacks, **memories})
        if running_loss is not None:
            states[RUNNING_LOSS] = running_loss
        stopped_by = what_stopped(self._trainer.state)
        if stopped_by is not None:
            states[STOPPED_BY] = stopped_by
        kept, problems = fit_callbacks(states)
        for problem in problems:
            logger.warning("%s", problem)
        return self.ledger.sidecar(
            step,
            metric_name=self.ranking_key,
            greater_is_better=self._options.divguard_greater_is_better,
            callbacks=kept,
            manifest_expected=self._saver.mode != "off",
        )

    def _point_to_best(self, state: Any, being_saved: int | None = None) -> None:
        """Let the host's pointer to the best checkpoint, metric and step agree with what stands on disk."""
        if not self.is_active:
            return
        if not self.preserves:
            # As the host does it, with the folder under its final name.
            step = state.best_global_step
            if step and (step == being_saved or os.path.exists(self.ledger.path(step))):
                state.best_model_checkpoint = self.ledger.path(step)
            return
        best = self.ledger.finite_best(self.greater_is_better)
        state.best_model_checkpoint = best.path if best else None
        state.best_metric = best.metric if best else None
        state.best_global_step = best.step if best else None

    def _delete_surplus(self, just_saved: int) -> None:
        assert self._saver is not None
        limit = self._args.save_total_limit
        if self.preserves:
            doomed = self.ledger.to_delete(limit, self._options.preserve_n_best, self.greater_is_better)
        else:
            best = self._trainer.state.best_model_checkpoint
            doomed = self.ledger.to_delete_as_stock(
                limit, checkpoint_step(os.path.basename(best)) if best else None
            )
        if self.rollback is not None:
            # What a rollback may still need, and what the host calls best, stays.
            protected = self.rollback.protected_steps()
            doomed = [step for step in doomed if step not in protected]
        # A quarantined checkpoint would go at once; the one that a stop has asked for stays to be looked into.
        doomed = [step for step in doomed if step != just_saved]
        uploading = {step for step, job in self._pushes.items() if job is not None and not job.is_done()}
        for step in self._ranks.broadcast([step for step in doomed if step not in uploading]):
            self._pushes.pop(step, None)
            self.ledger.forget(step)
            if not self._saver.leads:
                continue
            path = self.ledger.folder(step)
            try:
                logger.info("Deleting older checkpoint %s (save_total_limit, preserve_n_best).", path)
                delete_checkpoint(path, self.run_dir)
            except (OSError, ValueError) as error:
                logger.warning("Checkpoint %s could not be deleted (%s); training goes on.", path, error)
                self.ledger.deletion_failed(step)

    # ---- end of training

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell which checkpoints are the best, and which one a stopped run should be resumed from."""
        stopped_by = what_stopped(state)
        has_raised = self.rollback is not None and self.rollback.error is not None
        if stopped_by is not None and not has_raised and self.is_active and self._ranks.rank == 0:
            logger.warning("%s", at_the_end(state, stopped_by, self.ledger))
        if not self.preserves or self._ranks.rank != 0:
            return
        best = self.ledger.best(self.greater_is_better, self._options.preserve_n_best)
        if best:
            logger.info(
                "Best checkpoints: %s.", describe(best, with_eval_prefix(self._options.best_model_metric))
            )
        else:
            logger.warning(
                "No checkpoint was saved at a step that was evaluated: there is no best one. Set `eval_on_save=True`."
            )
