"""The states that a rollback can restore: checkpoints of the lineage and snapshots, and where their weights come from."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.policy import Decision, RollbackPolicy, Target
from hf_divguard.hf.callbacks import read_callback_states
from hf_divguard.hf.host import Host
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.restore import restore_checkpoint, restore_snapshot
from hf_divguard.hf.snapshots import Snapshots
from hf_divguard.storage.integrity import verify_checkpoint
from hf_divguard.storage.ledger import CheckpointLedger
from hf_divguard.storage.quarantine import quarantine

__all__ = ["RollbackTargets"]

logger = logging.getLogger(__name__)


class RollbackTargets:
    """Chooses the state to restore, and restores it; remembers which weights each checkpoint holds.

    Args:
        ledger: The checkpoints of the run.
        snapshots: The states in memory.
        policy: Decides between the states that are there.
        flush: Whether marks of checkpoints are flushed to the disk.
    """

    def __init__(
        self,
        ledger: CheckpointLedger,
        snapshots: Snapshots,
        policy: RollbackPolicy,
        *,
        flush: bool = False,
    ) -> None:
        self._ledger = ledger
        self._flush = flush
        self._snapshots = snapshots
        self._policy = policy
        self.origins: dict[int, int] = {}
        """Step at which the weights of a checkpoint were trained, where it was saved after a rollback."""

    def decide(self, finding: Finding, step: int, unusable: set[Target]) -> Decision:
        """Choose a target that is there and complete; on rank 0.

        Args:
            finding: What asks for the rollback.
            step: Present step.
            unusable: States that could not be restored.
        """
        snapshots = self._snapshots.all() if self._snapshots.with_optimizer else []
        targets = [self._target(kept.step, is_snapshot=True) for kept in snapshots]
        in_memory = {target.step for target in targets if target not in unusable}
        targets += [
            self._target(kept)
            for kept in self._ledger.usable_steps()
            if kept <= step and kept not in in_memory
        ]
        targets = [target for target in targets if target not in unusable]
        while True:
            decision = self._policy.decide(finding, step, targets)
            if decision.target is None and unusable:
                steps = ", ".join(
                    str(target.step) for target in sorted(unusable, key=lambda target: target.step)
                )
                reason = f"{decision.reason}. The states of step {steps} could not be restored"
                return replace(decision, reason=reason)
            if decision.target is None or decision.target.is_snapshot:
                return decision
            path = self._ledger.path(decision.target.step)
            verdict = verify_checkpoint(path)
            if verdict.status == "complete" and verdict.resumable:
                return decision
            logger.warning("Not rolling back to %s: %s", path, verdict.reason)
            targets = [target for target in targets if target != decision.target]

    def _target(self, step: int, *, is_snapshot: bool = False) -> Target:
        return Target(step, self.origins.get(step, step), is_snapshot=is_snapshot)

    def note_restored(self, target: Target, step: int) -> None:
        """Remember that a checkpoint of ``step`` will hold the weights of ``target``."""
        self.origins = {kept: origin for kept, origin in self.origins.items() if kept <= target.step}
        self.origins[step] = target.origin

    def restore(
        self, target: Target, host: Host, ranks: Ranks, *, with_rng: bool, rate_factor: float
    ) -> dict[str, Any]:
        """Restore ``target`` on every rank, or on none.

        Args:
            target: The state.
            host: The host.
            ranks: The processes of the run.
            with_rng: Also restore the random number generators.
            rate_factor: By how much the learning rate has been lowered for good since then.

        Returns:
            The states of callbacks at that step.

        Raises:
            CheckpointError: On every rank, if one of them cannot; the weights are then as they were.
        """
        what = f"Rolling back to step {target.step}"
        if target.is_snapshot:
            snapshot = self._snapshots.of(target.step)
            restore_snapshot(host, snapshot, ranks, with_rng=with_rng, rate_factor=rate_factor, what=what)
            return snapshot.callbacks
        path = self._ledger.path(target.step)
        restore_checkpoint(host, path, ranks, with_rng=with_rng, rate_factor=rate_factor, what=what)
        # As rank 0 reads them: detectors that know different things would decide differently.
        return ranks.broadcast(read_callback_states(path) if ranks.rank == 0 else None) or {}

    def quarantine_after(self, last_good: int, what_then: str, finding: Finding, *, leads: bool) -> None:
        """Quarantine what was saved after the step ``last_good``, so that no resume takes it.

        Args:
            last_good: The step.
            what_then: What became of the run, in words.
            finding: Why.
            leads: Whether this rank marks checkpoints on its file system.
        """
        onset = finding.onset_step
        for step in self._ledger.quarantine_after(last_good):
            if not leads:
                continue
            path = self._ledger.path(step)
            try:
                quarantine(
                    path,
                    reason=f"Training diverged from step {onset} on {what_then}: {finding.message}",
                    onset_step=onset,
                    flush=self._flush,
                )
            except OSError as error:
                logger.warning("%s could not be quarantined (%s); do not resume from it.", path, error)

    def protected_steps(self, step: int, restored: set[int]) -> set[int]:
        """Return the steps that must not be deleted while an incident is open.

        Args:
            step: Present step.
            restored: Steps that were restored in the present incident. They stay, and so does
                the newest state older than all of those: the next one to take.
        """
        if not self._policy.is_open(step):
            return set()
        oldest = min(self._policy.origins_tried, default=0)
        older = [kept for kept in self._ledger.usable_steps() if self._target(kept).origin < oldest]
        return restored | set(older[-1:])
