"""Rolling a diverged run back inside the running loop, on all ranks together."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback_policy import Decision, RollbackPolicy, Target
from hf_divguard.errors import TrainingDivergedError
from hf_divguard.hf.callback_state import collect_states, read_callback_states
from hf_divguard.hf.detectors import DivergenceDetector
from hf_divguard.hf.ledger import CheckpointLedger
from hf_divguard.hf.loss_tap import StepValues
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.restore import Snapshot, Snapshots, restore_checkpoint, scale_rates, scheduled_rates
from hf_divguard.storage.events import read_events, write_events
from hf_divguard.storage.quarantine import quarantine
from hf_divguard.storage.verdict import verify_checkpoint

__all__ = ["Rollback", "refuse_unsupported"]

logger = logging.getLogger(__name__)

# Losses at the end of a cool-down whose median says whether the run has recovered: odd, so that the median is
# one of them, and few, so that a fault which has just passed does not count.
_VALUES_TO_JUDGE = 9


def refuse_unsupported(trainer: Any) -> None:
    """Raise where a rollback inside the running loop cannot work.

    Raises:
        ValueError: For DeepSpeed, FSDP, SageMaker model parallelism and XLA.
    """
    for name, engine in (("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")):
        if getattr(trainer, name, False):
            raise ValueError(
                f"`rollback` does not work with {engine}, whose engine owns the optimizer: weights and optimizer cannot "
                "be put back inside the running loop. Use the action 'stop' and restart with "
                "resume_from_checkpoint=True. Supported are one process and DistributedDataParallel."
            )
    if trainer.args.save_only_model and trainer._options.divguard_snapshot_steps == 0:
        raise ValueError(
            "`rollback` needs the optimizer of a checkpoint, but `save_only_model=True` saves none. Set it to false, "
            "or keep states in memory with `divguard_snapshot_steps`."
        )


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
        self._ledger = ledger
        self._ranks = ranks
        self._leads = leads
        self._detectors = detectors
        self._on_left_behind = on_left_behind
        self._restores_rng = bool(options.divguard_restore_rng)
        self._rewarm_steps = int(options.divguard_rewarm_steps)
        self._rewarm_from: int | None = None
        self._rates_held: list[float] | None = None
        self.policy = RollbackPolicy(
            max_rollbacks=options.divguard_max_rollbacks,
            cooldown_steps=options.divguard_cooldown_steps,
            margin_steps=options.divguard_rollback_margin_steps,
            lr_factor=options.divguard_rollback_lr_factor,
        )
        self.snapshots = Snapshots(options.divguard_snapshot_steps)
        self.origins: dict[int, int] = {}
        self.events: list[dict[str, Any]] = []
        self.error: TrainingDivergedError | None = None
        self.went_to_memory = False
        self._limit: float | None = None
        self._cooling: list[StepValues] = []
        self._last_snapshot = -1

    # ---- memory

    def state_dict(self) -> dict[str, Any]:
        """Return incidents, events and the origins of checkpoints saved after rollbacks."""
        return {
            "policy": self.policy.state_dict(),
            "events": list(self.events),
            "origins": {str(step): origin for step, origin in self.origins.items()},
            "rewarm_from": self._rewarm_from,
            "limit": self._limit,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory.

        Raises:
            ValueError: If it cannot be read.
        """
        self.policy.load_state_dict(state_dict["policy"])
        self.events = list(state_dict["events"])
        self.origins = {int(step): int(origin) for step, origin in state_dict["origins"].items()}
        self._rewarm_from = state_dict.get("rewarm_from")
        self._limit = state_dict.get("limit")

    def begin(self, state: Any) -> None:
        """Start training: bring the story on disk up to date, mute what has to stay muted."""
        if self._ranks.rank == 0:
            known = {event.get("number") for event in self.events}
            self.events += [
                event
                for event in read_events(self._ledger.run_dir)
                if event.get("run_id") == self._ledger.run_id and event.get("number") not in known
            ]
            self.events.sort(key=lambda event: int(event.get("number", 0)))
        self.events = self._ranks.from_main(self.events)
        state.divguard_muted_until = self.policy.muted_until
        if self.events and self._ranks.rank == 0:
            self._write_events()
        self.take_snapshot(state.global_step)

    def take_snapshot_if_due(self, step: int) -> None:
        """Keep the present state in memory if ``step`` is one that gets a snapshot."""
        if step != self._last_snapshot and self.snapshots.is_due(step) and not self.policy.is_muted(step):
            self.take_snapshot(step)

    def take_snapshot(self, step: int) -> None:
        """Keep the present state in memory."""
        self._last_snapshot = step
        self.snapshots.take(self._trainer, step, collect_states(self._detectors))

    # ---- one step

    def check_recovery(self, values: list[StepValues]) -> None:
        """At the end of a cool-down, ask for another rollback unless the loss is back where it was.

        Findings are ignored during the cool-down, but the loss is not: if the median of its
        last values is still above the limit that the incident broke, the fault has not passed.

        Args:
            values: The raw losses since the last look.
        """
        state = self._trainer.state
        self._cooling += [entry for entry in values if self.policy.is_muted(entry.step)]
        if not self._cooling or self.policy.is_muted(state.global_step):
            return
        cooling, self._cooling = self._cooling, []
        if self._limit is None or getattr(state, "divguard_rollback_request", None) is not None:
            return
        late = [entry.loss for entry in cooling[-_VALUES_TO_JUDGE:]]
        level = median(late) if all(math.isfinite(loss) for loss in late) else math.nan
        if level <= self._limit:
            return
        bad = [entry.step for entry in cooling if not entry.loss <= self._limit]
        state.divguard_rollback_request = Finding(
            step=state.global_step,
            onset_step=bad[0],
            kind="not_recovered",
            severity="error",
            metric="loss",
            value=level,
            limit=self._limit,
            message=(
                f"`loss` has not recovered: the median of its last {len(late)} values up to step {cooling[-1].step} is "
                f"{level:.4g}, above the limit {self._limit:.4g} from before the fault."
            ),
        )

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
        decision, path = self._ranks.on_main(lambda: self._decide(finding))
        if decision.target is None:
            self._give_up(finding, decision, model, tr_loss)
            return False
        self._go_back(finding, decision, path, model, tr_loss)
        return True

    def _decide(self, finding: Finding) -> tuple[Decision, str | None]:
        """Choose a target that is there and whole; on rank 0."""
        step = self._trainer.state.global_step
        targets = [
            Target(s.step, self.origins.get(s.step, s.step), is_snapshot=True) for s in self.snapshots.all()
        ]
        kept_in_memory = {target.step for target in targets}
        for record in self._ledger.records:
            healthy = record.metric is None or math.isfinite(record.metric)
            if record.in_lineage and healthy and record.step not in kept_in_memory and record.step <= step:
                targets.append(Target(record.step, self.origins.get(record.step, record.step)))
        while True:
            decision = self.policy.decide(finding, step, targets)
            if decision.target is None or decision.target.is_snapshot:
                return decision, None
            path = self._ledger.path(decision.target.step)
            verdict = verify_checkpoint(path)
            if verdict.status == "complete" and verdict.resumable:
                return decision, path
            logger.warning("Not rolling back to %s: %s", path, verdict.reason)
            targets = [target for target in targets if target != decision.target]

    def _go_back(
        self, finding: Finding, decision: Decision, path: str | None, model: Any, tr_loss: torch.Tensor
    ) -> None:
        assert decision.target is not None
        state, target = self._trainer.state, decision.target
        began, step = time.perf_counter(), state.global_step
        before = scheduled_rates(self._trainer)
        self._mark_diverged(target.step, finding)
        self._restore(target, path)
        if decision.lr_factor != 1.0:
            scale_rates(self._trainer, decision.lr_factor)
        self._clean_loop(model, tr_loss)
        self.snapshots.drop_after(target.step)
        if decision.attempt == 1:
            self._limit = finding.limit if finding.metric == "loss" else None
        self._cooling = []
        self.policy.record(decision, step)
        self.went_to_memory = target.is_snapshot
        self.origins = {kept: origin for kept, origin in self.origins.items() if kept <= target.step}
        self.origins[step] = target.origin
        state.divguard_muted_until = self.policy.muted_until
        self._rewarm_from = step if self._rewarm_steps else None
        after = scheduled_rates(self._trainer)
        event: dict[str, Any] = {
            "run_id": self._ledger.run_id,
            "number": self.policy.rollbacks,
            "event": "rollback",
            "incident": decision.incident,
            "attempt": decision.attempt,
            "time": time.time(),
            "step": step,
            "onset_step": finding.onset_step,
            "target_step": target.step,
            "target": "memory" if target.is_snapshot else Path(path or "").name,
            "steps_lost": step - target.step,
            "skipped_steps": [target.step + 1, step],
            "learning_rate_before": before[0],
            "learning_rate_after": after[0],
            "cooldown_steps": decision.cooldown_steps,
            "seconds": time.perf_counter() - began,
            "finding": finding.to_dict(),
        }
        self._tell(event, finding)

    def _restore(self, target: Target, path: str | None) -> None:
        error: BaseException | None = None
        states: dict[str, Any] | None = None
        try:
            if target.is_snapshot:
                snapshot = self._snapshot(target.step)
                Snapshots.restore(self._trainer, snapshot)
                states = snapshot.callbacks
            else:
                assert path is not None
                restore_checkpoint(self._trainer, path, with_rng=self._restores_rng)
                states = read_callback_states(path)
        except Exception as caught:
            error = caught
        self._ranks.agree(error, f"Rolling back to step {target.step}")
        for name, detector in self._detectors.items():
            if states and name in states:
                detector.go_back(states[name])
            else:
                detector.go_back(None)

    def _snapshot(self, step: int) -> Snapshot:
        return next(snapshot for snapshot in reversed(self.snapshots.all()) if snapshot.step == step)

    def _clean_loop(self, model: Any, tr_loss: torch.Tensor) -> None:
        """Drop gradients in flight, and a pending loss that would poison every later log."""
        model.zero_grad()
        if not torch.isfinite(tr_loss).item():
            tr_loss.zero_()
            self._trainer._globalstep_last_logged = self._trainer.state.global_step

    def _mark_diverged(self, target_step: int, finding: Finding) -> None:
        """Quarantine what was saved after the target, so that no resume takes it."""
        for step in self._ledger.leave_behind(target_step):
            if not self._leads:
                continue
            path = self._ledger.path(step)
            try:
                quarantine(
                    path,
                    reason=f"Training diverged from step {finding.onset_step} on and was rolled back: {finding.message}",
                    onset_step=finding.onset_step,
                )
            except OSError as error:
                logger.warning("%s could not be marked as diverged (%s); do not resume from it.", path, error)
        self._on_left_behind(target_step)

    def protected_steps(self) -> set[int]:
        """Return the steps that must not be deleted while an incident is open."""
        if self.policy.open_until < self._trainer.state.global_step:
            return set()
        return {
            event["target_step"]
            for event in self.events
            if event.get("event") == "rollback" and event.get("incident") == self.policy.incident
        }

    def _tell(self, event: dict[str, Any], finding: Finding) -> None:
        event = self._ranks.from_main(event)
        self.events.append(event)
        if self._ranks.rank == 0:
            logger.warning(
                "Rollback %d (incident %d, attempt %d of %d) at step %d: %s Went back to step %d (%s); the batches of "
                "steps %d to %d are left behind. Findings are ignored until step %d.",
                event["number"],
                event["incident"],
                event["attempt"],
                self.policy.max_rollbacks,
                event["step"],
                finding.message,
                event["target_step"],
                event["target"],
                *event["skipped_steps"],
                self.policy.muted_until,
            )
            self._write_events()
        self._trainer.log(
            {
                "divguard/rollbacks": self.policy.rollbacks,
                "divguard/target_step": event["target_step"],
                "divguard/steps_lost": event["steps_lost"],
                "divguard/learning_rate": event["learning_rate_after"],
            }
        )

    def _write_events(self) -> None:
        try:
            write_events(self._ledger.run_dir, self.events)
        except OSError as error:
            logger.warning("The events of the run could not be written (%s).", error)

    def _give_up(self, finding: Finding, decision: Decision, model: Any, tr_loss: torch.Tensor) -> None:
        """End the run with the best weights from before the fault, and remember the error to raise."""
        trainer, state = self._trainer, self._trainer.state
        first_onset = min(
            [event["onset_step"] for event in self.events if event.get("incident") == decision.incident]
            + [finding.onset_step]
        )
        path = self._ranks.on_main(lambda: self._best_before(first_onset))
        self._mark_diverged(self._last_good_step(first_onset), finding)
        ends_with = "the weights as they were"
        if path is not None:
            error: BaseException | None = None
            try:
                trainer._load_from_checkpoint(path)
            except Exception as caught:
                error = caught
            self._ranks.agree(error, f"Loading {path}")
            ends_with = f"the weights of {path}"
        self._clean_loop(model, tr_loss)
        message = (
            f"Training was given up at step {state.global_step}: {decision.reason}. {finding.message} The model holds "
            f"{ends_with}."
        )
        self.error = TrainingDivergedError(message, finding)
        event = {
            "run_id": self._ledger.run_id,
            "number": self.policy.rollbacks + 1,
            "event": "gave_up",
            "incident": decision.incident,
            "attempt": decision.attempt,
            "time": time.time(),
            "step": state.global_step,
            "onset_step": finding.onset_step,
            "checkpoint": path,
            "reason": decision.reason,
            "finding": finding.to_dict(),
        }
        self.events.append(self._ranks.from_main(event))
        if self._ranks.rank == 0:
            logger.error("%s", message)
            self._write_events()
        state.divguard_finding = finding
        state.divguard_stop_reason = f"rollback: {message}"
        state.divguard_aborted = True
        trainer.control.should_training_stop = True
        trainer.control.should_save = False
        trainer.control.should_evaluate = False

    def _last_good_step(self, onset: int) -> int:
        return onset - 2 - self.policy.margin_steps

    def _best_before(self, onset: int) -> str | None:
        """Return the best whole checkpoint from before ``onset``, or the newest where none was ranked."""
        old = [record for record in self._ledger.records if record.step <= self._last_good_step(onset)]
        old = [record for record in old if record.in_lineage]
        direction = bool(self._trainer._options.divguard_greater_is_better)
        for candidate in self._ledger.ranked(old, direction):
            path = self._ledger.path(candidate.step)
            if verify_checkpoint(path).loadable:
                return path
        return None

    # ---- warming up again

    def hold_back_rates(self, step: int) -> None:
        """For the update under way, ramp the learning rate up after a rollback."""
        if self._rewarm_from is None:
            return
        done = step - self._rewarm_from
        if done >= self._rewarm_steps:
            self._rewarm_from = None
            return
        groups = self._trainer.optimizer.param_groups
        self._rates_held = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * ((done + 1) / self._rewarm_steps)

    def release_rates(self) -> None:
        """Give the schedule its learning rates back after the update."""
        if self._rates_held is not None:
            for group, rate in zip(self._trainer.optimizer.param_groups, self._rates_held, strict=True):
                group["lr"] = rate
            self._rates_held = None
