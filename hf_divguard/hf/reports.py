"""What a run reports of its rollbacks and its end: log lines and ``divguard/events.jsonl``."""

from __future__ import annotations

import logging
import shlex
import time
from typing import Any

from hf_divguard.core.findings import Finding
from hf_divguard.core.outcome import RunOutcome
from hf_divguard.core.rollback.event import RollbackEvent
from hf_divguard.core.state import StateError, decode
from hf_divguard.hf.ranks import Ranks
from hf_divguard.storage.events import read_events, write_events
from hf_divguard.storage.ledger import CheckpointLedger

__all__ = [
    "JOURNAL",
    "STOPPED_BY",
    "RunJournal",
    "end_metrics",
    "report_best",
    "report_end",
    "warn_of_diverged_weights",
    "warn_of_stopped_checkpoint",
]

logger = logging.getLogger(__name__)

JOURNAL = "divguard_events"
"""Name under which the events of a run are kept among the states of callbacks."""

STOPPED_BY = "divguard_stopped_by"
"""Name under which the finding that stopped a run is kept among the states of callbacks."""


# Lines of other trainings, and of stretches that a resume has undone, that stay in the file.
_OLD_LINES = 1000
# Events that a checkpoint holds: what it writes must not grow with the length of a run.
_KEPT_EVENTS = 200


class RunJournal:
    """The events of one training; rank 0 writes and logs.

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

    def note_findings(self, outcome: RunOutcome, step: int, ledger: CheckpointLedger) -> None:
        """Add an event for each error finding that was reported since the last call.

        A rollback has an event of its own, with its finding in it.
        """
        reports, outcome.reports = outcome.reports, []
        for finding, action in reports:
            if action == "rollback":
                continue
            good = ledger.last_good(finding.onset_step)
            self.events.append(
                {
                    "run_id": self._run_id,
                    "time": time.time(),
                    "event": {"warn": "warned", "stop": "stopped", "abort": "aborted"}[action],
                    "step": step,
                    "onset_step": finding.onset_step,
                    "last_good_checkpoint": None if good is None else good.path,
                    "finding": finding.to_dict(),
                }
            )
            self._is_on_disk = False

    def state_dict(self) -> dict[str, Any]:
        """Return the newest events, for the checkpoint."""
        return {"events": self.events[-_KEPT_EVENTS:]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the events that a checkpoint knows."""
        events = state_dict.get("events")
        if not isinstance(events, list) or not all(_is_event(event) for event in events):
            raise StateError("`events` in the state of the journal must be a list of events.")
        self.events = [dict(event) for event in events]

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


def _is_event(event: Any) -> bool:
    """Return whether ``event`` has the fields that are read again, with values of their types."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    names = ("step", "steps_lost", "target_step", "incident") if event["event"] == "rollback" else ("step",)
    return all(type(event.get(name)) is int for name in names)


def _identity(event: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(event.get(key) for key in ("event", "step", "onset_step", "target_step", "incident"))


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
