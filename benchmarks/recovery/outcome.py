"""What a guarded trainer says it did, read from its public attributes in the terms of the benchmark."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def as_mapping(thing: Any) -> Mapping[str, Any]:
    """Return a finding or an event, whatever its type, as a mapping."""
    if isinstance(thing, Mapping):
        return thing
    if hasattr(thing, "to_dict"):
        return as_mapping(thing.to_dict())
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
    return {}


def cause_of(thing: Any) -> str | None:
    """Return the cause that a finding or an event names, in itself, in its evidence or in its finding."""
    found = as_mapping(thing)
    cause = found.get("cause") or as_mapping(found.get("evidence")).get("cause")
    if cause is None and found.get("finding") is not None:
        return cause_of(found["finding"])
    return None if cause in (None, "unknown") else str(cause)


def said(trainer: Any) -> dict[str, Any]:
    """Return the events of a guarded trainer, and the finding that ended it."""
    events = []
    for event in map(as_mapping, getattr(trainer, "divguard_events", [])):
        undone = event.get("skipped_steps")
        events.append(
            {
                "event": str(event.get("event")),
                "step": event.get("step"),
                "onset": event.get("onset_step"),
                "target": event.get("target_step"),
                "undone": None if undone is None else list(undone),
                "lost": event.get("steps_lost"),
                "kind": as_mapping(event.get("finding")).get("kind"),
                "cause": cause_of(event),
            }
        )
    finding = as_mapping(getattr(trainer.state, "divguard_finding", None))
    return {
        "events": events,
        "finding": {"step": finding["step"], "kind": finding.get("kind"), "cause": cause_of(finding)}
        if finding
        else None,
    }
