"""What one rollback did, as it stands in the journal of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hf_divguard.core.events import tracker_values

__all__ = ["RollbackEvent"]


@dataclass(frozen=True, slots=True)
class RollbackEvent:
    """One rollback.

    Args:
        number: Number of the rollback in this run, from 1.
        incident: Number of the incident, from 1.
        attempt: Number of the rollback in its incident, from 1.
        step: Optimizer step at which it took place.
        onset_step: Estimated first bad step.
        target_step: Step whose state was restored.
        weights_of_step: Step at which the restored weights were trained; lower than
            ``target_step`` if that checkpoint was itself saved after a rollback.
        target: Name of the checkpoint folder, or ``"memory"``.
        steps_lost: Optimizer updates that were undone.
        skipped_steps: First and last step whose batches were skipped.
        learning_rate_before: Learning rate of the schedule before the rollback.
        learning_rate_after: The same after it.
        cooldown_steps: Steps in which findings are ignored.
        seconds: How long it took.
        finding: The finding that asked for it, as JSON values.
    """

    number: int
    incident: int
    attempt: int
    step: int
    onset_step: int
    target_step: int
    weights_of_step: int
    target: str
    steps_lost: int
    skipped_steps: tuple[int, int]
    learning_rate_before: float
    learning_rate_after: float
    cooldown_steps: int
    seconds: float
    finding: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the event as JSON values."""
        values = {**asdict(self), "skipped_steps": list(self.skipped_steps)}
        return {"event": "rollback", "action": "rollback", **values}

    def log_keys(self, loss: float | None, next_rate: float) -> dict[str, float]:
        """Return what a rollback adds to the Trainer's logs.

        Args:
            loss: Mean loss of the steps since the last log, which no later log will hold.
            next_rate: Learning rate of the next update.
        """
        logs: dict[str, float] = {} if loss is None else {"loss": loss}
        values = tracker_values(self.to_dict(), self.number)
        del values["divguard/rollback"]
        return {**logs, "divguard/rollbacks": self.number, **values, "divguard/learning_rate": next_rate}
