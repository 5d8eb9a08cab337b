"""What is known of a checkpoint folder after it was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Status", "Verdict"]

Status = Literal["complete", "incomplete", "quarantined", "suspect", "unreadable", "unknown"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a checkpoint counts, and why.

    Args:
        status: One of six words:

            - ``"complete"``: all its files are there.
            - ``"incomplete"``: something is missing or damaged.
            - ``"quarantined"``: it was saved after a divergence and must not be resumed.
            - ``"suspect"``: it was saved while a detector reported a fault that may have ruined it.
            - ``"unreadable"``: the disk answered with an error. It may be complete: it is never
              deleted, and is judged again later.
            - ``"unknown"``: its layout cannot be judged by its files, or it exceeds a limit.
        reason: One sentence for a person.
        problems: What is wrong, each in words; empty for a complete one.
        loadable: Whether the model's weights are there and complete.
        resumable: Whether training can resume from it.
        has_manifest: Whether it was judged by its manifest.
        lacks_only_sidecar: Whether it is incomplete for its sidecar alone. Training can resume from
            it, but callbacks start without their state.
    """

    status: Status
    reason: str
    problems: tuple[str, ...] = ()
    loadable: bool = False
    resumable: bool = False
    has_manifest: bool = False
    lacks_only_sidecar: bool = False
