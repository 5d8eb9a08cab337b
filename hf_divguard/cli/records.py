"""What a guarded run wrote about itself: its events, and how it ended."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_divguard.storage.events import EVENTS_FOLDER, events_path, read_events
from hf_divguard.storage.jsonio import parse_json
from hf_divguard.storage.regular_files import read_bytes
from hf_divguard.storage.survey import Checkpoint

__all__ = [
    "OUTCOME_NAME",
    "Divergence",
    "Ending",
    "RunRecord",
    "read_ending",
    "read_record",
    "whole",
    "words",
]

OUTCOME_NAME = "outcome.json"
"""File in the folder of events with how the run ended."""

_MAX_BYTES = 1 << 20
_ENDS = {"stopped": "stop", "aborted": "abort", "gave_up": "rollback"}
_STATES = {
    "finished": "finished",
    "ended_early": "finished",
    "running": "running",
    "stopped": "diverged",
    "aborted": "diverged",
    "diverged": "diverged",
    "gave_up": "diverged",
    "given_up": "diverged",
    "signalled": "stopped",
    "signaled": "stopped",
    "interrupted": "stopped",
    "preempted": "stopped",
    "error": "failed",
    "failed": "failed",
}


@dataclass(frozen=True)
class Divergence:
    """A fault of a run, from its own record or from a replay.

    Args:
        source: ``"events"`` or ``"replay"``.
        step: Step at which it was found.
        onset_step: Estimated first bad step.
        kind: Kind of the finding.
        message: One sentence.
        cause: What caused it, where that is known.
        action: What was done: ``"stop"``, ``"abort"``, ``"rollback"``, ``"warn"`` or ``None``.
        last_good: Path of the last good checkpoint, as the run named it.
        value: The value that decided it; ``None`` if it is not known.
        limit: The limit that it broke; ``None`` if there is none.
    """

    source: str
    step: int
    onset_step: int
    kind: str
    message: str
    cause: str | None = None
    action: str | None = None
    last_good: str | None = None
    value: float | str | None = None
    limit: float | str | None = None


@dataclass(frozen=True)
class Ending:
    """What ``outcome.json`` says.

    Args:
        state: ``"finished"``, ``"diverged"``, ``"stopped"``, ``"failed"`` or ``"running"``.
        word: The word of the file.
        step: The last step; ``None`` if it is not known.
        message: Its sentence, if there is one.
    """

    state: str
    word: str
    step: int | None
    message: str | None


@dataclass(frozen=True)
class RunRecord:
    """The events of the newest training in an output folder.

    Args:
        end: The fault that ended it, if one did.
        warnings: Faults that were only warned of, oldest first.
        rollbacks: Number of rollbacks.
        steps_undone: Updates that rollbacks have undone.
        targets: Steps that rollbacks of the last incident restored.
        last_step: The highest step of an event; ``None`` without one.
        has_events: Whether there are events, those that a resume has undone included.
        resumed_at: When a resume that undid events began; ``None`` without one.
    """

    end: Divergence | None = None
    warnings: list[Divergence] = field(default_factory=list)
    rollbacks: int = 0
    steps_undone: int = 0
    targets: frozenset[int] = frozenset()
    last_step: int | None = None
    has_events: bool = False
    resumed_at: float | None = None


def whole(value: Any) -> int | None:
    """Return ``value`` if it is a whole number that a step can be."""
    return value if type(value) is int and 0 <= value < 10**15 else None


def words(value: Any, longest: int = 500) -> str | None:
    """Return ``value`` if it is text, without what is beyond ``longest`` characters."""
    return value[:longest] if isinstance(value, str) and value.strip() else None


def read_record(run_dir: str, newest: Checkpoint | None, newest_time: float | None) -> RunRecord:
    """Return the record of the newest training in ``run_dir``.

    Args:
        run_dir: The output folder.
        newest: The checkpoint that was saved last.
        newest_time: When that was.
    """
    events = read_events(run_dir)
    if not events:
        return RunRecord()
    run_id = events[-1].get("run_id")
    written = os.lstat(events_path(run_dir)).st_mtime
    if newest is not None and newest.run_id is not None and newest.run_id != run_id:
        # A checkpoint of another training that was saved later: the events are of an older one.
        run_id = newest.run_id if newest_time is not None and newest_time > written else run_id
    own = [each for each in events if each.get("run_id") == run_id and "undone_by_resume_from" not in each]
    rollbacks = [each for each in own if each.get("event") == "rollback"]
    last_incident = rollbacks[-1].get("incident") if rollbacks else None
    steps = [step for each in own if (step := whole(each.get("step"))) is not None]
    ends = [each for each in own if str(each.get("event")) in _ENDS]
    return RunRecord(
        end=_divergence(ends[-1]) if ends and _still_holds(ends[-1], newest, run_id) else None,
        warnings=[found for each in own if each.get("event") == "warned" and (found := _divergence(each))],
        rollbacks=len(rollbacks),
        steps_undone=sum(whole(each.get("steps_lost")) or 0 for each in rollbacks),
        targets=frozenset(
            step
            for each in rollbacks
            if each.get("incident") == last_incident and (step := whole(each.get("target_step"))) is not None
        ),
        last_step=max(steps, default=None),
        has_events=any(each.get("run_id") == run_id for each in events),
        resumed_at=written if any("undone_by_resume_from" in each for each in events) else None,
    )


def _still_holds(event: dict[str, Any], newest: Checkpoint | None, run_id: Any) -> bool:
    """Return whether the run has not gone on after the event that ended it."""
    step = whole(event.get("step"))
    if step is None or newest is None or newest.run_id != run_id:
        return step is not None
    return newest.step <= step


def _divergence(event: dict[str, Any]) -> Divergence | None:
    finding = event.get("finding")
    finding = finding if isinstance(finding, dict) else {}
    step = whole(event.get("step"))
    found_at = whole(finding.get("step"))
    onset = whole(event.get("onset_step"))
    onset = whole(finding.get("onset_step")) if onset is None else onset
    if step is None:
        return None
    found_at = step if found_at is None else found_at
    return Divergence(
        source="events",
        step=found_at,
        onset_step=min(found_at if onset is None else onset, found_at),
        kind=words(finding.get("kind"), 60) or "unknown",
        message=words(finding.get("message")) or words(event.get("reason")) or "The event names no finding.",
        cause=_cause(event, finding),
        action=_ENDS.get(str(event.get("event")), "warn"),
        last_good=words(event.get("last_good_checkpoint"), 4096) or words(event.get("checkpoint"), 4096),
        value=_number(finding.get("value")),
        limit=_number(finding.get("limit")),
    )


def _cause(event: dict[str, Any], finding: dict[str, Any]) -> str | None:
    evidence = finding.get("evidence")
    places = (event, finding, evidence if isinstance(evidence, dict) else {})
    return next((cause for place in places if (cause := words(place.get("cause"))) is not None), None)


def _number(value: Any) -> float | str | None:
    if isinstance(value, str):
        return value if value in ("NaN", "Infinity", "-Infinity") else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def read_ending(run_dir: str) -> tuple[Ending | None, float | None]:
    """Return what ``divguard/outcome.json`` says and when it was written; ``None`` without a readable one."""
    path = Path(run_dir, EVENTS_FOLDER, OUTCOME_NAME)
    try:
        content = parse_json(read_bytes(path, max_bytes=_MAX_BYTES), what="it", allow_nan=True)
        written = os.lstat(path).st_mtime
    except (OSError, ValueError):
        return None, None
    if not isinstance(content, dict):
        return None, None
    named = (content.get(key) for key in ("outcome", "status", "state"))
    word = next((each for each in named if isinstance(each, str)), "")
    state = _STATES.get(word.strip().lower())
    if state is None:
        return None, None
    message = next((text for key in ("message", "reason") if (text := words(content.get(key)))), None)
    return Ending(state, words(word, 60) or state, whole(content.get("step")), message), written
