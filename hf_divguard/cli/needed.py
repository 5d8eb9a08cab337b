"""Which checkpoints a person or the run itself may need again."""

from __future__ import annotations

from hf_divguard.cli.condition import Condition
from hf_divguard.cli.keeping import Survey
from hf_divguard.storage.names import checkpoint_step

__all__ = ["needed_steps"]


def needed_steps(seen: Survey, condition: Condition) -> dict[int, str]:
    """Return the steps of checkpoints that must not be deleted, each with the reason.

    Those are what the rollbacks of the last incident restored, the last good one before a
    fault, the one to take, and the one that the Trainer itself will load as the best.
    """
    needed = dict.fromkeys(condition.record.targets, "the last incident was rolled back to it")
    named = condition.progress.best_checkpoint
    best = checkpoint_step(named) if named else None
    if best is not None:
        needed[best] = "the Trainer's own best checkpoint"
    faults = [condition.divergence, *condition.record.warnings[-1:]]
    for fault in faults:
        good = None if fault is None else seen.ledger.last_good(fault.onset_step)
        if fault is not None and good is not None:
            needed[good.step] = f"the last good one before the fault at step {fault.onset_step}"
    if condition.take is not None and condition.state in ("stopped", "diverged", "failed"):
        needed.setdefault(condition.take.step, "the one to resume from")
    return needed
