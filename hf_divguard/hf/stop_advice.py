"""What a run that a detector has ended says about going on from it."""

from __future__ import annotations

from typing import Any

from hf_divguard.storage.ledger import CheckpointLedger

__all__ = ["STOPPED_BY", "at_the_end", "on_resume", "what_stopped"]

STOPPED_BY = "divguard_stopped_by"
"""Name under which the finding that stopped a run is kept among the states of callbacks."""


def what_stopped(state: Any) -> dict[str, Any] | None:
    """Return onset and message of the finding that ended the run, as JSON values; ``None`` if none did.

    A finding whose damage a rollback has undone does not count.
    """
    finding = getattr(state, "divguard_finding", None)
    if finding is None or finding.step <= getattr(state, "divguard_went_back_at", -1):
        return None
    return {"onset_step": finding.onset_step, "message": finding.message}


def on_resume(checkpoint: str, stopped_by: dict[str, Any], ledger: CheckpointLedger) -> str:
    """Return a warning that what is resumed was saved after a divergence."""
    advice = _from_before(stopped_by["onset_step"], ledger)
    return f"{checkpoint} was saved after a divergence: {stopped_by['message']} {advice}"


def at_the_end(state: Any, stopped_by: dict[str, Any], ledger: CheckpointLedger) -> str:
    """Return what a stopped run says last."""
    early = "Training has ended early. " if state.global_step < state.max_steps else ""
    return early + _from_before(stopped_by["onset_step"], ledger)


def _from_before(onset_step: int, ledger: CheckpointLedger) -> str:
    steps = [record.step for record in ledger.records if record.in_lineage]
    good = [step for step in steps if step <= onset_step - 2]
    if not good:
        return f"No checkpoint in {ledger.run_dir} is from before it (step {onset_step})."
    return f"The newest checkpoint from before it is {ledger.path(max(good))}: resume from that one."
