"""The exceptions of hf_divguard, in one tree.

::

    DivGuardError
    ├── CheckpointError            a checkpoint cannot be written, read or chosen
    │   ├── NoCompleteCheckpointError   folders exist, none of them is complete
    │   ├── FolderInUseError            another training writes its checkpoints there
    │   └── CheckpointSaveError         a save failed; on every rank alike
    ├── HistoryError               a training history cannot be read
    ├── MetricNotFoundError        no evaluation produced the metric that ranks (also a KeyError)
    └── TrainingDivergedError      a run was ended; carries the finding

Bad arguments raise ``ValueError`` or ``TypeError``, as in the standard library.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_divguard.core.findings import Finding

__all__ = [
    "DIVERGED_EXIT_CODE",
    "INTERRUPTED_EXIT_CODE",
    "CheckpointError",
    "CheckpointSaveError",
    "DivGuardError",
    "FolderInUseError",
    "HistoryError",
    "MetricNotFoundError",
    "NoCompleteCheckpointError",
    "TrainingDivergedError",
    "exit_on_divergence",
]

DIVERGED_EXIT_CODE = 79
"""What a script exits with when training was ended: no number of sysexits.h (64 to 78), no signal (128 on)."""


INTERRUPTED_EXIT_CODE = 75
"""What a process exits with when a signal had it save and end: ``EX_TEMPFAIL`` of sysexits.h, "try again"."""


class DivGuardError(Exception):
    """Base of every error that hf_divguard raises on its own account."""


class CheckpointError(DivGuardError):
    """A checkpoint cannot be written, read or chosen."""


class NoCompleteCheckpointError(CheckpointError):
    """Checkpoint folders exist, but none of them is complete."""


class FolderInUseError(CheckpointError):
    """Another training writes its checkpoints into the same folder; raised on every rank alike."""


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
    """A run was ended because training diverged.

    Args:
        message: What was found and what was done about it.
        finding: The finding that ended the run, where there is one.
    """

    def __init__(self, message: str, finding: Finding | None = None) -> None:
        super().__init__(message)
        self.finding = finding


@contextlib.contextmanager
def exit_on_divergence() -> Iterator[None]:
    """In a script, end with an exit code of its own when training diverged.

    The sentence goes to stderr instead of a traceback, and whoever started the script can
    distinguish a diverged run, which would only diverge again, from a crash that is worth another
    try.

    Raises:
        SystemExit: With :data:`DIVERGED_EXIT_CODE` (79) for a ``TrainingDivergedError``.
            Other errors pass through.

    Example:
        >>> try:
        ...     with exit_on_divergence():
        ...         raise TrainingDivergedError("Training was ended at step 590.")
        ... except SystemExit as exit:
        ...     exit.code
        79
    """
    try:
        yield
    except TrainingDivergedError as error:
        print(error, file=sys.stderr)
        raise SystemExit(DIVERGED_EXIT_CODE) from error
