"""One guarded ``train()`` call: switches the guards on, brings the events of a step to them, switches them off."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from hf_divguard.core.metrics import with_eval_prefix
from hf_divguard.core.outcome import RunOutcome
from hf_divguard.hf import control as switches
from hf_divguard.hf.adaptive_detectors import AdaptiveDivergenceDetector
from hf_divguard.hf.callback_state import quarantine_of, read_callback_states, restore_states
from hf_divguard.hf.callbacks import RunCallbacks
from hf_divguard.hf.evaluation import Evaluations
from hf_divguard.hf.host import Host
from hf_divguard.hf.losses import RUNNING_LOSS, RunningLoss, StepLosses, gradient_norm
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.reports import (
    STOPPED_BY,
    report_best,
    report_end,
    stop_note,
    warn_of_stopped_checkpoint,
)
from hf_divguard.hf.rollback import Rollback
from hf_divguard.hf.saving import Checkpoints
from hf_divguard.hf.state import outcome_of

__all__ = ["GuardedRun"]

logger = logging.getLogger(__name__)

ROLLBACK_MEMORY = "divguard_rollback"
"""Name under which the memory of rollbacks is kept among the states of callbacks."""


class GuardedRun:
    """The coordinator of the guards in one ``train()`` call; a context manager.

    Whatever it switches on is switched back on every way out, a failing start included.

    Args:
        host: The host.
        options: The options.
        run_dir: Folder that gets the checkpoints.
        resumed_from: Checkpoint that training resumes from, if any.
        initial_states: State of each stateful callback before its first training.
    """

    callbacks: RunCallbacks
    checkpoints: Checkpoints
    evaluations: Evaluations
    rollback: Rollback | None

    def __init__(
        self,
        host: Host,
        options: Any,
        *,
        run_dir: str,
        resumed_from: str | None,
        initial_states: dict[str, Any],
    ) -> None:
        self.host = host
        self.options = options
        self.events = RunEvents(self)
        self.is_training = False
        self._run_dir = run_dir
        self._resumed_from = resumed_from
        self._initial_states = initial_states
        self._saves_rollback = False

    # ---- life cycle

    def __enter__(self) -> GuardedRun:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        host, options, args = self.host, self.options, self.host.args
        self.ranks = Ranks(args.process_index, args.world_size)
        self.losses = StepLosses(options.divguard_check_steps, args.world_size)
        stack.callback(self.losses.close)
        self.callbacks = RunCallbacks(host, stack, self.losses, self._initial_states)
        self.running_loss = RunningLoss(host, self.ranks)
        uses_options = options.preserve_best_model or options.eval_on_save
        is_active = (
            uses_options or self.callbacks.stateful or options.divguard_save_mode not in ("auto", "off")
        )
        self.checkpoints = Checkpoints(
            host, options, self.ranks, self._run_dir, self._resumed_from, is_active=bool(is_active)
        )
        self.evaluations = Evaluations(host, options, self.ranks, self.checkpoints.ledger)
        self.rollback = self._make_rollback()
        if self.rollback is not None:
            self.losses.subscribe(self.rollback)
            self.checkpoints.protected_steps = self.rollback.protected_steps
        host.callbacks.append(self.events)
        stack.callback(lambda: host.callbacks.remove(self.events))
        self.is_training = True
        stack.callback(lambda: setattr(self, "is_training", False))

    def _make_rollback(self) -> Rollback | None:
        detectors = self.callbacks.detectors
        rolling_back = [each for each in detectors.values() if each.action == "rollback"]
        if not rolling_back:
            return None
        adaptive = [each for each in rolling_back if isinstance(each, AdaptiveDivergenceDetector)]
        return Rollback(
            self.host,
            self.options,
            ledger=self.checkpoints.ledger,
            ranks=self.ranks,
            leads=self.checkpoints.leads,
            detectors=detectors,
            watches_damage=any(each.takes_raw_losses for each in adaptive),
            on_rewind=self._forget_after,
        )

    @property
    def outcome(self) -> RunOutcome:
        """What was decided in this run so far."""
        return outcome_of(self.host.state)

    def begin(self) -> None:
        """At the start of training: give callbacks, evaluations and rollback what the resumed checkpoint knows."""
        state, resumed_from = self.host.state, self._resumed_from
        self.losses.start(state.global_step)
        states: dict[str, Any] | None = None
        if resumed_from is not None:
            self.evaluations.recall(state)
            if self.callbacks.stateful:
                read = read_callback_states(resumed_from) if self.ranks.rank == 0 else None
                states = self.ranks.broadcast(read)
        self.callbacks.restore(states)
        if states is not None and resumed_from is not None:
            self.running_loss.restore(states.get(RUNNING_LOSS))
            if STOPPED_BY in states and self.ranks.rank == 0:
                warn_of_stopped_checkpoint(resumed_from, states[STOPPED_BY], self.checkpoints.ledger)
            if self.rollback is not None and ROLLBACK_MEMORY in states:
                restore_states({ROLLBACK_MEMORY: self.rollback}, states)
        self.checkpoints.point_to_best()
        if self.rollback is not None:
            self.rollback.begin(state)
        if self.options.divguard_action != "stop" and not self.callbacks.detectors and self.ranks.rank == 0:
            logger.warning(
                "`divguard_action=%r` has no detector to act for, so nothing is guarded. Set `divguard_detector`, for "
                "example to 'adaptive'.",
                self.options.divguard_action,
            )

    def finish(self) -> None:
        """At the end of training: report the best checkpoints, and which one a stopped run should be resumed from."""
        if self.ranks.rank != 0:
            return
        if self.checkpoints.is_active and (self.rollback is None or self.rollback.error is None):
            report_end(self.host.state, self.outcome, self.checkpoints.ledger)
        if self.checkpoints.preserves_best:
            key = with_eval_prefix(self.options.best_model_metric)
            greater = self.checkpoints.greater_is_better
            report_best(self.checkpoints.ledger, key, greater, self.options.preserve_n_best)

    # ---- one step

    def end_step(self, host_acts: Callable[[], None], tr_loss: Any, grad_norm: Any, model: Any) -> None:
        """Deliver the losses of the step, roll back if a detector asks for it, and let the host act.

        Args:
            host_acts: Logs, evaluates and saves, as the trainer's control says.
            tr_loss: The host's running sum of losses.
            grad_norm: Norm of the step's gradient.
            model: The model as it is trained.
        """
        host, rollback = self.host, self.rollback
        if self.callbacks.stateful:
            self.running_loss.end_step(tr_loss, host.state.global_step)
        save_was_due = host.control.should_save
        self.events.host_measures_gradients = grad_norm is not None
        delivered = self.losses.end_step(host, self.events.gradient_norm if grad_norm is None else grad_norm)
        if rollback is None:
            host_acts()
            return
        try:
            if delivered:
                rollback.judge()
                if (event := rollback.perform(model, tr_loss)) is not None:
                    self._save_after_rollback(save_was_due, to_memory=event.target == "memory")
                elif rollback.saves_suspended:
                    switches.suspend_save(host.control)
            self._act_and_roll_back(host_acts, rollback, model, tr_loss)
        finally:
            self._saves_rollback = False
            # After the save: killed before it, the run resumes from before the rollback, and repeats it.
            rollback.journal.write()
        rollback.take_snapshot_if_due()

    def _act_and_roll_back(
        self, host_acts: Callable[[], None], rollback: Rollback, model: Any, tr_loss: Any
    ) -> None:
        """Let the host act. Detectors that work on logs and evaluations find something only then."""
        control = self.host.control
        may_find = control.should_log or control.should_evaluate
        save_was_due, was_ending = control.should_save, control.should_training_stop
        host_acts()
        control = self.host.control
        ends_here = control.should_training_stop and not was_ending
        if ends_here:
            wishes = self.ranks.gather((self.rollback_pending, self.outcome.finding is not None))
            if any(pending for pending, _ in wishes) and not any(stopped for _, stopped in wishes):
                # What asked for the end has seen the state that is undone now.
                ends_here = False
                switches.cancel_end(control)
        if ends_here:
            rollback.judge()
        if (may_find or ends_here) and (event := rollback.perform(model, tr_loss)) is not None:
            self._save_after_rollback(save_was_due, to_memory=event.target == "memory")
            host_acts()

    def _save_after_rollback(self, was_due: bool, *, to_memory: bool) -> None:
        """Have the restored state saved under the present step, so that a kill does not undo the rollback."""
        self._saves_rollback = switches.saves_checkpoints(self.host.args) and not to_memory
        switches.request_save(self.host.control, was_due or self._saves_rollback)

    def _forget_after(self, target_step: int) -> None:
        """After a rollback, forget what evaluations of the steps after ``target_step`` gave."""
        self.evaluations.forget_after(self.host.state, target_step)
        if self.checkpoints.preserves_best:
            self.checkpoints.point_to_best()

    @property
    def rollback_pending(self) -> bool:
        """Whether a detector has asked for a rollback that is still to be done."""
        return self.outcome.rollback_request is not None

    @property
    def saves_suspended(self) -> bool:
        """Whether what would be saved now is under a fault that a rollback has not ended."""
        return self.rollback is not None and self.rollback.saves_suspended

    # ---- evaluation

    def evaluated(self, step: int, metrics: dict[str, float] | None) -> None:
        """Note the results of an evaluation; make what callbacks asked for at it the same on all ranks."""
        self.evaluations.note(step, metrics)
        if self.checkpoints.is_active:
            switches.merge_over_ranks(self.ranks, self.outcome, self.host.control)

    def is_new_best(self, metrics: dict[str, float], ask_host: Callable[[], bool]) -> bool:
        """Return whether an evaluation is the best; with ``save_strategy="best"`` this decides on the save."""
        if self.rollback_pending or self.saves_suspended:
            return False
        answer = self.evaluations.is_new_best(metrics)
        is_best = ask_host() if answer is None else answer
        # A detector that stops has promised a save, and a rollback needs one.
        stops = self.outcome.finding is not None and self.host.control.should_save
        return is_best or stops or self._saves_rollback

    # ---- saving

    def save(self, write: Callable[[], None], note_best: Callable[[dict[str, float]], object]) -> None:
        """Save a checkpoint of the present step, unless what was decided forbids it.

        Args:
            write: The host's own save.
            note_best: Lets the host record the best metric, from the evaluation of this step.
        """
        # A save outside of the end of a step, as on SIGTERM: what it keeps of the detectors must be up to date.
        self.losses.deliver(self.host)
        if not self.outcome.may_save or self.saves_suspended:
            return
        if not self.checkpoints.is_active:
            write()
            return
        self._saves_rollback = False
        step, evaluations = self.host.state.global_step, self.evaluations
        running_loss = self.running_loss.collect()

        def host_notes_best() -> None:
            if evaluations.host_best_is_due(step):
                note_best(self.ranks.broadcast(evaluations.metrics))

        self.checkpoints.save(
            write=write,
            note_best=host_notes_best,
            metric=self.ranks.broadcast(evaluations.metric_of_step(step)),
            callback_states=lambda: self._states(running_loss),
            quarantine=quarantine_of(self.outcome),
        )

    def _states(self, running_loss: dict[str, Any] | None) -> dict[str, Any]:
        own = {ROLLBACK_MEMORY: None if self.rollback is None else self.rollback.state_dict()}
        own |= {RUNNING_LOSS: running_loss, STOPPED_BY: stop_note(self.outcome)}
        return self.callbacks.collect() | {name: state for name, state in own.items() if state is not None}


class RunEvents(TrainerCallback):
    """Brings the host's events to a run. It stands last, so that it sees them after the other callbacks."""

    def __init__(self, run: GuardedRun) -> None:
        self._run = run
        self.host_measures_gradients = True
        self.gradient_norm: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the run."""
        self._run.begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that an epoch begins."""
        self._run.losses.begin_epoch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lower the learning rate while it rises again after a rollback; measure gradients if the host does not."""
        rollback = self._run.rollback
        if rollback is not None:
            rollback.rewarming.hold_back(self._run.host, state.global_step)
            if not self.host_measures_gradients and rollback.watches_gradients:
                self.gradient_norm = gradient_norm(self._run.host.model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the schedule its learning rate back."""
        if self._run.rollback is not None:
            self._run.rollback.rewarming.release(self._run.host)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the end of the run."""
        self._run.finish()
