"""A ``Trainer`` that keeps its best checkpoints and evaluates before it saves."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from hf_divguard.hf.arguments import options_of
from hf_divguard.hf.callback_state import StandaloneStateKeeper
from hf_divguard.hf.compat import HAS_FINALIZE, HAS_ROTATE_METHOD, hidden_save_limit
from hf_divguard.hf.detector_choice import make_detector
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.resume import choose_for_all
from hf_divguard.hf.run_guard import RunGuard
from hf_divguard.storage.checkpoints import Checkpoint

__all__ = ["DivGuardMixin", "DivGuardTrainer"]


# To a type checker the mixin is the Trainer it will be mixed into.
if TYPE_CHECKING:
    _Host = Trainer
else:
    _Host = object


class DivGuardMixin(_Host):
    """Adds the guards of hf_divguard to any ``Trainer`` class.

    Put it left of the class it extends. The options are fields of the arguments (see
    :class:`DivGuardArgumentsMixin`); with a stock ``TrainingArguments`` all of them are
    at their defaults.

    Raises:
        ValueError: If an option needs an evaluation data set and there is none, or names
            a metric that no data set of several can produce.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> class MyTrainer(DivGuardMixin, Seq2SeqTrainer):
        ...     pass
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(DivGuardMixin):
            raise TypeError(
                f"`DivGuardMixin` must stand left of the Trainer class it extends, but `{cls.__name__}` has it on the "
                "right, where it guards nothing. Swap the two."
            )

    _guard: RunGuard | None = None
    _initial_callback_states: dict[str, Any] | None = None
    _limit_to_record: int | None = None
    _is_in_guarded_loop = False
    _is_evaluating = False
    _options_made: Any = None
    _options_made_for: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_guard_options()
        detector = make_detector(self._options)
        if detector is not None:
            self.add_callback(detector)

    @property
    def _options(self) -> Any:
        # Asked for at every step; for a stock `TrainingArguments` the defaults are made once.
        if self._options_made_for is not self.args:
            self._options_made, self._options_made_for = options_of(self.args), self.args
        return self._options_made

    def _check_guard_options(self) -> None:
        args = self._options
        eval_dataset = getattr(self, "eval_dataset", None)
        if args.eval_on_save and eval_dataset is None:
            raise ValueError(
                "`eval_on_save=True` evaluates before every save, but there is no `eval_dataset`. Pass one to the "
                "trainer, or set `eval_on_save=False`."
            )
        if args.preserve_best_model and isinstance(eval_dataset, Mapping):
            metric = args.divguard_ranking_key.removeprefix("eval_")
            if not any(metric.startswith(f"{name}_") for name in eval_dataset):
                likely = [f"{name}_{metric}" for name in eval_dataset]
                raise ValueError(
                    f"`best_model_metric={args.best_model_metric!r}` names no metric of the evaluation sets "
                    f"{list(eval_dataset)}: with several sets each metric carries the name of its set. Set it to one "
                    f"of {likely}."
                )

    # ---- public

    def best_checkpoints(self, n: int | None = None) -> list[Checkpoint]:
        """Return the best checkpoints of this run, best first.

        Args:
            n: How many at most; ``None`` for ``args.preserve_n_best``.

        Returns:
            Path, step and metric of each. Checkpoints that were not evaluated at their
            own step are left out; non-finite metrics come last. Empty before training.
        """
        if self._guard is None:
            return []
        return self._guard.ledger.best(
            self._guard.greater_is_better, self._options.preserve_n_best if n is None else n
        )

    @property
    def divguard_events(self) -> list[dict[str, Any]]:
        """The rollbacks of this run, oldest first, as in ``output_dir/divguard/events.jsonl``."""
        rollback = self._guard.rollback if self._guard is not None else None
        return list(rollback.story.events) if rollback is not None else []

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as the stock Trainer does, resuming only from complete checkpoints.

        Args:
            resume_from_checkpoint: ``True`` or ``"latest"``: the newest complete checkpoint
                in ``output_dir``, saying which were passed over and why. ``"best"``: the best
                complete one. A path: that one.
            *args: As for the stock Trainer.
            **kwargs: As for the stock Trainer.

        Raises:
            NoCompleteCheckpointError: If there are checkpoints but none is complete.
            TrainingDivergedError: If rollbacks did not help; the model then holds the best
                weights from before the fault.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._choose_checkpoint(resume_from_checkpoint) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _choose_checkpoint(self, asked: str | bool) -> str | None:
        training_args: Any = self.args
        return choose_for_all(
            asked,
            training_args.output_dir,
            Ranks(training_args.process_index, training_args.world_size),
            metric=self._options.divguard_ranking_key,
            greater_is_better=self._options.divguard_greater_is_better,
        )

    # ---- the host's seams

    def _inner_training_loop(self, batch_size: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Entered anew when `auto_find_batch_size` tries a smaller batch: everything starts over.
        handler = self.callback_handler
        trial = kwargs.get("trial")
        resumed_from = kwargs.get("resume_from_checkpoint")
        held = [getattr(callback, "_keeper", None) for callback in handler.callbacks]
        keepers = [keeper for keeper in held if isinstance(keeper, StandaloneStateKeeper)]
        for keeper in keepers:
            keeper.kept_by_trainer = True
        guard = RunGuard(self, self._get_output_dir(trial), resumed_from, self._initial_callback_states or {})
        self._initial_callback_states = guard.initial_states()
        self._guard = guard
        handler.callbacks.append(guard)
        self._is_in_guarded_loop = True
        try:
            output = super()._inner_training_loop(batch_size, *args, **kwargs)
            guard.raise_if_given_up()
            return output
        finally:
            self._is_in_guarded_loop = False
            guard.watch.release()
            handler.callbacks.remove(guard)
            for keeper in keepers:
                keeper.kept_by_trainer = False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train on one micro-batch, as the stock Trainer does, and show its loss to the detectors."""
        loss = super().training_step(*args, **kwargs)
        if self._guard is not None:
            self._guard.watch.add_micro_batch(loss)
        return loss

    def _get_learning_rate(self) -> float:
        # The host asks the schedule, which goes on unseen while the rate rises again after a rollback.
        rollback = self._guard.rollback if self._guard is not None else None
        used = rollback.rate_used if rollback is not None else None
        return super()._get_learning_rate() if used is None else used

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, *args: Any, **kwargs: Any
    ) -> None:
        def host_acts() -> None:
            if self._options.eval_on_save:
                self._evaluate_once_for_save()
            host(tr_loss, grad_norm, model, *args, **kwargs)

        host = super()._maybe_log_save_evaluate
        if self._guard is None:
            host_acts()
        else:
            self._guard.end_step(host_acts, tr_loss, grad_norm, model)

    def _evaluate_once_for_save(self) -> None:
        control = self.control
        evaluated = self._guard is not None and self._guard.has_evaluated(self.state.global_step)
        if evaluated:
            control.should_evaluate = False
        elif control.should_save:
            control.should_evaluate = True

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log, as the stock Trainer does; a callback that asks for a save here gets its evaluation too."""
        super().log(*args, **kwargs)
        if self._options.eval_on_save and self.is_in_train and not self._is_evaluating:
            self._evaluate_once_for_save()

    def _evaluate(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step
        guard = self._guard
        if self._options.eval_on_save and guard is not None and guard.has_evaluated(step):
            # Only `eval_on_start` after a resume comes here, and it does not look at the result.
            return {}
        if guard is not None and guard.has_to_go_back:
            # The log of this step has shown a divergence: what is evaluated is the state that is gone back to.
            return {}
        self._is_evaluating = True
        best_saved = self.state.best_metric
        if guard is not None and guard.points_to_saved:
            self.state.best_metric = guard.best_evaluated  # what `EarlyStoppingCallback` compares with
        try:
            metrics = super()._evaluate(trial, *args, **kwargs)
        finally:
            self._is_evaluating = False
            self.state.best_metric = best_saved
        if guard is not None:
            guard.note_evaluation(step, metrics)
            guard.agree_on_what_follows()
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # The host records a best metric although no checkpoint may hold it. Here it is recorded when a checkpoint
        # of this step is saved, together with its step and folder.
        guard = self._guard
        if guard is not None and (guard.has_to_go_back or guard.holds_back_saves):
            return False
        if guard is not None and guard.points_to_saved:
            guard.note_for_best(metrics)
        if guard is not None and guard.preserves:
            is_best = guard.is_new_best(metrics)
        elif guard is not None and guard.points_to_saved and self.args.save_strategy != "best":
            is_best = False
        else:
            is_best = bool(super()._determine_best_metric(metrics=metrics, trial=trial))
        # With `save_strategy="best"` the answer decides on the save, which a detector that stops has promised and a
        # rollback needs.
        stops = getattr(self.state, "divguard_finding", None) is not None and self.control.should_save
        return is_best or stops or (guard is not None and guard.owes_save)

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        state, guard = self.state, self._guard
        if guard is not None:
            # A save outside of the end of a step, as on SIGTERM: what it keeps of the detectors must be up to date.
            guard.watch.look()
        if getattr(state, "divguard_aborted", False) or getattr(state, "divguard_rollback_request", None):
            return
        if guard is not None and guard.holds_back_saves:
            return
        host_save = super()._save_checkpoint
        if guard is None or not guard.is_active:
            host_save(model, trial, *args, **kwargs)
            return
        self._limit_to_record = self.args.save_total_limit
        host_determine = super()._determine_best_metric
        guard.save(
            write=lambda: host_save(model, trial, *args, **kwargs),
            push=super()._push_from_checkpoint,
            note_best=lambda metrics: host_determine(metrics=metrics, trial=trial),
        )

    def _save(self, *args: Any, **kwargs: Any) -> None:
        # `training_args.bin` is written in here and must hold the user's own limit.
        training_args: Any = self.args
        hidden = training_args.save_total_limit
        if self._guard is not None and self._guard.is_saving:
            training_args.save_total_limit = self._limit_to_record
        try:
            super()._save(*args, **kwargs)
        finally:
            training_args.save_total_limit = hidden

    def _get_output_dir(self, trial: Any) -> str:
        if self._guard is not None and self._guard.redirect is not None:
            return self._guard.redirect
        return str(super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._guard is not None and self._guard.is_saving:
            self._guard.pending_push = checkpoint_folder
            return
        super()._push_from_checkpoint(checkpoint_folder)

    if HAS_FINALIZE:

        def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
            # With a limit of 1 the host deletes everything but the best checkpoint here.
            preserves = self._guard is not None and self._guard.preserves
            with hidden_save_limit(self.args) if preserves else contextlib.nullcontext():
                return super()._finalize_training(*args, **kwargs)

    if HAS_ROTATE_METHOD:

        def _sorted_checkpoints(self, *args: Any, **kwargs: Any) -> list[str]:
            # The host asks once for the end of training, to delete everything but the best with a limit of 1.
            if self._is_in_guarded_loop and self._guard is not None and self._guard.preserves:
                return []
            return list(super()._sorted_checkpoints(*args, **kwargs))  # type: ignore[misc, unused-ignore]


class DivGuardTrainer(DivGuardMixin, Trainer):
    """``transformers.Trainer`` with the guards of hf_divguard.

    Takes the arguments of ``Trainer``, and :class:`DivGuardTrainingArguments` for the
    options. With every option at its default, or with a stock ``TrainingArguments``, it
    trains, logs and saves as the stock Trainer does; callbacks that have a
    ``state_dict`` are still kept in the checkpoints.

    Raises:
        ValueError: If an option needs an evaluation data set and there is none.
    """
