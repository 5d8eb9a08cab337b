"""The weights that a run ends with when rollbacks did not help."""

from __future__ import annotations

import logging

from hf_divguard.core.outcome import RunOutcome
from hf_divguard.core.rollback.policy import Target
from hf_divguard.errors import CheckpointError
from hf_divguard.hf.host import Host
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.restore import load_weights_on_all_ranks, restore_snapshot
from hf_divguard.hf.snapshots import Snapshots
from hf_divguard.storage.integrity import verify_checkpoint
from hf_divguard.storage.ledger import CheckpointLedger

__all__ = ["best_before", "load_first_of", "load_last_good"]

logger = logging.getLogger(__name__)


def best_before(
    ledger: CheckpointLedger, snapshots: Snapshots, last_good: int, greater_is_better: bool
) -> list[Target]:
    """Return the states up to ``last_good``: complete checkpoints, best first, then snapshots, newest first.

    Where nothing was evaluated, the newest comes first, wherever it is.
    """
    ranked = ledger.ranked(ledger.good_records(last_good), greater_is_better)
    on_disk = [Target(r.step, r.step) for r in ranked if verify_checkpoint(ledger.path(r.step)).loadable]
    in_memory = [
        Target(kept.step, kept.step, is_snapshot=True)
        for kept in snapshots.all()[::-1]
        if kept.step <= last_good
    ]
    if not any(record.metric is not None for record in ranked):
        return sorted([*in_memory, *on_disk], key=lambda target: -target.step)
    return [*on_disk, *in_memory]


def load_last_good(host: Host, outcome: RunOutcome, ledger: CheckpointLedger, ranks: Ranks) -> str:
    """Load the weights of the newest checkpoint from before the fault that ended the run; return its folder.

    Raises:
        ValueError: If there is none.
        CheckpointError: If the weights cannot be loaded; the model is then as it was.
    """
    finding = outcome.stopped_by
    onset_step = host.state.global_step + 2 if finding is None else finding.onset_step
    good = ledger.last_good(onset_step)
    if good is None:
        raise ValueError(
            f"{ledger.run_dir} holds no good checkpoint from before step {onset_step}, so there is nothing to load."
        )
    load_weights_on_all_ranks(host, good.path, ranks)
    return good.path


def load_first_of(
    candidates: list[Target], host: Host, ledger: CheckpointLedger, snapshots: Snapshots, ranks: Ranks
) -> tuple[str, str | None]:
    """Load the weights of the first candidate that every rank can read.

    Returns:
        What the model holds now, in words, and the folder of the checkpoint, if it is one.
    """
    for target in candidates:
        path = ledger.path(target.step)
        try:
            _load(target, path, host, snapshots, ranks)
        except CheckpointError as error:
            logger.warning("%s", error)
            continue
        if target.is_snapshot:
            return f"the weights of step {target.step}, from memory", None
        return f"the weights of {path}", path
    return "the weights as they were", None


def _load(target: Target, path: str, host: Host, snapshots: Snapshots, ranks: Ranks) -> None:
    if target.is_snapshot:
        what = f"Loading the weights of step {target.step}"
        restore_snapshot(host, snapshots.of(target.step), ranks, weights_only=True, what=what)
    else:
        load_weights_on_all_ranks(host, path, ranks)
