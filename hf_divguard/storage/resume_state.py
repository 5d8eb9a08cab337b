"""Whether a run folder holds something to resume: the question behind ``resume_from_checkpoint="auto"``."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hf_divguard.storage.integrity import verify_checkpoint
from hf_divguard.storage.names import REPLACED_PREFIX, checkpoint_step
from hf_divguard.storage.regular_files import error_words
from hf_divguard.storage.staging import staging_folder
from hf_divguard.storage.survey import Checkpoint, find_checkpoints

__all__ = ["ResumeState", "resume_state"]


@dataclass(frozen=True, slots=True)
class ResumeState:
    """What a run folder holds to resume from.

    Args:
        status: ``"found"``; ``"nothing"`` if there is provably nothing, so that training may start
            from scratch; ``"unknown"`` if neither can be said.
        checkpoint: What to resume from, if it was found.
        reason: One sentence for a person.
        passed_over: Newer checkpoints that are not resumed, newest first; their verdicts say why.
    """

    status: Literal["nothing", "found", "unknown"]
    checkpoint: Checkpoint | None
    reason: str
    passed_over: tuple[Checkpoint, ...] = ()


def resume_state(output_dir: str | os.PathLike[str]) -> ResumeState:
    """Return whether ``output_dir`` holds a checkpoint to resume from, holds none, or cannot be judged.

    The newest complete checkpoint with its training state is taken. If there is none, the newest
    of those that hold the model alone, that have another layout, or that lack nothing but our
    sidecar. Suspect and quarantined ones are never taken. Nothing is changed: call
    ``staging.recover`` before, so that what a kill left is finished or removed.

    Args:
        output_dir: The run folder.

    Example:
        >>> resume_state("no-such-folder").status
        'nothing'
    """
    shown = os.fspath(output_dir)
    try:
        if not stat.S_ISDIR(os.stat(output_dir).st_mode):
            return ResumeState("unknown", None, f"{shown} is a file, not a folder.")
        found = find_checkpoints(output_dir)
        left = _left_by_a_kill(Path(output_dir))
    except FileNotFoundError:
        if os.path.islink(output_dir):
            return ResumeState("unknown", None, f"{shown} is a symbolic link that leads nowhere.")
        return ResumeState("nothing", None, f"There is no folder {shown}.")
    except OSError as error:
        return ResumeState("unknown", None, f"{shown} cannot be listed: {error_words(error)}.")
    passed: list[Checkpoint] = []
    for each in reversed(found):
        if each.verdict.status == "complete":
            # The list was made by sizes alone.
            each = replace(each, verdict=verify_checkpoint(each.path))
        if each.verdict.status == "complete" and each.verdict.resumable:
            return ResumeState("found", each, f"{each.path} is complete.", tuple(passed))
        passed.append(each)
    for number, each in enumerate(passed):
        if each.verdict.status in ("complete", "unknown") or each.verdict.lacks_only_sidecar:
            reason = f"{each.path} is taken, for no checkpoint is known to be complete. {each.verdict.reason}"
            return ResumeState("found", each, reason, (*passed[:number], *passed[number + 1 :]))
    if passed:
        words = "; ".join(
            f"{Path(e.path).name} is {e.verdict.status}: {e.verdict.reason}" for e in passed[:3]
        )
        more = f" (and {len(passed) - 3} more)" if len(passed) > 3 else ""
        return ResumeState(
            "unknown", None, f"{shown} holds no complete checkpoint. {words}{more}", tuple(passed)
        )
    if left:
        return ResumeState(
            "unknown", None, f"{shown} holds no checkpoint, but what a killed save left: {', '.join(left)}."
        )
    return ResumeState("nothing", None, f"{shown} holds no checkpoint.")


def _left_by_a_kill(run_dir: Path) -> list[str]:
    """Return the checkpoints that were staged or moved aside when a save was killed."""
    staging = staging_folder(run_dir)
    names = os.listdir(staging) if staging.is_dir() else []
    staged = [f"{staging.name}/{name}" for name in sorted(names) if checkpoint_step(name) is not None]
    return staged + sorted(name for name in os.listdir(run_dir) if name.startswith(REPLACED_PREFIX))
