"""The exceptions of hf_divguard, in one tree.

::

    DivGuardError
    ├── CheckpointError            a checkpoint cannot be written, read or chosen
    │   ├── NoCompleteCheckpointError   folders exist, none of them is complete
    │   └── CheckpointSaveError         a save failed; on every rank alike
    ├── HistoryError               a training history cannot be read
    ├── MetricNotFoundError        no evaluation produced the metric that ranks (also a KeyError)
    └── TrainingDivergedError      a run was given up; carries the finding

Bad arguments raise ``ValueError`` or ``TypeError``, as in the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_divguard.core.findings import Finding

__all__ = [
    "CheckpointError",
    "CheckpointSaveError",
    "DivGuardError",
    "HistoryError",
    "MetricNotFoundError",
    "NoCompleteCheckpointError",
    "TrainingDivergedError",
]


class DivGuardError(Exception):
    """Base of every error that hf_divguard raises on its own account."""


class CheckpointError(DivGuardError):
    """A checkpoint cannot be written, read or chosen."""


class NoCompleteCheckpointError(CheckpointError):
    """Checkpoint folders exist, but none of them is complete."""


class CheckpointSaveError(CheckpointError):
    """Writing or publishing a checkpoint failed; raised on every rank alike."""


class HistoryError(DivGuardError):
    """A training history cannot be read."""


class MetricNotFoundError(DivGuardError, KeyError):
    """No evaluation produced the metric that ranks checkpoints."""

    def __str__(self) -> str:
        # A KeyError shows the repr of its argument, which is no sentence.
        return str(self.args[0]) if self.args else ""


class TrainingDivergedError(DivGuardError):
    """A run was given up because training diverged.

    Args:
        message: What was found and what was done about it.
        finding: The finding that ended the run, where there is one.
    """

    def __init__(self, message: str, finding: Finding | None = None) -> None:
        super().__init__(message)
        self.finding = finding
