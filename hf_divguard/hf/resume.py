"""Which checkpoint a run resumes from, decided on rank 0 and told to all."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from hf_divguard.errors import CheckpointError, NoCompleteCheckpointError
from hf_divguard.storage.checkpoints import (
    CheckpointInfo,
    best_checkpoints,
    find_checkpoints,
    verify_checkpoint,
)

__all__ = ["choose_checkpoint"]

logger = logging.getLogger(__name__)


def choose_checkpoint(
    asked: bool | str, output_dir: str, *, metric: str | None = None, greater_is_better: bool | None = None
) -> str | None:
    """Return the checkpoint to resume from.

    Args:
        asked: ``True`` or ``"latest"`` for the newest complete checkpoint, ``"best"`` for
            the best complete one, or the path of a checkpoint.
        output_dir: Folder that holds the checkpoints.
        metric: Key of the metric for ``"best"``; ``None`` takes the one that was recorded.
        greater_is_better: Its direction.

    Returns:
        The path; ``None`` if ``output_dir`` holds no checkpoint folder at all.

    Raises:
        NoCompleteCheckpointError: If there are checkpoint folders and none can be resumed.
        CheckpointError: If a path was given and that checkpoint is not complete.
    """
    if isinstance(asked, (str, os.PathLike)) and asked not in ("latest", "best"):
        return _given(os.fspath(asked))
    found = find_checkpoints(output_dir)
    if not found:
        return None
    if asked == "best":
        candidates = best_checkpoints(output_dir, metric=metric, greater_is_better=greater_is_better)
        if not candidates:
            raise NoCompleteCheckpointError(
                f"None of the checkpoints in {output_dir} has an evaluation of its own step, so there is no best one. "
                "Resume with resume_from_checkpoint=True from the newest, or name one."
            )
    else:
        candidates = found[::-1]
    return _first_complete(candidates, output_dir)


def _given(path: str) -> str:
    verdict = verify_checkpoint(path)
    if verdict.status == "incomplete":
        raise CheckpointError(
            f"{path} is not a complete checkpoint: {verdict.reason} Name another one, or resume with "
            "resume_from_checkpoint=True from the newest complete one."
        )
    if verdict.status != "complete":
        logger.warning("Resuming from %s although it is %s: %s", path, verdict.status, verdict.reason)
    elif not verdict.resumable:
        logger.warning("%s holds the model but not all of the training state: %s", path, verdict.reason)
    return path


def _first_complete(candidates: list[CheckpointInfo], output_dir: str) -> str:
    """Return the first candidate that can be resumed; say in one line which were passed over, and why."""
    passed: list[CheckpointInfo] = []
    fallbacks: list[CheckpointInfo] = []
    for info in candidates:
        if info.verdict.status == "complete" and info.verdict.resumable:
            _tell(info, passed)
            return str(info.path)
        if info.verdict.status in ("complete", "unknown"):
            fallbacks.append(info)
        passed.append(info)
    if fallbacks:
        info = fallbacks[0]
        logger.warning(
            "No checkpoint in %s is known to be complete with all of its training state; resuming from %s: %s",
            output_dir,
            info.path,
            info.verdict.reason,
        )
        return str(info.path)
    reasons = "; ".join(f"{Path(info.path).name}: {info.verdict.reason}" for info in passed)
    raise NoCompleteCheckpointError(
        f"{output_dir} holds {len(passed)} checkpoint folder(s), but none is complete ({reasons}). To start anew, call "
        "train() without resume_from_checkpoint or use an empty output_dir; nothing was deleted."
    )


def _tell(info: CheckpointInfo, passed: list[CheckpointInfo]) -> None:
    if passed:
        reasons = "; ".join(f"{Path(other.path).name}: {other.verdict.reason}" for other in passed)
        logger.warning("Resuming from %s; passed over %s", info.path, reasons)
    else:
        logger.info("Resuming from %s.", info.path)
