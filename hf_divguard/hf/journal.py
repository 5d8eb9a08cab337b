"""Tells what rollbacks did: in the log, in the Trainer's logs, in ``divguard/events.jsonl``."""

from __future__ import annotations

import logging
import time
from typing import Any

from hf_divguard.core.findings import Finding
from hf_divguard.hf.ranks import Ranks
from hf_divguard.storage.events import read_events, write_events

__all__ = ["RollbackJournal", "log_keys"]

logger = logging.getLogger(__name__)

# Lines of other trainings, and of stretches that a resume has undone, that stay in the file.
_OLD_LINES = 1000


class RollbackJournal:
    """The events of one training, the same on every rank; rank 0 writes and speaks.

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
        told = read_events(self._run_dir)
        known = [_identity(event) for event in self.events]
        for event in told:
            if event.get("run_id") != self._run_id or "undone_by_resume_from" in event:
                self._old.append(event)
            elif _identity(event) not in known:
                self._old.append({**event, "undone_by_resume_from": step})
        if told != [*self._old, *self.events]:
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

    def tell_rollback(self, event: dict[str, Any], max_rollbacks: int) -> None:
        """Say in one line what a rollback did, at rank 0."""
        if self._ranks.rank != 0:
            return
        first, last = event["skipped_steps"]
        logger.warning(
            "Rollback %d (incident %d, attempt %d of %d) at step %d: %s Went back to step %d (%s%s) in %.2g s; the "
            "batches of steps %d to %d are left behind%s. Findings are ignored until step %d.",
            event["number"],
            event["incident"],
            event["attempt"],
            max_rollbacks,
            event["step"],
            event["finding"]["message"],
            event["target_step"],
            event["target"],
            ""
            if event["weights_of_step"] == event["target_step"]
            else f" with the weights of step {event['weights_of_step']}",
            event["seconds"],
            first,
            last,
            _rates_told(event),
            event["step"] + event["cooldown_steps"],
        )

    def tell_left(self, finding: Finding, reason: str) -> None:
        """Say that damage is left to heal because it cannot be undone, at rank 0."""
        if self._ranks.rank == 0:
            logger.warning("%s It is not rolled back: %s. Training goes on.", finding.message, reason)

    def tell_end(self, message: str) -> None:
        """Note that and why the run was given up, at rank 0; the error that follows says it aloud."""
        if self._ranks.rank == 0:
            logger.info("%s", message)


def log_keys(event: dict[str, Any], loss: float | None, next_rate: float) -> dict[str, float]:
    """Return what a rollback puts into the Trainer's logs.

    Args:
        event: The rollback.
        loss: Mean loss of the steps since the last log, which no later log will hold.
        next_rate: Learning rate of the next update.
    """
    logs = {
        "divguard/rollbacks": event["number"],
        "divguard/target_step": event["target_step"],
        "divguard/steps_lost": event["steps_lost"],
        "divguard/learning_rate": next_rate,
    }
    return logs if loss is None else {"loss": loss, **logs}


def _rates_told(event: dict[str, Any]) -> str:
    before, after = event["learning_rate_before"], event["learning_rate_after"]
    return "" if before == after else f", and the learning rate goes from {before:.3g} to {after:.3g}"


def _identity(event: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(event.get(key) for key in ("event", "step", "onset_step", "target_step", "incident"))
