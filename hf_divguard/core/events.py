"""Events of a run as data: what is common to all of them, their numbers for trackers, their words for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from hf_divguard.core.findings import Finding

__all__ = [
    "ENDS_RUN",
    "EVENT_VERSION",
    "Level",
    "event_of",
    "headline",
    "level_of",
    "sentence",
    "tracker_values",
]

EVENT_VERSION = 1
"""Version of the events. New fields and new kinds of events may come without a new number."""

ENDS_RUN = frozenset({"stopped", "aborted", "gave_up", "signalled"})
"""The events after which a run ends; a run has at most one that is not undone."""

Level = Literal["info", "warning", "error"]

_HEADLINES = {
    "warned": "Training may be diverging at step {step}",
    "stopped": "Training was stopped at step {step}",
    "aborted": "Training was aborted at step {step}",
    "rollback": "Training was rolled back from step {step} to step {target_step}",
    "not_rolled_back": "A fault at step {step} could not be undone",
    "gave_up": "Training was ended at step {step}: rollbacks did not help",
    "dismissed": "A finding at step {step} was dismissed",
    "data": "The loss is high at step {step} because of the data",
    "update_skipped": "The update of step {step} was skipped",
    "signalled": "{signal} ends training at step {step}",
}
_INFO = frozenset({"dismissed", "signalled"})
_ERROR = frozenset({"stopped", "aborted", "gave_up"})
_NUMBERS = ("onset_step", "target_step", "steps_lost", "last_good_step", "in_a_row")


def event_of(
    name: str, finding: Finding, action: str, *, step: int, last_good: tuple[int, str] | None
) -> dict[str, Any]:
    """Return what an event says of a finding.

    Args:
        name: Name of the event.
        finding: The finding.
        action: The action that the finding called for.
        step: Optimizer step at which this took place.
        last_good: Step and path of the last good checkpoint; ``None`` if there is none.

    Example:
        >>> finding = Finding(step=9, onset_step=8, kind="jump", severity="error", metric="loss",
        ...                   value=9.0, limit=2.0, message="`loss` = 9 at step 9.")
        >>> event = event_of("stopped", finding, "stop", step=10, last_good=(6, "out/checkpoint-6"))
        >>> event["onset_step"], event["last_good_checkpoint"], event["finding"]["kind"]
        (8, 'out/checkpoint-6', 'jump')
    """
    good_step, good_path = (None, None) if last_good is None else last_good
    return {
        "event": name,
        "action": action,
        "step": step,
        "onset_step": finding.onset_step,
        "last_good_step": good_step,
        "last_good_checkpoint": good_path,
        "finding": finding.to_dict(),
    }


def tracker_values(event: Mapping[str, Any], number: int) -> dict[str, float]:
    """Return the numbers of an event for the logs of a run; trackers take no text.

    Args:
        event: The event.
        number: How many events of this name there are by now.

    Example:
        >>> tracker_values({"event": "stopped", "onset_step": 8, "finding": {"kind": "jump", "value": 9.0}}, 1)
        {'divguard/stopped': 1, 'divguard/onset_step': 8, 'divguard/jump': 1, 'divguard/value': 9.0}
    """
    values: dict[str, Any] = {f"divguard/{event['event']}": number}
    values |= {f"divguard/{name}": event.get(name) for name in _NUMBERS}
    finding = event.get("finding")
    if isinstance(finding, Mapping):
        values[f"divguard/{finding.get('kind')}"] = 1
        values |= {f"divguard/{name}": finding.get(name) for name in ("value", "limit")}
    return {name: value for name, value in values.items() if _is_finite(value)}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def level_of(event: Mapping[str, Any]) -> Level:
    """Return how serious an event is."""
    name = str(event["event"])
    return "error" if name in _ERROR else "info" if name in _INFO else "warning"


def headline(event: Mapping[str, Any]) -> str:
    """Return the title of an event.

    Example:
        >>> headline({"event": "rollback", "step": 224, "target_step": 200, "finding": {"kind": "jump"}})
        'Training was rolled back from step 224 to step 200 (jump)'
    """
    name = str(event["event"])
    title = _HEADLINES.get(name, name + " at step {step}").format_map(_Known(event))
    finding = event.get("finding")
    return f"{title} ({finding['kind']})" if isinstance(finding, Mapping) and "kind" in finding else title


def sentence(event: Mapping[str, Any]) -> str:
    """Return what an event says in words, with the way out where there is one."""
    finding = event.get("finding")
    parts = [str(finding.get("message", ""))] if isinstance(finding, Mapping) else []
    if event.get("reason"):
        parts.append(f"Reason: {str(event['reason']).rstrip('.')}.")
    cause = event.get("cause") or (finding.get("cause") if isinstance(finding, Mapping) else None)
    if cause:
        parts.append(f"Cause: {cause}.")
    if event["event"] in ENDS_RUN - {"signalled"} | {"warned"}:
        good = event.get("last_good_checkpoint")
        parts.append(f"Last good checkpoint: {good}." if good else "There is no good checkpoint.")
    return " ".join(part for part in parts if part)


class _Known(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"
