"""The events of a run: in memory, in checkpoints, and in ``divguard/events.jsonl``."""

from __future__ import annotations

import logging
import time
from typing import Any

from hf_divguard.core.events import EVENT_VERSION, event_of
from hf_divguard.core.outcome import RunOutcome
from hf_divguard.core.state import StateError
from hf_divguard.hf.ranks import Ranks
from hf_divguard.storage.events import append_events, read_events_strictly, set_aside, write_events
from hf_divguard.storage.ledger import CheckpointLedger

__all__ = ["JOURNAL", "RunJournal"]

logger = logging.getLogger(__name__)

JOURNAL = "divguard_events"
"""Name under which the events of a run are kept among the states of callbacks."""

# Lines of other trainings, and of stretches that a resume has undone, that stay in the file.
_OLD_LINES = 1000
# Events that a checkpoint holds beside the rollbacks: what it writes must not grow with the length of a run.
_KEPT_EVENTS = 200
# What may come at every step is recorded so many times.
_MOST = {"update_skipped": 5000}

_NAMES = {"warn": "warned", "stop": "stopped", "abort": "aborted"}


class RunJournal:
    """The events of one training; rank 0 writes them.

    Args:
        run_dir: Folder that holds the checkpoints.
        run_id: Name of the training, kept across a resume.
        ranks: The processes of the run.
    """

    def __init__(self, run_dir: str, run_id: str, ranks: Ranks) -> None:
        self.events: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}
        """How many events of each name there were, those beyond the bounds included."""
        self._run_dir = run_dir
        self._run_id = run_id
        self._ranks = ranks
        self._old: list[dict[str, Any]] = []
        self._on_disk = 0
        self._may_append = True
        self._n_taken = 0
        self._n_known = 0
        self._has_failed = False

    def begin(self, step: int) -> None:
        """Start training at ``step``: let the file agree with what the checkpoint knows.

        Events of this training that the checkpoint does not know belong to steps after it,
        which the resume has undone. They stay in the file and say so; when one of them
        happens again it takes the place of the first.
        """
        if self._ranks.rank == 0:
            self._agree_with_disk(step)
        self.events = self._ranks.broadcast(self.events)
        self.counts = {}
        for event in self.events:
            self._count(event)
        self._n_taken = len(self.events)

    def _agree_with_disk(self, step: int) -> None:
        on_disk = self._read()
        in_checkpoint = {_identity(event) for event in self.events}
        known, n_own = [], 0
        for event in on_disk:
            if event.get("run_id") != self._run_id or "undone_by_resume_from" in event:
                self._old.append(event)
                continue
            # A checkpoint of a long run holds the newest events only.
            if _identity(event) in in_checkpoint or n_own < self._n_known:
                known.append(event)
            else:
                self._old.append({**event, "undone_by_resume_from": step})
            n_own += 1
        there = {_identity(event) for event in known}
        self.events = known + [event for event in self.events if _identity(event) not in there]
        self._may_append = on_disk == [*self._old, *self.events]
        self._on_disk = len(self.events)
        self.write()

    def _read(self) -> list[dict[str, Any]]:
        try:
            return read_events_strictly(self._run_dir)
        except (OSError, ValueError) as error:
            try:
                kept = f"They are kept in {set_aside(self._run_dir)}."
            except OSError as second:
                kept = f"They could not be set aside ({second})."
            logger.warning("The earlier events of %s cannot be read (%s). %s", self._run_dir, error, kept)
            return []

    # ---- memory

    def state_dict(self) -> dict[str, Any]:
        """Return the newest events and all rollbacks, for the checkpoint."""
        others = [event for event in self.events if event["event"] != "rollback"]
        newest = {id(event) for event in others[-_KEPT_EVENTS:]}
        kept = [event for event in self.events if event["event"] == "rollback" or id(event) in newest]
        return {"events": kept, "left_out": len(self.events) - len(kept)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the events that a checkpoint knows."""
        events, left_out = state_dict.get("events"), state_dict.get("left_out", 0)
        if not isinstance(events, list) or not all(_is_event(event) for event in events):
            raise StateError("`events` in the state of the journal must be a list of events.")
        if type(left_out) is not int or left_out < 0:
            raise StateError("`left_out` in the state of the journal must be a number of events.")
        self.events = [dict(event) for event in events]
        self._n_known = left_out + len(events) if left_out else 0

    # ---- new events

    def note_findings(self, outcome: RunOutcome, step: int, ledger: CheckpointLedger) -> None:
        """Add an event for each finding that was reported since the last call.

        A rollback has an event of its own, with its finding in it.
        """
        reports, outcome.reports = outcome.reports, []
        for finding, action in reports:
            if action == "rollback":
                continue
            good = good_before(ledger, finding.onset_step)
            self._append(event_of(_NAMES[action], finding, action, step=step, last_good=good))

    def add(self, event: dict[str, Any]) -> dict[str, Any]:
        """Add what happened, as rank 0 saw it, and return it; :meth:`write` puts it on the disk.

        Called by all ranks alike.
        """
        return self._append(self._ranks.broadcast(event))

    def _append(self, event: dict[str, Any]) -> dict[str, Any]:
        event = {"version": EVENT_VERSION, "run_id": self._run_id, "time": time.time(), **event}
        self._count(event)
        if self.counts[event["event"]] > _MOST.get(event["event"], self.counts[event["event"]]):
            return event
        self.events.append(event)
        again = _identity(event)
        old = [each for each in self._old if each.get("run_id") != self._run_id or _identity(each) != again]
        self._may_append &= len(old) == len(self._old)
        self._old = old
        return event

    def _count(self, event: dict[str, Any]) -> None:
        self.counts[event["event"]] = self.counts.get(event["event"], 0) + 1

    def take_new(self) -> list[dict[str, Any]]:
        """Return the events that came since the last call, oldest first."""
        new, self._n_taken = self.events[self._n_taken :], len(self.events)
        return new

    def updates_up_to(self, step: int) -> int:
        """Return how many of the updates up to ``step`` are in the weights of that step."""
        return step - sum(
            event["steps_lost"]
            for event in self.events
            if event["event"] == "rollback" and event["step"] <= step
        )

    # ---- the file

    def write(self) -> None:
        """Bring the file up to date if it is not."""
        new = self.events[self._on_disk :]
        may_append, self._may_append, self._on_disk = self._may_append, True, len(self.events)
        if self._ranks.rank != 0 or (may_append and not new):
            return
        try:
            if may_append and not self._has_failed:
                append_events(self._run_dir, new)
            else:
                write_events(self._run_dir, [*self._old[-_OLD_LINES:], *self.events])
            self._has_failed = False
        except OSError as error:
            self._has_failed = True  # all of it is written with the next event
            logger.warning("The events of the run could not be written (%s).", error)


def good_before(ledger: CheckpointLedger, onset_step: int) -> tuple[int, str] | None:
    """Return step and path of the last good checkpoint before ``onset_step``; ``None`` if there is none."""
    good = ledger.last_good(onset_step)
    return None if good is None else (good.step, good.path)


def _is_event(event: Any) -> bool:
    """Return whether ``event`` has the fields that are read again, with values of their types."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    names = ("step", "steps_lost", "target_step", "incident") if event["event"] == "rollback" else ("step",)
    return all(type(event.get(name)) is int for name in names)


def _identity(event: dict[str, Any]) -> tuple[Any, ...]:
    finding = event.get("finding")
    kind = finding.get("kind") if isinstance(finding, dict) else None
    names = ("event", "step", "onset_step", "target_step", "incident")
    return (*(str(event.get(key)) for key in names), str(kind))
