"""Which of the checkpoints that stay are reduced to their weights by ``prune``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hf_divguard.cli.exits import USAGE, CommandError
from hf_divguard.cli.folders import age_of, saved_at
from hf_divguard.cli.keeping import Survey
from hf_divguard.storage.survey import Checkpoint
from hf_divguard.storage.weights_only import training_state_files, why_not_reducible

__all__ = ["Reduction", "seconds_of"]

_AGE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([mhd])")
_SECONDS = {"m": 60.0, "h": 3600.0, "d": 86_400.0}


def seconds_of(age: str) -> float:
    """Return an age in seconds.

    Raises:
        CommandError: If it is none.

    Example:
        >>> seconds_of("12h")
        43200.0
    """
    match = _AGE.fullmatch(age.strip())
    if match is None:
        raise CommandError(
            "`--weights-only-older-than` must be a number of minutes, hours or days such as 45m, 12h or 7d, "
            f"got {age!r}.",
            USAGE,
        )
    return float(match[1]) * _SECONDS[match[2]]


@dataclass
class Reduction:
    """What is reduced to its weights.

    Args:
        older_than: Age in seconds from which on a checkpoint is; ``None`` reduces none.
        reduce: The checkpoints, oldest first.
        freed: Bytes that each of them frees, by step.
        refused: Why others that are old enough are not, by step.
    """

    older_than: float | None
    reduce: list[Checkpoint] = field(default_factory=list)
    freed: dict[int, int] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def make(self, seen: Survey, stay: set[int], in_full: set[int]) -> Reduction:
        """Decide for the checkpoints of ``seen``; return this reduction.

        Args:
            seen: The checkpoints.
            stay: Steps of those that are not deleted.
            in_full: Steps of those that must stay as they are.
        """
        for each in seen.complete:
            if self.older_than is None or each.step not in stay - in_full:
                continue
            age = age_of(saved_at(each.path))
            if age is None or age < self.older_than:
                continue
            try:
                files = training_state_files(each.path)
            except OSError:
                continue
            if not files:
                continue
            if (reason := why_not_reducible(each.path)) is not None:
                self.refused[each.step] = reason
                continue
            self.reduce.append(each)
            self.freed[each.step] = sum(files.values())
        return self
