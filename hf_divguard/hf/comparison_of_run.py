"""The comparison that the options and the detectors of a run ask for."""

from __future__ import annotations

from typing import Any

from hf_divguard.hf.adaptive_detectors import AdaptiveDivergenceDetector, NonFiniteDetector
from hf_divguard.hf.comparison import Comparison
from hf_divguard.hf.detectors import DivergenceDetector
from hf_divguard.hf.host import Host
from hf_divguard.hf.journal import RunJournal
from hf_divguard.hf.kept import KeptStates
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.snapshots import Snapshots

__all__ = ["make_comparison"]


def make_comparison(
    host: Host, options: Any, ranks: Ranks, journal: RunJournal, detectors: list[DivergenceDetector]
) -> tuple[Snapshots, Comparison | None]:
    """Return the states that are kept in memory, and what compares them, if any detector acts by the level of a loss."""
    acting = [each for each in detectors if each.action != "warn"]
    by_level = [each for each in acting if not isinstance(each, NonFiniteDetector)]
    is_on = options.divguard_compare == "auto" and bool(by_level)
    every, margin = options.divguard_snapshot_steps, options.divguard_rollback_margin_steps
    # A process of its own reads each loss together with the gradient norm, before the update.
    sees_each_step = ranks.world_size == 1 and options.divguard_skip_nonfinite is not False
    if is_on and every == 0:
        snapshots: Snapshots = KeptStates(
            ranks,
            with_optimizer=any(each.action == "rollback" for each in acting),
            limit_bytes=options.divguard_compare_memory_gb * 1e9,
            delay=1 if sees_each_step else options.divguard_check_steps,
        )
    else:
        snapshots = Snapshots(every, check_steps=options.divguard_check_steps, margin_steps=margin)
    if not is_on:
        return snapshots, None
    sensitive = [each for each in by_level if isinstance(each, AdaptiveDivergenceDetector)]
    action = next((each.action for each in sensitive if each.takes_raw_losses), None)
    return snapshots, Comparison(
        host,
        ranks,
        journal,
        snapshots,
        action=action,
        margin_steps=margin,
        arbiter_action=by_level[0].action if options.divguard_eval_arbiter else None,
    )
