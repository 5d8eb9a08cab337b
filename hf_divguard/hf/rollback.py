"""Rolling a diverged run back inside the running loop, on all ranks together."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.policy import Decision, RollbackPolicy, Target
from hf_divguard.core.rollback.triggers import UNDONE_ONCE, RollbackTriggers
from hf_divguard.errors import CheckpointError, TrainingDivergedError
from hf_divguard.hf.actions import saves_checkpoints
from hf_divguard.hf.adaptive_detectors import AdaptiveDivergenceDetector
from hf_divguard.hf.callback_state import collect_states, read_callback_states
from hf_divguard.hf.detectors import DivergenceDetector
from hf_divguard.hf.journal import RollbackJournal, log_keys
from hf_divguard.hf.last_weights import best_before, load_first_of
from hf_divguard.hf.loss_tap import StepValues
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.rates import Rewarming, scale_rates, scheduled_rates
from hf_divguard.hf.restore import (
    refuse_unsupported,
    restore_checkpoint,
    weights_kept_on_error,
)
from hf_divguard.hf.snapshots import Snapshots, restore_snapshot
from hf_divguard.storage.integrity import verify_checkpoint
from hf_divguard.storage.ledger import CheckpointLedger
from hf_divguard.storage.quarantine import quarantine

__all__ = ["Rollback"]

logger = logging.getLogger(__name__)


class Rollback:
    """Carries out rollbacks for one ``train()`` call; its memory is kept in the checkpoints.

    Args:
        trainer: The trainer.
        options: The options.
        ledger: The checkpoints of the run.
        ranks: The processes of the run.
        leads: Whether this rank marks checkpoints on its file system.
        detectors: The detectors, whose memories go back too.
        on_left_behind: Called with the target's step once what came after it is out of the
            lineage.

    Raises:
        ValueError: Where a rollback cannot work; see :func:`refuse_unsupported`.
    """

    def __init__(
        self,
        trainer: Any,
        options: Any,
        *,
        ledger: CheckpointLedger,
        ranks: Ranks,
        leads: bool,
        detectors: dict[str, DivergenceDetector],
        on_left_behind: Callable[[int], None],
    ) -> None:
        refuse_unsupported(trainer)
        self._trainer = trainer
        self._options = options
        self._ledger = ledger
        self._ranks = ranks
        self._leads = leads
        self._detectors = detectors
        self._on_left_behind = on_left_behind
        self._finite_total = 0.0
        self._last_not_finite = -1
        self._rewarming = Rewarming(options.divguard_rewarm_steps)
        self._snapshots = Snapshots(
            options.divguard_snapshot_steps,
            check_steps=options.divguard_check_steps,
            margin_steps=options.divguard_rollback_margin_steps,
        )
        self._origins: dict[int, int] = {}
        self.policy = RollbackPolicy(
            max_rollbacks=options.divguard_max_rollbacks,
            cooldown_steps=options.divguard_cooldown_steps,
            margin_steps=options.divguard_rollback_margin_steps,
            lr_factor=options.divguard_rollback_lr_factor,
        )
        minds_setbacks = any(
            isinstance(detector, AdaptiveDivergenceDetector)
            and detector.action == "rollback"
            and detector.takes_raw_losses
            for detector in detectors.values()
        )
        # What a loss scaler has enlarged cannot be compared from step to step.
        has_scaler = getattr(trainer.accelerator, "scaler", None) is not None
        self.minds_explosions = minds_setbacks and not trainer.args.max_grad_norm and not has_scaler
        self._watch = RollbackTriggers(
            self.policy, minds_setbacks=minds_setbacks, minds_explosions=self.minds_explosions
        )
        self.story = RollbackJournal(ledger.run_dir, ledger.run_id, ranks)
        self.error: TrainingDivergedError | None = None
        self.went_to_memory = False

    # ---- memory

    def state_dict(self) -> dict[str, Any]:
        """Return incidents, events and the origins of checkpoints saved after rollbacks."""
        return {
            "policy": self.policy.state_dict(),
            "events": list(self.story.events),
            "origins": {str(step): origin for step, origin in self._origins.items()},
            "rewarm_since": self._rewarming.since,
            "watch": self._watch.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory.

        Raises:
            ValueError: If it cannot be read.
        """
        self.policy.load_state_dict(state_dict["policy"])
        self.story.events = list(state_dict["events"])
        self._origins = {int(step): int(origin) for step, origin in state_dict["origins"].items()}
        self._rewarming.since = state_dict["rewarm_since"]
        self._watch.load_state_dict(state_dict["watch"])

    def begin(self, state: Any) -> None:
        """Start training: bring the story on disk up to date, mute what has to stay muted."""
        self.story.begin(state.global_step)
        has_source = saves_checkpoints(self._trainer.args) or self._options.divguard_snapshot_steps > 0
        if not has_source and self._ranks.rank == 0:
            logger.warning(
                "Nothing is saved (`save_strategy='no'`), so there is nothing to roll back to. Set `save_strategy`, or "
                "keep states in memory with `divguard_snapshot_steps`."
            )
        state.divguard_muted_until = self.policy.muted_until
        self._take_snapshot(state.global_step)

    def take_snapshot_if_due(self, step: int) -> None:
        """Keep the present state in memory if ``step`` is one that gets a snapshot."""
        if self._snapshots.is_due(step) and not self.policy.is_muted(step) and self.error is None:
            self._take_snapshot(step)

    def _take_snapshot(self, step: int) -> None:
        self._snapshots.take(self._trainer, step, collect_states(self._detectors))

    # ---- one step

    def watch(self, values: list[StepValues]) -> None:
        """Take the raw losses since the last look, and ask for a rollback where they call for one."""
        trainer, state = self._trainer, self._trainer.state
        total = float(trainer._total_loss_scalar)
        if math.isfinite(total):
            self._finite_total = total
        for entry in values:
            if not math.isfinite(entry.loss):
                self._last_not_finite = entry.step
            self._watch.observe(entry.step, entry.loss, entry.grad_norm)
        is_last = state.global_step >= state.max_steps or trainer.control.should_training_stop
        finding = self._watch.judge(state.global_step, is_last=is_last)
        if finding is not None and getattr(state, "divguard_rollback_request", None) is None:
            state.divguard_rollback_request = finding

    def holds_back_saves(self) -> bool:
        """Return whether what would be saved now is under a fault that a rollback has not ended."""
        return self._watch.sees_the_fault()

    def perform_if_asked(self, model: Any, tr_loss: torch.Tensor) -> bool:
        """Roll back if any rank's detectors ask for it; return whether weights were put back.

        Called by all ranks at the same point of a step.
        """
        state = self._trainer.state
        requests = self._ranks.gather(getattr(state, "divguard_rollback_request", None))
        state.divguard_rollback_request = None
        finding = next((request for request in requests if request is not None), None)
        if finding is None or self.error is not None:
            return False
        finding = self.policy.place(finding)
        unusable: set[Target] = set()
        while True:
            began = time.perf_counter()
            decision = self._ranks.run_on_main(lambda: self._decide(finding, unusable))
            if decision.target is None and finding.kind in UNDONE_ONCE:
                self._watch.let_heal()
                self.story.tell_left(finding, decision.reason)
                return False
            if decision.target is None:
                self._give_up(finding, decision, model, tr_loss)
                return False
            try:
                self._restore(decision.target)
            except CheckpointError as error:
                # Said by every rank alike. Another target may be readable.
                if self._ranks.rank == 0:
                    logger.warning("%s Trying an older state.", error)
                unusable.add(decision.target)
                continue
            self._mark_diverged(self._last_good(finding), finding.onset_step, "and was rolled back", finding)
            self._go_on_from(decision, finding, model, tr_loss, began)
            return True

    def _decide(self, finding: Finding, unusable: set[Target]) -> Decision:
        """Choose a target that is there and whole; on rank 0."""
        step = self._trainer.state.global_step
        targets = [self._target(kept.step, is_snapshot=True) for kept in self._snapshots.all()]
        in_memory = {target.step for target in targets if target not in unusable}
        targets += [
            self._target(kept) for kept in self._usable_steps() if kept <= step and kept not in in_memory
        ]
        targets = [target for target in targets if target not in unusable]
        while True:
            decision = self.policy.decide(finding, step, targets)
            if decision.target is None and unusable:
                steps = ", ".join(
                    str(target.step) for target in sorted(unusable, key=lambda target: target.step)
                )
                reason = f"{decision.reason}. What was kept of step {steps} could not be put back"
                return replace(decision, reason=reason)
            if decision.target is None or decision.target.is_snapshot:
                return decision
            path = self._ledger.path(decision.target.step)
            verdict = verify_checkpoint(path)
            if verdict.status == "complete" and verdict.resumable:
                return decision
            logger.warning("Not rolling back to %s: %s", path, verdict.reason)
            targets = [target for target in targets if target != decision.target]

    def _last_good(self, finding: Finding) -> int:
        return finding.onset_step - 2 - self.policy.margin_steps

    def _target(self, step: int, *, is_snapshot: bool = False) -> Target:
        return Target(step, self._origins.get(step, step), is_snapshot=is_snapshot)

    def _go_on_from(
        self, decision: Decision, finding: Finding, model: Any, tr_loss: torch.Tensor, began: float
    ) -> None:
        """After the target was put back: the loop, the memories and the learning rate; then tell it."""
        assert decision.target is not None
        state, target = self._trainer.state, decision.target
        step = state.global_step
        before = scheduled_rates(self._trainer)[0]
        scale_rates(self._trainer, decision.lr_factor)
        pending_loss = self._clean_loop(model, tr_loss)
        self._snapshots.drop_after(self._last_good(finding))
        self._watch.rewind(target.step, step, finding)
        self.policy.record(decision, step)
        self.went_to_memory = target.is_snapshot
        self._origins = {kept: origin for kept, origin in self._origins.items() if kept <= target.step}
        self._origins[step] = target.origin
        state.divguard_muted_until = self.policy.muted_until
        state.divguard_went_back_at = step
        self._rewarming.begin(step)
        event = self.story.add(
            {
                "number": self.policy.rollbacks,
                "event": "rollback",
                "incident": decision.incident,
                "attempt": decision.attempt,
                "step": step,
                "onset_step": finding.onset_step,
                "target_step": target.step,
                "weights_of_step": target.origin,
                "target": "memory"
                if target.is_snapshot
                else os.path.basename(self._ledger.path(target.step)),
                "steps_lost": self.story.updates_up_to(step) - self.story.updates_up_to(target.step),
                "skipped_steps": [target.step + 1, step],
                "learning_rate_before": before,
                "learning_rate_after": scheduled_rates(self._trainer)[0],
                "cooldown_steps": decision.cooldown_steps,
                "seconds": time.perf_counter() - began,
                "finding": finding.to_dict(),
            }
        )
        self.story.tell_rollback(event, self.policy.max_rollbacks)
        next_rate = self._rewarming.first_of(event["learning_rate_after"])
        self._trainer.log(log_keys(event, pending_loss, next_rate))

    def _restore(self, target: Target) -> None:
        """Put back the state of ``target``; raise on every rank if one of them cannot."""
        error: BaseException | None = None
        states: dict[str, Any] | None = None
        with_rng = bool(self._options.divguard_restore_rng)
        factor = self.policy.rate_factor_since(target.step)
        with weights_kept_on_error(self._trainer.model):
            try:
                if target.is_snapshot:
                    snapshot = self._snapshots.of(target.step)
                    restore_snapshot(self._trainer, snapshot, with_rng=with_rng, rate_factor=factor)
                    states = snapshot.callbacks
                else:
                    path = self._ledger.path(target.step)
                    restore_checkpoint(self._trainer, path, with_rng=with_rng, rate_factor=factor)
                    states = read_callback_states(path)
            except Exception as caught:
                error = caught
            self._ranks.raise_if_any_failed(error, f"Rolling back to step {target.step}")
        for name, detector in self._detectors.items():
            try:
                detector.rewind((states or {}).get(name))
            except ValueError as misfit:
                if self._ranks.rank == 0:
                    logger.warning(
                        "The state of `%s` at step %d does not fit, so it starts anew: %s",
                        name,
                        target.step,
                        misfit,
                    )
                detector.rewind(None)

    def _clean_loop(self, model: Any, tr_loss: torch.Tensor) -> float | None:
        """Drop gradients in flight and the losses that wait for the next log.

        Returns:
            Mean loss of the steps since the last log; ``None`` if there is none or it is not
            finite.
        """
        trainer, step = self._trainer, self._trainer.state.global_step
        model.zero_grad()
        n_steps = step - trainer._globalstep_last_logged
        # The host's filter puts another number in the place of a NaN.
        is_filtered = self._last_not_finite > trainer._globalstep_last_logged
        losses = self._ranks.gather(float(tr_loss.item()))
        pending = sum(losses) / len(losses)
        tr_loss.zero_()
        trainer._globalstep_last_logged = step
        if not math.isfinite(trainer._total_loss_scalar):
            trainer._total_loss_scalar = self._finite_total
        if n_steps <= 0 or is_filtered or not math.isfinite(pending):
            return None
        trainer._total_loss_scalar += pending
        return pending / n_steps

    def _mark_diverged(self, last_good: int, onset_step: int, what_then: str, finding: Finding) -> None:
        """Quarantine what was saved after the step ``last_good``, so that no resume takes it."""
        for step in self._ledger.quarantine_after(last_good):
            if not self._leads:
                continue
            path = self._ledger.path(step)
            try:
                quarantine(
                    path,
                    reason=f"Training diverged from step {onset_step} on {what_then}: {finding.message}",
                    onset_step=onset_step,
                )
            except OSError as error:
                logger.warning("%s could not be marked as diverged (%s); do not resume from it.", path, error)
        self._on_left_behind(last_good)

    def protected_steps(self) -> set[int]:
        """Return the steps that must not be deleted while an incident is open.

        They are what was gone back to, and the newest state older than all of that: the next
        one to take.
        """
        if not self.policy.is_open(self._trainer.state.global_step):
            return set()
        protected = {
            event["target_step"]
            for event in self.story.events
            if event["event"] == "rollback" and event["incident"] == self.policy.incident
        }
        oldest = min(self.policy.origins_tried, default=0)
        older = [step for step in self._usable_steps() if self._target(step).origin < oldest]
        return protected | set(older[-1:])

    def _usable_steps(self) -> list[int]:
        """Return the steps of the lineage's checkpoints whose metric, if there is one, is finite; lowest first."""
        return sorted(
            record.step
            for record in self._ledger.records
            if record.in_lineage and (record.metric is None or math.isfinite(record.metric))
        )

    # ---- giving up

    def _give_up(self, finding: Finding, decision: Decision, model: Any, tr_loss: torch.Tensor) -> None:
        """End the run with the best weights from before the fault, and remember the error to raise."""
        state, control = self._trainer.state, self._trainer.control
        last_good = decision.onset_step - 2 - self.policy.margin_steps
        greater_is_better = bool(self._options.divguard_greater_is_better)
        candidates = self._ranks.run_on_main(
            lambda: best_before(self._ledger, self._snapshots, last_good, greater_is_better)
        )
        self._mark_diverged(last_good, decision.onset_step, "and was given up", finding)
        holds, path = load_first_of(candidates, self._trainer, self._ledger, self._snapshots, self._ranks)
        # It has been through the fault. A further `train()` of this trainer starts with a fresh one.
        self._trainer.optimizer.state.clear()
        self._clean_loop(model, tr_loss)
        message = (
            f"Training was given up at step {state.global_step}: {decision.reason}. {finding.message} The model holds "
            f"{holds}."
        )
        if not self._trainer.args.save_only_model and any(
            record.in_lineage for record in self._ledger.records
        ):
            message += " With the cause removed, resume_from_checkpoint='latest' goes on from before it."
        self.error = TrainingDivergedError(message, finding)
        self.story.add(
            {
                "number": self.policy.rollbacks + 1,
                "event": "gave_up",
                "incident": decision.incident,
                "attempt": decision.attempt - 1,
                "step": state.global_step,
                "onset_step": decision.onset_step,
                "checkpoint": path,
                "model_holds": holds,
                "reason": decision.reason,
                "finding": finding.to_dict(),
            }
        )
        self.story.tell_end(message)
        self.story.write()
        state.divguard_finding = finding
        state.divguard_stop_reason = f"rollback: {message}"
        state.divguard_aborted = True
        control.should_training_stop = True
        control.should_save = False
        control.should_evaluate = False

    # ---- warming up again

    @property
    def rate_used(self) -> float | None:
        """Learning rate of the last update, while it is below the schedule's; else ``None``."""
        return self._rewarming.used

    def hold_back_rates(self, step: int) -> None:
        """For the update under way, ramp the learning rate up after a rollback."""
        self._rewarming.hold_back(self._trainer, step)

    def release_rates(self) -> None:
        """Give the schedule its learning rates back after the update."""
        self._rewarming.release(self._trainer)
