"""What a run logs of its rollbacks and its end, for people."""

from __future__ import annotations

import logging
import shlex
from typing import Any

from hf_divguard.core.findings import Finding
from hf_divguard.core.outcome import RunOutcome
from hf_divguard.core.rollback.event import RollbackEvent
from hf_divguard.core.state import StateError, decode
from hf_divguard.storage.ledger import CheckpointLedger

__all__ = [
    "STOPPED_BY",
    "end_metrics",
    "report_best",
    "report_end",
    "report_not_rolled_back",
    "report_rollback",
    "warn_of_diverged_weights",
    "warn_of_stopped_checkpoint",
]

logger = logging.getLogger(__name__)

STOPPED_BY = "divguard_stopped_by"
"""Name under which the finding that stopped a run is kept among the states of callbacks."""


# ---- rollbacks


def report_rollback(event: RollbackEvent, max_rollbacks: int) -> None:
    """Log in one line what a rollback did."""
    weights = ""
    if event.weights_of_step != event.target_step:
        weights = f" with the weights of step {event.weights_of_step}"
    rates = ""
    if event.learning_rate_before != event.learning_rate_after:
        rates = f" Learning rate: {event.learning_rate_before:.3g}, now {event.learning_rate_after:.3g}."
    first, last = event.skipped_steps
    logger.warning(
        "Rollback %d (incident %d, attempt %d of %d) at step %d: %s Restored step %d (%s%s) in %.2g s; the "
        "batches of steps %d to %d are skipped.%s Findings are ignored until step %d.",
        event.number,
        event.incident,
        event.attempt,
        max_rollbacks,
        event.step,
        event.finding["message"],
        event.target_step,
        event.target,
        weights,
        event.seconds,
        first,
        last,
        rates,
        event.step + event.cooldown_steps,
    )


def report_not_rolled_back(finding: Finding, reason: str) -> None:
    """Log that damage stays because it cannot be undone."""
    logger.warning("%s It is not rolled back: %s. Training goes on.", finding.message, reason)


# ---- the end of a run


def warn_of_stopped_checkpoint(checkpoint: str, note: Any, ledger: CheckpointLedger) -> None:
    """Warn that the checkpoint that is resumed was saved after a divergence."""
    try:
        onset_step = decode(int, note["onset_step"], "`onset_step`")
        message = decode(str, note["message"], "`message`")
    except (StateError, KeyError, TypeError):
        logger.warning("%s was saved after a divergence; its note cannot be read.", checkpoint)
        return
    logger.warning("%s was saved after a divergence: %s %s", checkpoint, message, _advice(onset_step, ledger))


def report_end(state: Any, outcome: RunOutcome, ledger: CheckpointLedger) -> None:
    """Log where the fault began, and which checkpoint a stopped run should be resumed from."""
    finding = outcome.stopped_by
    if finding is None:
        return
    early = "Training has ended early. " if state.global_step < state.max_steps else ""
    logger.warning(
        "%sThe fault began at step %d. %s", early, finding.onset_step, _advice(finding.onset_step, ledger)
    )


def warn_of_diverged_weights(state: Any, outcome: RunOutcome, ledger: CheckpointLedger) -> None:
    """Warn that the model holds the weights of a stopped run."""
    finding = outcome.stopped_by
    if finding is None:
        return
    good = ledger.last_good(finding.onset_step)
    way_out = (
        "There is no good checkpoint to load instead."
        if good is None
        else f"For those of the last good checkpoint, {good.path}, call `trainer.load_last_good()` first."
    )
    logger.warning(
        "The model is saved with the weights of step %d, after a divergence that began at step %d. %s",
        state.global_step,
        finding.onset_step,
        way_out,
    )


def _advice(onset_step: int, ledger: CheckpointLedger) -> str:
    good = ledger.last_good(onset_step)
    if good is None:
        return f"No good checkpoint in {ledger.run_dir} is from before it (step {onset_step})."
    return (
        f"The last good checkpoint is {good.path}. To resume from it: --resume_from_checkpoint "
        f"{shlex.quote(good.path)}"
    )


def end_metrics(outcome: RunOutcome, ledger: CheckpointLedger) -> dict[str, Any]:
    """Return what the result of a stopped run says of the fault and of the checkpoint to resume."""
    finding = outcome.stopped_by
    if finding is None:
        return {}
    good = ledger.last_good(finding.onset_step)
    metrics: dict[str, Any] = {"divguard/onset_step": finding.onset_step}
    if good is not None:
        metrics |= {"divguard/last_good_step": good.step, "divguard/last_good_checkpoint": good.path}
    return metrics


def report_best(ledger: CheckpointLedger, metric_key: str, greater_is_better: bool, n: int) -> None:
    """Log which checkpoints are the best."""
    best = ledger.best(greater_is_better, n)
    if best:
        logger.info(
            "Best checkpoints: %s.",
            ", ".join(f"{entry.path} ({metric_key} {entry.metric:.6g})" for entry in best),
        )
    else:
        logger.warning(
            "No checkpoint was saved at a step that was evaluated: there is no best one. Set `eval_on_save=True`."
        )
