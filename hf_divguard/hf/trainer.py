"""The overrides of ``Trainer`` methods: the loop of the host calls them, and they call the run."""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import Trainer

from hf_divguard.alerts.alerts import Hook
from hf_divguard.hf import control as switches
from hf_divguard.hf.argument_checks import (
    check_arguments_can_be_saved,
    check_evaluation_data,
    check_ranking_metric_can_come,
)
from hf_divguard.hf.arguments import options_of
from hf_divguard.hf.class_order import check_order
from hf_divguard.hf.control import outcome_of
from hf_divguard.hf.detectors_by_name import make_detector
from hf_divguard.hf.engines import engine_of
from hf_divguard.hf.exit_code import end_diverged
from hf_divguard.hf.host import (
    HAS_FINALIZE,
    HAS_ROTATE_METHOD,
    Host,
    SaveInProgress,
    rotate_as_host,
    save_limit,
    sharded_model_accepted,
)
from hf_divguard.hf.policy_watch import make_policy_watch
from hf_divguard.hf.public_methods import PublicMethods
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.reports import end_metrics
from hf_divguard.hf.restore import load_weights_on_all_ranks, resume_optimizer_on_all_ranks
from hf_divguard.hf.run import GuardedRun
from hf_divguard.hf.run_components import will_save_itself
from hf_divguard.hf.seams import check_host
from hf_divguard.hf.unguarded import note_guarded

__all__ = ["DivGuardMixin", "DivGuardTrainer"]


class _NothingSaved(Exception):
    """Takes the host's loop past the callbacks of a save that did not take place."""


