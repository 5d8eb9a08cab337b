"""One alert: an event of a run, with a title and a text for people."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_divguard.core.events import EVENT_VERSION, Level, headline, level_of, sentence

__all__ = ["Alert", "alert_of"]


@dataclass(frozen=True)
class Alert:
    """What is sent.

    Args:
        title: One line.
        text: The finding in words, with the last good checkpoint where the run ends.
        level: ``"info"``, ``"warning"`` or ``"error"``.
        event: The event, as in ``divguard/events.jsonl``.
        run: ``name`` and ``output_dir`` of the run.
        id: Name of this alert, the same at each attempt to deliver it.
    """

    title: str
    text: str
    level: Level
    event: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def to_dict(self) -> dict[str, Any]:
        """Return the alert as JSON values."""
        return {
            "version": EVENT_VERSION,
            "id": self.id,
            "title": self.title,
            "text": self.text,
            "level": self.level,
            "run": dict(self.run),
            "event": dict(self.event),
        }


def alert_of(event: Mapping[str, Any], run: Mapping[str, Any], left_out: int = 0) -> Alert:
    """Return the alert of an event.

    Args:
        event: The event.
        run: ``name`` and ``output_dir`` of the run.
        left_out: How many alerts were left out since the last one.

    Example:
        >>> alert_of({"event": "data", "step": 90, "cause": "data"}, {"name": "night"}, left_out=2).title
        'night: The loss is high at step 90 because of the data'
    """
    name = run.get("name") or run.get("output_dir")
    text = sentence(event)
    if left_out:
        text += f" {left_out} further alerts were left out since the last one."
    return Alert(
        title=f"{name}: {headline(event)}" if name else headline(event),
        text=text.strip(),
        level=level_of(event),
        event=event,
        run=run,
    )
