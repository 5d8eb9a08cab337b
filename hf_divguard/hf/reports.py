"""What a run reports of its rollbacks and its end: log lines and ``divguard/events.jsonl``."""

from __future__ import annotations

import logging
import time
from typing import Any

from hf_divguard.core.findings import Finding
from hf_divguard.core.outcome import RunOutcome
from hf_divguard.core.rollback.event import RollbackEvent
from hf_divguard.hf.ranks import Ranks
from hf_divguard.storage.events import read_events, write_events
from hf_divguard.storage.ledger import CheckpointLedger

__all__ = [
    "EVENTS",
    "STOPPED_BY",
    "RollbackJournal",
    "report_best",
    "report_end",
    "warn_of_stopped_checkpoint",
]

logger = logging.getLogger(__name__)

STOPPED_BY = "divguard_stopped_by"
"""Name under which the finding that stopped a run is kept among the states of callbacks."""

EVENTS = "divguard_events"
"""Name under which the events of a run are kept among the states of callbacks."""

# Lines of other trainings, and of stretches that a resume has undone, that stay in the file.
_OLD_LINES = 1000


class RollbackJournal:
    """The events of one training, the same on every rank; rank 0 writes and logs.

    Args:
        run_dir: Folder that holds the checkpoints.
        run_id: Name of the training, kept across a resume.
        ranks: The processes of the run.
    """

    def __init__(self, run_dir: str, run_id: str, ranks: Ranks) -> None:
        self.events: list[dict[str, Any]] = []
        self._run_dir = run_dir
        self._run_id = run_id
        self._ranks = ranks
        self._old: list[dict[str, Any]] = []
        self._is_on_disk = True

    def begin(self, step: int) -> None:
        """Start training at ``step``: let the file agree with what the checkpoint knows.

        Events of this training that the checkpoint does not know belong to steps after it,
        which the resume has undone. They stay in the file and say so; when one of them
        happens again it takes the place of the first.
        """
        self.events = self._ranks.broadcast(self.events)
        if self._ranks.rank != 0:
            return
        on_disk = read_events(self._run_dir)
        known = [_identity(event) for event in self.events]
        for event in on_disk:
            if event.get("run_id") != self._run_id or "undone_by_resume_from" in event:
                self._old.append(event)
            elif _identity(event) not in known:
                self._old.append({**event, "undone_by_resume_from": step})
        if on_disk != [*self._old, *self.events]:
            self._is_on_disk = False
            self.write()

    def add(self, event: dict[str, Any]) -> dict[str, Any]:
        """Add what happened, as rank 0 saw it, and return it; :meth:`write` puts it on the disk."""
        event = self._ranks.broadcast({"run_id": self._run_id, "time": time.time(), **event})
        self.events.append(event)
        self._is_on_disk = False
        again = _identity(event)
        self._old = [old for old in self._old if old.get("run_id") != self._run_id or _identity(old) != again]
        return event

    def updates_up_to(self, step: int) -> int:
        """Return how many of the updates up to ``step`` are in the weights of that step."""
        return step - sum(
            event["steps_lost"]
            for event in self.events
            if event["event"] == "rollback" and event["step"] <= step
        )

    def write(self) -> None:
        """Bring the file up to date if it is not."""
        if self._is_on_disk:
            return
        self._is_on_disk = True
        if self._ranks.rank != 0:
            return
        try:
            write_events(self._run_dir, [*self._old[-_OLD_LINES:], *self.events])
        except OSError as error:
            logger.warning("The events of the run could not be written (%s).", error)

    def report_rollback(self, event: RollbackEvent, max_rollbacks: int) -> None:
        """Log in one line what a rollback did, at rank 0."""
        if self._ranks.rank != 0:
            return
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

    def report_not_rolled_back(self, finding: Finding, reason: str) -> None:
        """Log that damage stays because it cannot be undone, at rank 0."""
        if self._ranks.rank == 0:
            logger.warning("%s It is not rolled back: %s. Training goes on.", finding.message, reason)


def _identity(event: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(event.get(key) for key in ("event", "step", "onset_step", "target_step", "incident"))


# ---- the end of a run


def warn_of_stopped_checkpoint(checkpoint: str, note: dict[str, Any], ledger: CheckpointLedger) -> None:
    """Warn that the checkpoint that is resumed was saved after a divergence."""
    advice = _newest_before(note["onset_step"], ledger)
    logger.warning("%s was saved after a divergence: %s %s", checkpoint, note["message"], advice)


def report_end(state: Any, outcome: RunOutcome, ledger: CheckpointLedger) -> None:
    """Log which checkpoint a stopped run should be resumed from."""
    finding = outcome.stopped_by
    if finding is None:
        return
    early = "Training has ended early. " if state.global_step < state.max_steps else ""
    logger.warning("%s%s", early, _newest_before(finding.onset_step, ledger))


def _newest_before(onset_step: int, ledger: CheckpointLedger) -> str:
    steps = [record.step for record in ledger.records if record.in_lineage]
    good = [step for step in steps if step <= onset_step - 2]
    if not good:
        return f"No checkpoint in {ledger.run_dir} is from before it (step {onset_step})."
    return f"The newest checkpoint from before it is {ledger.path(max(good))}: resume from that one."


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
