"""One guarded ``train()`` call: what the guards do at the events of the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from hf_divguard.core.metrics import with_eval_prefix
from hf_divguard.core.outcome import RunOutcome
from hf_divguard.hf import control as switches
from hf_divguard.hf.batch_indices import batches_to_skip, named_rows
from hf_divguard.hf.callbacks import (
    collect_states,
    has_foreign,
    read_callback_states,
    restore_states,
)
from hf_divguard.hf.control import outcome_of
from hf_divguard.hf.journal import JOURNAL
from hf_divguard.hf.last_weights import load_last_good
from hf_divguard.hf.reports import (
    STOPPED_BY,
    report_best,
    report_end,
    warn_of_diverged_weights,
)
from hf_divguard.hf.run_components import RunComponents
from hf_divguard.hf.run_events import RunEvents
from hf_divguard.hf.running_loss import RUNNING_LOSS
from hf_divguard.hf.start_checks import warn_at_start
from hf_divguard.storage.events import read_events
from hf_divguard.storage.failpoints import failpoint

__all__ = ["GuardedRun"]

COMPARISON_MEMORY = "divguard_comparison"
"""Name under which the memory of comparisons is kept among the states of callbacks."""

ROLLBACK_MEMORY = "divguard_rollback"
"""Name under which the memory of rollbacks is kept among the states of callbacks."""


class GuardedRun(RunComponents):
    """The coordinator of the guards in one ``train()`` call: brings the events of the host to the components.

    Takes the arguments of :class:`RunComponents`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.events = RunEvents(self)
        self.loaded: str | None = None
        """Checkpoint whose weights the model was given after the run."""
        self._acts_jointly = False
        self._has_foreign_callbacks = False

    @property
    def outcome(self) -> RunOutcome:
        """What was decided in this run so far."""
        return outcome_of(self.host.state)

    # ---- begin and end

    @property
    def _keeps_states(self) -> bool:
        """Whether checkpoints hold states: of callbacks, or of losses between two logs, where a signal may cut."""
        return bool(self.callbacks.stateful) or self.options.divguard_save_on_signal != "none"

    def begin(self) -> None:
        """At the start of training: give callbacks, evaluations and rollback what the resumed checkpoint knows."""
        state, resumed_from = self.host.state, self._resumed_from
        if self.checkpoints.is_active:
            self._has_foreign_callbacks = any(self.ranks.gather(has_foreign(self.host.callbacks)))
            self.evaluations.ranks_meet_first = self._has_foreign_callbacks
        self.losses.start(state.global_step)
        self.ending.begin()
        states: dict[str, Any] | None = None
        if resumed_from is not None:
            self.evaluations.recall(state)
            if self._keeps_states:
                read = read_callback_states(resumed_from) if self.ranks.rank == 0 else None
                states = self.ranks.broadcast(read)
        self.callbacks.restore(states)
        if states is not None and resumed_from is not None:
            self.running_loss.restore(states.get(RUNNING_LOSS))
            own = {ROLLBACK_MEMORY: self.rollback, COMPARISON_MEMORY: self.comparison, JOURNAL: self.journal}
            restore_states({name: each for name, each in own.items() if each and name in states}, states)
            self.suspects.judge_again(resumed_from, states.get(STOPPED_BY))
        if self.comparison is not None:
            self.comparison.begin()
        if self.checkpoints.is_active:
            self.journal.begin(state.global_step)
            self.skipping.begin(state.global_step)
        self.checkpoints.point_to_best()
        if self.rollback is not None:
            self.rollback.begin(state)
        warn_at_start(self.host, self.options, self.detectors.values(), is_resumed=resumed_from is not None)

    @property
    def is_over(self) -> bool:
        """Whether the host has nothing more to log, to evaluate or to save at the end of a step or epoch."""
        return self.ending.had_come or self.interruption.is_done

    def conclude(self, output: Any) -> Any:
        """Note how the run ended; return what ``train()`` returns."""
        self.reporting.note_signal(self.interruption.by)
        self.reporting.conclude()
        gave_up = self.rollback_in_step.has_failed
        return self.ending.conclude(
            output, self.outcome, gave_up=gave_up, interrupted_by=self.interruption.by
        )

    def finish(self) -> None:
        """At the end of training: report the best checkpoints, and which one a stopped run should be resumed from."""
        if self.ranks.rank != 0:
            return
        if self.checkpoints.is_active and not self.rollback_in_step.has_failed:
            report_end(self.host.state, self.outcome, self.checkpoints.ledger)
        if self.checkpoints.preserves_best:
            key = with_eval_prefix(self.options.best_model_metric)
            greater = self.checkpoints.greater_is_better
            report_best(self.checkpoints.ledger, key, greater, self.options.preserve_n_best)

    # ---- after training

    def load_last_good(self) -> str:
        """Load the weights of the last good checkpoint; see :meth:`DivGuardMixin.load_last_good`."""
        self.loaded = load_last_good(self.host, self.outcome, self.checkpoints.ledger, self.ranks)
        return self.loaded

    def warn_of_weights(self) -> None:
        """Before the model is saved: warn if it holds the weights of a run that a detector stopped."""
        if self.loaded is None and self.ranks.rank == 0 and not self.rollback_in_step.has_failed:
            warn_of_diverged_weights(self.host.state, self.outcome, self.checkpoints.ledger)

    # ---- one step

    def follow_batches(self, loader: Any) -> None:
        """Follow which rows the batches of training hold; leave suspect ones out of a resumed run, if that is wanted."""
        if self.comparison is None:
            return
        indices = self.comparison.bad_batches.indices
        if self.options.divguard_skip_suspect_rows and self._resumed_from is not None:
            named = named_rows(read_events(self._run_dir)) if self.ranks.rank == 0 else []
            indices.leave_out(self.ranks.broadcast(named), is_main=self.ranks.rank == 0)
        indices.follow(loader, lambda: batches_to_skip(loader, self.host.args, self.host.state.global_step))

    def begin_micro_batch(self) -> None:
        """Before a micro-batch: before the first one of a step, compare weights and roll back if need be."""
        if self.comparison is not None:
            self.comparison.begin_step()
            self.rollback_in_step.begin_step()
        if self.rollback is not None and self.updates_in_backward and self.host.completes_step:
            self.rollback.rewarming.hold_back(self.host, self.host.state.global_step)

    def take_batches(self, batches: list[Any], num_items: Any) -> None:
        """Before a step: take its micro-batches."""
        if self.comparison is not None:
            self.comparison.take_batches(batches, num_items)
        self.reporting.recent.note_batches(self.host.state.global_step + 1, batches)

    def agree(self) -> None:
        """At the end of a step: make what callbacks and signals ask for the same on all ranks."""
        if self._has_foreign_callbacks:
            switches.merge_switches(self.ranks, self.host.control)
        self.interruption.check()

    def end_step(
        self,
        host_acts: Callable[[], None],
        model: Any,
        tr_loss: Any,
        *,
        losses_delivered: bool,
        save_was_due: bool,
    ) -> None:
        """After the losses of a step were delivered: roll back if a detector asks for it, and let the host act.

        Args:
            host_acts: Logs, evaluates and saves, as the trainer's control says.
            model: The model as it is trained.
            tr_loss: The host's running sum of losses.
            losses_delivered: Whether detectors and rollback have seen the losses up to this step.
            save_was_due: Whether a save was due at this step before they did.
        """
        step = self.host.state.global_step
        if self._keeps_states:
            self.running_loss.end_step(tr_loss, step)
        if self.comparison is not None:
            self._end_compared_step(losses_delivered, save_was_due)
        self.suspects.follow()
        self.reporting.note_signal(self.interruption.by)
        self.reporting.log()
        try:
            with self._together(step):
                self.rollback_in_step.end_step(
                    host_acts,
                    model,
                    tr_loss,
                    losses_delivered=losses_delivered,
                    save_was_due=save_was_due,
                )
        finally:
            self.suspects.follow()
            self.reporting.log()
            # After the save: killed before it, the run resumes from before a rollback, and repeats it.
            self.reporting.publish()
        self.interruption.end_step()
        if self.rollback is not None:
            self.rollback.take_snapshot_if_due()
        elif self.comparison is not None and self.snapshots.is_due(step) and not self.comparison.suspects:
            self.snapshots.take(self.host, step, collect_states(self.detectors))

    def _end_compared_step(self, losses_delivered: bool, save_was_due: bool) -> None:
        comparison, state = self.comparison, self.host.state
        assert comparison is not None
        if self.skipping.seen is not None and self.ranks.world_size == 1:
            comparison.observe(state.global_step, *self.skipping.seen)
        comparison.end_step(losses_delivered=losses_delivered, save_was_due=save_was_due)
        is_last = state.global_step >= state.max_steps or self.host.control.should_training_stop
        if self.rollback is None and is_last:
            comparison.settle(is_last=True)

    def _together(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Let an error in the evaluation or save of ``step``, or in their callbacks, end all ranks alike."""
        if not self.checkpoints.is_active:
            return contextlib.nullcontext()
        control, self._acts_jointly = self.host.control, False
        due = control.should_save or control.should_evaluate
        if self.ranks.world_size == 1 or not (due or control.should_log):
            return contextlib.nullcontext()
        return self.ranks.together(
            f"The evaluation or save of step {step}",
            lambda: due or self._acts_jointly or self._has_foreign_callbacks,
        )

    # ---- evaluation

    def evaluated(self, step: int, metrics: dict[str, float] | None) -> None:
        """Note the results of an evaluation; make what callbacks asked for at it the same on all ranks."""
        self._acts_jointly = True
        self.evaluations.note(step, metrics)
        if self.checkpoints.is_active:
            switches.merge_over_ranks(self.ranks, self.outcome, self.host.control)

    def is_new_best(self, metrics: dict[str, float], ask_host: Callable[[], bool]) -> bool:
        """Return whether an evaluation is the best; with ``save_strategy="best"`` this decides on the save."""
        rollback, outcome = self.rollback_in_step, self.outcome
        if outcome.rollback_request is not None or rollback.saves_suspended:
            return False
        self.suspects.follow()
        if outcome.suspect_since is not None:
            return outcome.finding is not None and bool(self.host.control.should_save)
        answer = self.evaluations.is_new_best(metrics)
        is_best = ask_host() if answer is None else answer
        # A detector that stops has promised a save, and a rollback needs one.
        stops = outcome.finding is not None and self.host.control.should_save
        if self.interruption.by is not None:
            return True
        return is_best or stops or rollback.save_pending

    # ---- saving

    def save(self, write: Callable[[], None], note_best: Callable[[dict[str, float]], object]) -> bool:
        """Save a checkpoint of the present step, unless what was decided forbids it.

        Args:
            write: The host's own save.
            note_best: Lets the host record the best metric, from the evaluation of this step.

        Returns:
            Whether the checkpoint of this step is there.
        """
        self._acts_jointly = True
        what = f"Saving step {self.host.state.global_step}"
        is_active = self.checkpoints.is_active
        with self.ranks.together(what, lambda: True) if is_active else contextlib.nullcontext():
            saved = self._save(write, note_best)
        if saved:
            self.snapshots.note_saved(self.host.state.global_step)
        self.interruption.note_saved(
            self.checkpoints.ledger.path(self.host.state.global_step) if saved else None
        )
        return saved

    def _save(self, write: Callable[[], None], note_best: Callable[[dict[str, float]], object]) -> bool:
        # A save outside of the end of a step, as on SIGTERM: what it keeps of the detectors must be up to date.
        self.losses.deliver(self.host)
        outcome, rollback = self.outcome, self.rollback_in_step
        if not outcome.may_save or rollback.saves_suspended:
            return False
        if not self.checkpoints.is_active:
            write()
            self.host.rotate_after_own_save(self._run_dir)
            return True
        self.suspects.follow()
        self.reporting.log()
        saves_rollback, rollback.save_pending = rollback.save_pending, False
        step, evaluations = self.host.state.global_step, self.evaluations
        running_loss = self.running_loss.collect()

        def host_notes_best() -> None:
            if evaluations.host_best_is_due(step):
                note_best(self.ranks.broadcast(evaluations.metrics))

        is_saved = self.checkpoints.save(
            write=write,
            note_best=host_notes_best,
            metric=self.ranks.broadcast(None if self._is_known(step) else evaluations.metric_of_step(step)),
            callback_states=self._states(running_loss),
            damaged_by=outcome.damaged_by,
        )
        if saves_rollback:
            failpoint("rollback saved")
        return is_saved

    def _is_known(self, step: int) -> bool:
        """Return whether what is saved now are the weights of a checkpoint that is ranked already."""
        event = self.rollback_in_step.last_event
        if event is None or event.step != step:
            return False
        ranked = {record.step for record in self.checkpoints.ledger.records if record.metric is not None}
        return event.target_step in ranked

    def _states(self, running_loss: dict[str, Any] | None) -> dict[str, Any]:
        own: dict[str, Any] = {ROLLBACK_MEMORY: None if self.rollback is None else self.rollback.state_dict()}
        own |= {RUNNING_LOSS: running_loss, STOPPED_BY: self.outcome.stop_note()}
        own[JOURNAL] = self.journal.state_dict() if self.journal.events else None
        own |= {COMPARISON_MEMORY: None if self.comparison is None else self.comparison.state_dict()}
        states = collect_states(self.callbacks.stateful)
        return states | {name: state for name, state in own.items() if state is not None}
