"""The Trainer's own best metric, after a rollback."""

from __future__ import annotations

import math
from typing import Any

from hf_divguard.core.metrics import with_eval_prefix
from hf_divguard.core.retention import CheckpointRecord, rank
from hf_divguard.storage.ledger import CheckpointLedger

__all__ = ["recall_best"]


def recall_best(state: Any, args: Any, ledger: CheckpointLedger, last_step: int) -> None:
    """Take the host's best metric from the evaluations up to ``last_step`` whose checkpoints stand.

    Where the host names no step for it, as without saves, all of them count.
    """
    names_step = state.best_global_step is not None
    key, greater = with_eval_prefix(args.metric_for_best_model), bool(args.greater_is_better)
    standing = {record.step for record in ledger.records if record.in_lineage}
    logged = [
        CheckpointRecord(entry["step"], entry["step"], float(entry[key]))
        for entry in state.log_history
        if key in entry
        and math.isfinite(entry[key])
        and entry["step"] <= last_step
        and (entry["step"] in standing or not names_step)
    ]
    best = next(iter(rank(logged, greater_is_better=greater)), None)
    state.best_metric = best.metric if best else None
    if names_step:
        state.best_global_step = best.step if best else None
        state.best_model_checkpoint = ledger.path(best.step) if best else None
