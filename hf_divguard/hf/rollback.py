"""Rolling a diverged run back inside the running loop, on all ranks together."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hf_divguard.core.detection.detector import StepValues
from hf_divguard.core.events import event_of
from hf_divguard.core.findings import Finding
from hf_divguard.core.outcome import RunOutcome
from hf_divguard.core.rollback.event import RollbackEvent
from hf_divguard.core.rollback.policy import Decision, RollbackPolicy, Target
from hf_divguard.core.rollback.triggers import UNDONE_ONCE, RollbackTriggers
from hf_divguard.core.state import StateError, decode
from hf_divguard.errors import CheckpointError, TrainingDivergedError
from hf_divguard.hf import control as switches
from hf_divguard.hf.callbacks import collect_states
from hf_divguard.hf.comparison import Comparison
from hf_divguard.hf.control import outcome_of
from hf_divguard.hf.failed_recovery import FailedRecovery
from hf_divguard.hf.host import Host
from hf_divguard.hf.journal import RunJournal, good_before
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.rates import Rewarming, scale_rates, scheduled_rates
from hf_divguard.hf.reports import report_not_rolled_back, report_rollback
from hf_divguard.hf.restore import refuse_unsupported
from hf_divguard.hf.running_loss import PendingLoss
from hf_divguard.hf.snapshots import Snapshots
from hf_divguard.hf.targets import RollbackTargets
from hf_divguard.storage.failpoints import failpoint
from hf_divguard.storage.ledger import CheckpointLedger

__all__ = ["Rollback"]

logger = logging.getLogger(__name__)


class Rollback:
    """Carries out rollbacks for one ``train()`` call; its memory is kept in the checkpoints.

    Args:
        host: The host.
        options: The options.
        ledger: The checkpoints of the run.
        ranks: The processes of the run.
        journal: The events of the run.
        leads: Whether this rank marks checkpoints on its file system.
        snapshots: The states in memory.
        comparison: Compares kept with present weights, where that is done.
        detectors: The detectors, whose memories are rewound too.
        watches_damage: Whether it asks by itself to undo damage that a detector waits on.
        on_rewind: Called with the step after which nothing counts any more.

    Raises:
        ValueError: Where a rollback cannot work; see :func:`refuse_unsupported`.
    """

    def __init__(
        self,
        host: Host,
        options: Any,
        *,
        ledger: CheckpointLedger,
        ranks: Ranks,
        journal: RunJournal,
        leads: bool,
        snapshots: Snapshots,
        comparison: Comparison | None,
        detectors: dict[str, Any],
        watches_damage: bool,
        on_rewind: Callable[[int], None],
    ) -> None:
        refuse_unsupported(host, options)
        self._host = host
        self._options = options
        self._ledger = ledger
        self._ranks = ranks
        self._leads = leads
        self._detectors = detectors
        self._on_rewind = on_rewind
        self._pending = PendingLoss(host, ranks)
        self.rewarming = Rewarming(options.divguard_rewarm_steps)
        self.snapshots, self._comparison = snapshots, comparison
        self.policy = RollbackPolicy(
            max_rollbacks=options.divguard_max_rollbacks,
            cooldown_steps=options.divguard_cooldown_steps,
            margin_steps=options.divguard_rollback_margin_steps,
            lr_factor=options.divguard_rollback_lr_factor,
        )
        self._targets = RollbackTargets(ledger, self.snapshots, self.policy, flush=options.divguard_fsync)
        self.failed_recovery = FailedRecovery(host, options, ledger, ranks, journal, snapshots)
        # What a loss scaler has enlarged cannot be compared from step to step.
        self.watches_gradients = watches_damage and not host.args.max_grad_norm and host.scaler is None
        self._triggers = RollbackTriggers(
            self.policy, watches_setbacks=watches_damage, watches_gradients=self.watches_gradients
        )
        self.journal = journal
        self.error: TrainingDivergedError | None = None

    # ---- memory

    def state_dict(self) -> dict[str, Any]:
        """Return incidents, events and the origins of checkpoints saved after rollbacks."""
        return {
            "policy": self.policy.state_dict(),
            "origins": {str(step): origin for step, origin in self._targets.origins.items()},
            "rewarm_since": self.rewarming.since,
            "watch": self._triggers.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory.

        Raises:
            ValueError: If it cannot be read.
        """
        try:
            origins = decode(dict[str, int], state_dict["origins"], "`origins` in the state of rollbacks")
            origins_by_step = {int(step): origin for step, origin in origins.items()}
            since = decode(int | None, state_dict["rewarm_since"], "`rewarm_since` in the state of rollbacks")
        except KeyError as error:
            raise StateError(f"The state of rollbacks lacks {error}.") from error
        self.policy.load_state_dict(state_dict["policy"])
        self._targets.origins = origins_by_step
        self.rewarming.since = since
        self._triggers.load_state_dict(state_dict["watch"])

    def begin(self, state: Any) -> None:
        """Start training: mute what has to stay muted."""
        has_source = switches.saves_checkpoints(self._host.args) or self.snapshots.is_on
        if not has_source and self._ranks.rank == 0:
            logger.warning(
                "Nothing is saved (`save_strategy='no'`), so there is nothing to roll back to. Set `save_strategy`, or "
                "keep states in memory with `divguard_snapshot_steps`."
            )
        self._outcome.muted_until = self.policy.muted_until
        self._take_snapshot(state.global_step)

    @property
    def _outcome(self) -> RunOutcome:
        return outcome_of(self._host.state)

    def take_snapshot_if_due(self) -> None:
        """Keep the present state in memory if its step is one that gets a snapshot."""
        step = self._host.state.global_step
        is_suspect = self.policy.is_muted(step) if self._comparison is None else self._comparison.suspects
        if self.snapshots.is_due(step) and not is_suspect and self.error is None:
            self._take_snapshot(step)

    def _take_snapshot(self, step: int) -> None:
        self.snapshots.take(self._host, step, collect_states(self._detectors))

    # ---- one step

    def on_raw_losses(self, values: list[StepValues], args: Any, state: Any, control: Any) -> None:
        """Take the raw losses of the last few steps."""
        for entry in values:
            self._pending.note(entry.step, entry.loss)
            self._triggers.observe(entry.step, entry.loss, entry.grad_norm)

    def judge(self) -> None:
        """Ask for a rollback where the losses so far call for one."""
        state = self._host.state
        self._pending.end_step()
        is_last = state.global_step >= state.max_steps or self._host.control.should_training_stop
        finding = self._triggers.judge(state.global_step, is_last=is_last)
        if finding is not None and self._is_refuted(finding):
            finding = None
        if finding is not None and not self._outcome.defers(finding, "rollback"):
            self._outcome.request_rollback(finding)
        if is_last and self._comparison is not None:
            self._comparison.settle(is_last=True)

    def _is_refuted(self, finding: Finding) -> bool:
        """Return whether comparisons say that the restored state was not trained through the rest of a fault."""
        is_by_loss = finding.kind == "rollback_repeated" and finding.rests_on_finite_loss
        return is_by_loss and self._comparison is not None and self._comparison.vouches

    @property
    def sees_the_fault(self) -> bool:
        """Whether the last losses are under a fault that a rollback has not ended."""
        return self._triggers.sees_the_fault()

    # ---- one rollback

    def perform(self, model: Any, tr_loss: torch.Tensor) -> RollbackEvent | None:
        """Roll back if any rank's detectors ask for it; return what was done if weights were restored.

        Called by all ranks at the same point of a step.
        """
        requests = self._ranks.gather(self._outcome.rollback_request)
        self._outcome.rollback_request = None
        finding = next((request for request in requests if request is not None), None)
        if finding is None or self.error is not None:
            return None
        finding, step = self.policy.place(finding), self._host.state.global_step
        unusable: set[Target] = set()
        while True:
            began = time.perf_counter()
            decision = self._ranks.run_on_main(lambda: self._targets.decide(finding, step, unusable))
            if decision.target is None:
                self._end_without_target(finding, decision, model, tr_loss)
                return None
            failpoint("rollback decided")
            try:
                self._restore(decision.target)
            except CheckpointError as error:
                # Raised by every rank alike. Another target may be readable.
                if self._ranks.rank == 0:
                    logger.warning("%s Trying an older state.", error)
                unusable.add(decision.target)
                continue
            failpoint("weights restored")
            self._quarantine_after(self._last_good(finding.onset_step), "and was rolled back", finding)
            return self._record(decision, finding, model, tr_loss, began)

    def _end_without_target(
        self, finding: Finding, decision: Decision, model: Any, tr_loss: torch.Tensor
    ) -> None:
        if finding.kind in UNDONE_ONCE:
            self._triggers.accept_damage()
            step, good = self._host.state.global_step, good_before(self._ledger, finding.onset_step)
            event = event_of("not_rolled_back", finding, "rollback", step=step, last_good=good)
            self.journal.add({**event, "reason": decision.reason})
            if self._ranks.rank == 0:
                report_not_rolled_back(finding, decision.reason)
        else:
            last_good = self._last_good(decision.onset_step)
            self._quarantine_after(
                last_good, "and was ended", replace(finding, onset_step=decision.onset_step)
            )
            self._clean_loop(model, tr_loss)
            number = self.policy.rollbacks + 1
            self.error = self.failed_recovery.end_run(finding, decision, last_good=last_good, number=number)

    def _restore(self, target: Target) -> None:
        """Restore ``target`` and rewind the detectors to it; raise on every rank if one of them cannot."""
        states = self._targets.restore(
            target,
            self._host,
            self._ranks,
            with_rng=bool(self._options.divguard_restore_rng),
            rate_factor=self.policy.rate_factor_since(target.step),
        )
        for name, detector in self._detectors.items():
            detector.rewind(states.get(name))

    def _clean_loop(self, model: Any, tr_loss: torch.Tensor) -> float | None:
        """Drop gradients in flight and the losses that wait for the next log; return the mean of those losses."""
        model.zero_grad()
        return self._pending.drop(tr_loss)

    def _last_good(self, onset_step: int) -> int:
        return onset_step - 2 - self.policy.margin_steps

    def _record(
        self, decision: Decision, finding: Finding, model: Any, tr_loss: torch.Tensor, began: float
    ) -> RollbackEvent:
        """After the target was restored: the loop, the memories and the learning rate; then report it."""
        assert decision.target is not None
        target, step = decision.target, self._host.state.global_step
        before = scheduled_rates(self._host)[0]
        scale_rates(self._host, decision.lr_factor)
        pending_loss = self._clean_loop(model, tr_loss)
        self.snapshots.drop_after(self._last_good(finding.onset_step))
        self._triggers.rewind(target.step, step, finding)
        self.policy.record(decision, step)
        self._targets.note_restored(target, step)
        if self._comparison is not None:
            self._comparison.has_restored(step, target.step, finding)
        self._outcome.has_rolled_back(step, self.policy.muted_until)
        self.rewarming.begin(step)
        updates = self.journal.updates_up_to
        event = RollbackEvent(
            number=self.policy.rollbacks,
            incident=decision.incident,
            attempt=decision.attempt,
            step=step,
            onset_step=finding.onset_step,
            target_step=target.step,
            weights_of_step=target.origin,
            target="memory" if target.is_snapshot else os.path.basename(self._ledger.path(target.step)),
            steps_lost=updates(step) - updates(target.step),
            skipped_steps=(target.step + 1, step),
            learning_rate_before=before,
            learning_rate_after=scheduled_rates(self._host)[0],
            cooldown_steps=decision.cooldown_steps,
            seconds=time.perf_counter() - began,
            finding=finding.to_dict(),
        )
        self.journal.add(event.to_dict())
        if self._ranks.rank == 0:
            report_rollback(event, self.policy.max_rollbacks)
        failpoint("rollback recorded")
        self._host.log(event.log_keys(pending_loss, self.rewarming.first_of(event.learning_rate_after)))
        return event

    def _quarantine_after(self, last_good: int, what_then: str, finding: Finding) -> None:
        self._targets.quarantine_after(last_good, what_then, finding, leads=self._leads)
        self._on_rewind(last_good)

    def protected_steps(self) -> set[int]:
        """Return the steps that must not be deleted while an incident is open."""
        restored = {
            event["target_step"]
            for event in self.journal.events
            if event["event"] == "rollback" and event["incident"] == self.policy.incident
        }
        return self._targets.protected_steps(self._host.state.global_step, restored)