class DivGuardMixin(PublicMethods):
    """Adds the guards of hf_divguard to any ``Trainer`` class.

    Put it left of the class it extends. The options are fields of the arguments (see
    :class:`DivGuardArgumentsMixin`); with a stock ``TrainingArguments`` all of them are
    at their defaults. :func:`hf_divguard.guard` makes such a class in one line.

    Args:
        on_divergence: Gets each event that people should see, as a dict, on rank 0 and in a thread
            of its own. It can neither slow nor end training. A callback with a method of this name
            gets them too.

    Raises:
        TypeError: When a class is made that has the mixin on the right of the class it
            extends; when the class of the arguments cannot be stored in checkpoints.
        ValueError: If an option needs an evaluation data set and there is none, or names
            a metric that no evaluation can produce.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> class MyTrainer(DivGuardMixin, Seq2SeqTrainer):
        ...     pass
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_order(cls, DivGuardMixin)

    _initial_callback_states: dict[str, Any] | None = None
    _save_in_progress: SaveInProgress | None = None
    _ends_with_save = False

    def __init__(self, *args: Any, on_divergence: Hook | None = None, **kwargs: Any) -> None:
        check_host()
        with sharded_model_accepted(args, kwargs, will_save_itself):
            super().__init__(*args, **kwargs)
        self._on_divergence = on_divergence
        outcome_of(self.state)
        note_guarded(self.args)
        self._options = options_of(self.args)
        check_arguments_can_be_saved(self.args)
        check_evaluation_data(self._options, getattr(self, "eval_dataset", None))
        check_ranking_metric_can_come(self._options, self)
        for callback in (make_detector(self._options, self), make_policy_watch(self._options, self)):
            if callback is not None:
                self.add_callback(callback)

    # ---- the host's seams

    def _inner_training_loop(self, batch_size: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Entered again when `auto_find_batch_size` tries a smaller batch: everything starts from scratch.
        trial = kwargs.get("trial")
        run = GuardedRun(
            Host(self),
            self._options,
            run_dir=self._get_output_dir(trial),
            resumed_from=kwargs.get("resume_from_checkpoint"),
            initial_states=self._initial_callback_states or {},
            locks=self._locks,
            resumes_newest=self._resumes_newest,
            on_divergence=self._on_divergence,
        )
        with run:
            self._run, self._initial_callback_states = run, run.callbacks.initial_states
            output = run.conclude(super()._inner_training_loop(batch_size, *args, **kwargs))
        error = None if run.rollback is None else run.rollback.error
        end_diverged(error, run.outcome, run.ranks, None if trial else self._options.divguard_exit_code)
        output.metrics.update(end_metrics(run.outcome, run.checkpoints.ledger))
        run.interruption.end_process()
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train on one micro-batch, as the stock Trainer does, and take its loss for the detectors."""
        run = self._run
        callbacks = self.callback_handler.callbacks
        if run is not None and run.is_training and callbacks[-1] is not run.events:
            run.callbacks.put_last(run.events)  # another callback has added one after ours
        if run is not None and run.is_training and (run.comparison or run.updates_in_backward):
            run.begin_micro_batch()
        loss = super().training_step(*args, **kwargs)
        if run is not None and run.is_training:
            run.losses.micro_batch(loss)
            run.skipping.after_micro_batch(loss)
        return loss

    def get_train_dataloader(self) -> Any:
        """Return the data loader of training, as the stock Trainer does, and follow which rows its batches hold."""
        loader = super().get_train_dataloader()
        if self._run is not None and self._run.is_training:
            self._run.follow_batches(loader)
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of the coming step, as the stock Trainer does; none in a run that has finished."""
        run = self._run
        if run is not None and run.ending.had_come:
            return [], None
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if run is not None and run.is_training and batches:
            run.take_batches(batches, num_items)
        return batches, num_items

    def _get_learning_rate(self) -> float:
        # The host asks the schedule, which goes on unseen while the rate rises again after a rollback.
        rollback = self._run.rollback if self._run is not None else None
        used = rollback.rewarming.used if rollback is not None else None
        return super()._get_learning_rate() if used is None else used

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, *args: Any, **kwargs: Any
    ) -> None:
        host_acts = super()._maybe_log_save_evaluate

        def act() -> None:
            self._evaluate_before_save()
            self._ends_with_save = True
            try:
                host_acts(tr_loss, grad_norm, model, *args, **kwargs)
            except _NothingSaved:
                # Raised where the host would call `on_save` next, which is the last that it does here.
                switches.suspend_save(self.control)
            finally:
                self._ends_with_save = False

        run = self._run
        if run is None:
            act()
            return
        if run.is_over:
            return
        run.agree()
        save_was_due = self.control.should_save
        delivered = run.losses.end_step(run.host, run.events.gradient_norm_of_step(grad_norm))
        run.end_step(act, model, tr_loss, losses_delivered=delivered, save_was_due=save_was_due)

    def _evaluate_before_save(self) -> None:
        if self._options.eval_on_save:
            run, step = self._run, self.state.global_step
            if run is not None and run.interruption.adds_save:
                return
            is_evaluated = run is not None and run.evaluations.has_evaluated(step)
            switches.request_evaluation_before_save(self.control, is_evaluated=is_evaluated)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log, as the stock Trainer does; a callback that asks for a save here gets its evaluation too."""
        if self._run is not None:
            self._run.ending.complete_log(args[0] if args else kwargs["logs"])
        super().log(*args, **kwargs)
        if self.is_in_train and not (self._run is not None and self._run.evaluations.is_running):
            self._evaluate_before_save()

    def _evaluate(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        run, step = self._run, self.state.global_step
        if run is None:
            return super()._evaluate(trial, *args, **kwargs)
        if run.ending.had_come:
            return {}
        if self._options.eval_on_save and run.evaluations.has_evaluated(step):
            # Only `eval_on_start` after a resume comes here, and it does not look at the result.
            return {}
        if outcome_of(self.state).rollback_request is not None:
            # The log of this step has shown a divergence: what is evaluated is the state that is restored.
            return {}
        with run.evaluations.running():
            metrics = super()._evaluate(trial, *args, **kwargs)
        run.evaluated(step, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # The host records a best metric although no checkpoint may hold it. Here it is recorded when a checkpoint
        # of this step is saved, together with its step and folder.
        host_determines = super()._determine_best_metric
        if self._run is None:
            return bool(host_determines(metrics=metrics, trial=trial))
        return self._run.is_new_best(metrics, lambda: bool(host_determines(metrics=metrics, trial=trial)))

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        host_save, host_determines = super()._save_checkpoint, super()._determine_best_metric
        if self._run is None:
            host_save(model, trial, *args, **kwargs)
            return
        is_active, is_jit = (
            self._run.checkpoints.is_active,
            switches.saves_on_sigterm(self.args, self.control),
        )
        if is_active and is_jit and not self._ends_with_save:
            self._run.interruption.note_host_save()
        saved = self._run.save(
            write=lambda: host_save(model, trial, *args, **kwargs),
            note_best=lambda metrics: host_determines(metrics=metrics, trial=trial),
        )
        if not saved and self._ends_with_save:
            raise _NothingSaved

    def _rotate_checkpoints(self, use_mtime: bool = False, output_dir: str | None = None) -> None:
        """Delete the checkpoints that need not stay; extend it to keep or delete more.

        With ``preserve_best_model`` the last ``save_total_limit`` and the best
        ``preserve_n_best`` stay. It is called on all ranks after each save, when the new
        checkpoint is complete under its final name.
        """
        run = self._run
        if self._save_in_progress is not None:
            return  # the host of 4.57 asks before the new checkpoint has its name
        if run is not None and run.checkpoints.is_active:
            run.checkpoints.rotate()
        elif HAS_ROTATE_METHOD:
            super()._rotate_checkpoints(use_mtime, output_dir)  # type: ignore[misc, unused-ignore]
        else:
            rotate_as_host(self, use_mtime, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *model: Any, **named: Any) -> None:
        # Some Trainers, as that of sentence-transformers, take no model: it is passed on only if it came.
        if {*map(id, (*model, *named.values()))} <= {id(None), id(self.model)} and engine_of(
            Host(self)
        ).loads_weights:
            load_weights_on_all_ranks(Host(self), resume_from_checkpoint, self._ranks())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, *model, **named)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not engine_of(Host(self)).save_optimizer(output_dir):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and engine_of(Host(self)).loads_optimizer(checkpoint):
            resume_optimizer_on_all_ranks(Host(self), checkpoint, self._ranks())
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _ranks(self) -> Ranks:
        args: Any = self.args
        return Ranks(args.process_index, args.world_size)

    def _load_best_model(self) -> None:
        if self._run is None or self._run.interruption.by is None:
            best = self.state.best_model_checkpoint
            if best is not None and engine_of(Host(self)).loads_weights:
                load_weights_on_all_ranks(Host(self), best, self._ranks())
            else:
                super()._load_best_model()
            if self._run is not None:
                self._run.loaded = self.state.best_model_checkpoint

    def _save(self, *args: Any, **kwargs: Any) -> None:
        # `training_args.bin` is written in here and must hold the user's own limit.
        saving = self._save_in_progress
        with contextlib.nullcontext() if saving is None else saving.limit_shown(self.args):
            super()._save(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        saving = self._save_in_progress
        if saving is not None and saving.folder is not None:
            return saving.folder
        return str(super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._save_in_progress is not None:
            self._save_in_progress.pushes.append(checkpoint_folder)
            return
        super()._push_from_checkpoint(checkpoint_folder)

    if HAS_FINALIZE:

        def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
            # With a limit of 1 the host deletes everything but the best checkpoint here.
            run = self._run
            with (
                save_limit(self.args, None)
                if run is not None and _keeps_all(run)
                else contextlib.nullcontext()
            ):
                return super()._finalize_training(*args, **kwargs)

    if HAS_ROTATE_METHOD:

        def _sorted_checkpoints(self, *args: Any, **kwargs: Any) -> list[str]:
            # The host asks once for the end of training, to delete everything but the best with a limit of 1.
            run = self._run
            if run is not None and run.is_training and _keeps_all(run):
                return []
            return list(super()._sorted_checkpoints(*args, **kwargs))  # type: ignore[misc, unused-ignore]


def _keeps_all(run: GuardedRun) -> bool:
    """Return whether the host must not delete checkpoints at the end of training."""
    return run.checkpoints.preserves_best or run.ending.had_come or run.interruption.by is not None


class DivGuardTrainer(DivGuardMixin, Trainer):
    """``transformers.Trainer`` with the guards of hf_divguard.

    Takes the arguments of ``Trainer``, and :class:`DivGuardTrainingArguments` for the
    options. With every option at its default, or with a stock ``TrainingArguments``, it
    trains, logs and saves as the stock Trainer does; callbacks that have a
    ``state_dict`` are still kept in the checkpoints.

    Raises:
        ValueError: If an option needs an evaluation data set and there is none.
    """
