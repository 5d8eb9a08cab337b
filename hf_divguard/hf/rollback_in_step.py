"""When in a step a rollback takes place: at its end, after the host has logged and evaluated, or before the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_divguard.core.outcome import RunOutcome
from hf_divguard.core.rollback.event import RollbackEvent
from hf_divguard.hf import control as switches
from hf_divguard.hf.control import outcome_of
from hf_divguard.hf.host import Host
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.rollback import Rollback

__all__ = ["RollbackInStep"]


class RollbackInStep:
    """Lets the host act at the end of a step, and rolls back before or after it, on all ranks together.

    Args:
        host: The host.
        ranks: The processes of the run.
        rollback: Carries out rollbacks; ``None`` if no detector asks for one.
    """

    def __init__(self, host: Host, ranks: Ranks, rollback: Rollback | None) -> None:
        self._host = host
        self._ranks = ranks
        self._rollback = rollback
        self._tr_loss: torch.Tensor | None = None
        self._step_is_void = False
        self.last_event: RollbackEvent | None = None
        self.save_pending = False
        """Whether the state of a rollback is still to be saved in this step."""

    @property
    def _outcome(self) -> RunOutcome:
        return outcome_of(self._host.state)

    @property
    def saves_suspended(self) -> bool:
        """Whether what would be saved now is under a fault that a rollback has not ended."""
        if self._rollback is None:
            return False
        return self._rollback.sees_the_fault or self._outcome.deferred is not None

    @property
    def has_failed(self) -> bool:
        """Whether rollbacks did not help, so that the run has ended."""
        return self._rollback is not None and self._rollback.error is not None

    def end_step(
        self,
        host_acts: Callable[[], None],
        model: Any,
        tr_loss: torch.Tensor,
        *,
        losses_delivered: bool,
        save_was_due: bool,
    ) -> None:
        """Roll back if a detector asks for it, and let the host log, evaluate and save.

        Args:
            host_acts: Logs, evaluates and saves, as the trainer's control says.
            model: The model as it is trained.
            tr_loss: The host's running sum of losses.
            losses_delivered: Whether detectors have seen the losses up to this step.
            save_was_due: Whether a save was due before they did.
        """
        if self._rollback is None:
            host_acts()
            return
        self._tr_loss = tr_loss
        if self._step_is_void:
            # It had begun when the run was ended, and has trained the weights that the model is to hold.
            self._rollback.failed_recovery.load_best()
            self._step_is_void = False
        try:
            if losses_delivered:
                self._rollback.judge()
                if not self._perform_and_save(model, tr_loss, save_was_due) and self.saves_suspended:
                    switches.suspend_save(self._host.control)
            self._act(self._rollback, host_acts, model, tr_loss)
        finally:
            self.save_pending = False

    def _act(
        self, rollback: Rollback, host_acts: Callable[[], None], model: Any, tr_loss: torch.Tensor
    ) -> None:
        """Let the host act. Detectors that work on logs and evaluations find something only then."""
        control = self._host.control
        may_find = control.should_log or control.should_evaluate
        save_was_due, was_ending = control.should_save, control.should_training_stop
        host_acts()
        control = self._host.control
        ends_here = control.should_training_stop and not was_ending
        if ends_here:
            outcome = self._outcome
            wishes = self._ranks.gather((outcome.rollback_request is not None, outcome.finding is not None))
            if any(pending for pending, _ in wishes) and not any(stopped for _, stopped in wishes):
                # What asked for the end has seen the state that is undone now.
                ends_here = False
                switches.cancel_end(control)
        if ends_here:
            rollback.judge()
        if (may_find or ends_here) and self._perform_and_save(model, tr_loss, save_was_due):
            host_acts()

    def begin_step(self) -> None:
        """Before the first micro-batch of a step: roll back if the comparison asks for it.

        Nothing has been added to the host's running loss since the end of the last step.
        """
        if self._outcome.rollback_request is None or self._tr_loss is None:
            return
        if self._perform_and_save(self._host.model, self._tr_loss, self._host.control.should_save):
            self.save_pending = False
        self._step_is_void = self.has_failed

    def _perform_and_save(self, model: Any, tr_loss: torch.Tensor, save_was_due: bool) -> bool:
        """Roll back if asked to, and have the restored state saved, so that a kill does not undo the rollback."""
        event = None if self._rollback is None else self._rollback.perform(model, tr_loss)
        if event is None:
            return False
        self.last_event = event
        self.save_pending = switches.saves_checkpoints(self._host.args) and event.target != "memory"
        switches.request_save(self._host.control, save_was_due or self.save_pending)
        return True
