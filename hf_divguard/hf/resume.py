"""Which checkpoint a run resumes from, decided on rank 0 for all."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hf_divguard.errors import CheckpointError, NoCompleteCheckpointError
from hf_divguard.hf.ranks import Ranks
from hf_divguard.storage.checkpoints import (
    Checkpoint,
    best_checkpoints,
    verify_checkpoint,
)
from hf_divguard.storage.integrity import Verdict
from hf_divguard.storage.resume_state import resume_state
from hf_divguard.storage.staging import recover
from hf_divguard.storage.survey import find_checkpoints

__all__ = ["choose_checkpoint", "choose_for_all"]

logger = logging.getLogger(__name__)


def choose_for_all(
    asked: bool | str,
    output_dir: str,
    ranks: Ranks,
    *,
    metric: str | None = None,
    greater_is_better: bool | None = None,
) -> str | None:
    """Return the checkpoint that all ranks resume from; called by all of them.

    What a killed save left unfinished is cleaned up first. Rank 0 chooses as
    :func:`choose_checkpoint` does. Ranks whose ``output_dir`` is on another disk resume from
    the checkpoint of the same step there; a step that is not complete on every disk is passed
    over.

    Returns:
        The path, in this rank's ``output_dir`` unless a path was asked for.

    Raises:
        NoCompleteCheckpointError: On every rank, as for :func:`choose_checkpoint`.
        CheckpointError: On every rank, as for :func:`choose_checkpoint`.
    """
    local_ranks = ranks.on_same_file_system(Path(output_dir))
    leads = ranks.rank == local_ranks[0]
    if leads:
        try:
            for line in recover(output_dir):
                logger.warning("%s", line)
        except OSError as error:
            logger.warning(
                "What a killed save may have left in %s could not be cleaned up: %s", output_dir, error
            )
    ranks.gather(None)
    asked = ranks.run_on_main(lambda: _understood(asked, output_dir))
    if asked == "auto":
        _raise_if_unknown(output_dir, ranks, leads)
    elif isinstance(asked, str) and asked not in _WORDS:
        return _given_to_all(asked, ranks, leads)
    refused: dict[int, str] = {}
    while True:
        info = ranks.run_on_main(
            lambda: choose_checkpoint(
                asked, output_dir, metric=metric, greater_is_better=greater_is_better, refused=refused
            )
        )
        if info is None:
            return None
        own = os.path.join(output_dir, Path(info.path).name)
        problem = _problem_elsewhere(own, info.verdict) if leads and ranks.rank else None
        problems = {rank: each for rank, each in enumerate(ranks.gather(problem)) if each is not None}
        if not problems:
            return own
        refused[info.step] = "; ".join(f"on rank {rank} {each}" for rank, each in problems.items())


def _raise_if_unknown(output_dir: str, ranks: Ranks, leads: bool) -> None:
    """Raise on all ranks if it cannot be said whether there is something to resume."""
    state = resume_state(output_dir) if leads else None
    unknown = [each.reason for each in ranks.gather(state) if each is not None and each.status == "unknown"]
    if unknown:
        raise NoCompleteCheckpointError(
            f"`resume_from_checkpoint='auto'` must know whether there is a checkpoint to resume, but that cannot be "
            f"said: {unknown[0]} Nothing was changed. Try again when the disk answers, name a checkpoint, or use an "
            "empty `output_dir` to start from scratch."
        )


def _given_to_all(path: str, ranks: Ranks, leads: bool) -> str:
    """Return ``path`` if it is complete on every disk; else raise the same error on all ranks."""
    error: CheckpointError | None = None
    if leads:
        try:
            _given(path)
        except CheckpointError as caught:
            error = caught
    for theirs in ranks.gather(error):
        if theirs is not None:
            raise theirs
    return path


def _problem_elsewhere(path: str, chosen: Verdict) -> str | None:
    verdict = verify_checkpoint(path)
    if verdict.status == chosen.status and verdict.resumable == chosen.resumable:
        return None
    if verdict.status == "complete":
        return (
            f"{path} has no model or training state of its own. Ranks with disks of their own need "
            "save_on_each_node=True, and on Transformers 5.x a copy of the model's files from the first node, which "
            "alone writes them"
        )
    return f"{path} is {verdict.status}: {verdict.reason}"


_WORDS: dict[str, bool | str] = {"latest": "latest", "best": "best", "auto": "auto", "true": True}


def _understood(asked: bool | str, output_dir: str) -> bool | str:
    """Return ``asked`` as ``True``, ``"latest"``, ``"best"``, ``"auto"`` or the path of a folder.

    Flags and files give text, so ``"true"`` stands for ``True``. A bare name that is no folder
    where the script runs is looked for in ``output_dir``; ``last-checkpoint`` is the Trainer's
    name for the newest one on the Hub.

    Raises:
        CheckpointError: If there is no such folder; the message lists what there is.
    """
    if not isinstance(asked, (str, os.PathLike)):
        return asked
    text = os.fspath(asked)
    word = text.strip().lower()
    inside = os.path.join(output_dir, text)
    if os.path.isdir(text):
        return text
    if word in _WORDS:
        return _WORDS[word]
    if word and os.path.isdir(inside):
        return inside
    there = (
        [Path(each.path).name for each in find_checkpoints(output_dir)] if os.path.isdir(output_dir) else []
    )
    listed = ", ".join(there[-10:]) or "no checkpoint"
    close = difflib.get_close_matches(word, [*_WORDS, *there], n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    if not word:
        meant = " An empty text is what an unset variable of the shell gives."
    raise CheckpointError(
        f"`resume_from_checkpoint` must be 'auto', 'latest', 'best', 'true', the path of a checkpoint or its name in "
        f"`output_dir`, got {text!r}.{meant} {output_dir} holds: {listed}."
    )


def choose_checkpoint(
    asked: bool | str,
    output_dir: str,
    *,
    metric: str | None = None,
    greater_is_better: bool | None = None,
    refused: Mapping[int, str] | None = None,
) -> Checkpoint | None:
    """Return the checkpoint in ``output_dir`` to resume from.

    Args:
        asked: ``True``, ``"latest"`` or ``"auto"`` for the newest complete checkpoint,
            ``"best"`` for the best complete one.
        output_dir: Folder that holds the checkpoints.
        metric: Key of the metric for ``"best"``; ``None`` takes the one that was recorded.
        greater_is_better: Its direction.
        refused: Steps that must not be taken, with the reason in words.

    Returns:
        The checkpoint; ``None`` if ``output_dir`` holds no checkpoint folder at all.

    Raises:
        NoCompleteCheckpointError: If there are checkpoint folders and none can be resumed.
    """
    found = find_checkpoints(output_dir)
    if not found:
        return None
    if asked == "best":
        candidates = best_checkpoints(output_dir, metric=metric, greater_is_better=greater_is_better)
        if not candidates:
            raise NoCompleteCheckpointError(
                f"None of the complete checkpoints in {output_dir} has an evaluation of its own step, so there is no "
                "best one. Resume with resume_from_checkpoint=True from the newest, or name one."
            )
    else:
        candidates = found[::-1]
    return _first_complete(candidates, output_dir, refused or {})


def _given(path: str) -> None:
    verdict = verify_checkpoint(path)
    if verdict.status == "incomplete" and not verdict.lacks_only_sidecar:
        raise CheckpointError(
            f"{path} is not a complete checkpoint: {verdict.reason} Name another one, or resume with "
            "resume_from_checkpoint=True from the newest complete one."
        )
    if verdict.status != "complete":
        logger.warning("Resuming from %s although it is %s: %s", path, verdict.status, verdict.reason)
    elif not verdict.resumable:
        logger.warning("%s holds the model but not all of the training state: %s", path, verdict.reason)


def _first_complete(candidates: list[Checkpoint], output_dir: str, refused: Mapping[int, str]) -> Checkpoint:
    """Return the first candidate that can be resumed; say in one line which were passed over, and why."""
    passed: list[tuple[Checkpoint, str]] = []
    fallbacks: list[Checkpoint] = []
    for candidate in candidates:
        if candidate.step in refused:
            passed.append((candidate, refused[candidate.step]))
            continue
        info = candidate
        if info.verdict.status == "complete":
            # The list was made by sizes alone; here the checksums are compared too, where there are some.
            info = replace(info, verdict=verify_checkpoint(info.path))
        if info.verdict.status == "complete" and info.verdict.resumable:
            _tell(info, passed)
            return info
        if info.verdict.status in ("complete", "unknown") or info.verdict.lacks_only_sidecar:
            fallbacks.append(info)
        passed.append((info, info.verdict.reason))
    if fallbacks:
        info = fallbacks[0]
        logger.warning(
            "No checkpoint in %s is known to be complete with all of its training state; resuming from %s: %s",
            output_dir,
            info.path,
            info.verdict.reason,
        )
        return info
    raise NoCompleteCheckpointError(
        f"{output_dir} holds {len(passed)} checkpoint folder(s), but none is complete ({_listed(passed)}). To start "
        "from scratch, call train() without resume_from_checkpoint or use an empty output_dir; nothing was deleted."
    )


def _tell(info: Checkpoint, passed: list[tuple[Checkpoint, str]]) -> None:
    if passed:
        logger.warning("Resuming from %s; passed over %s", info.path, _listed(passed))
    else:
        logger.info("Resuming from %s.", info.path)


def _listed(passed: list[tuple[Checkpoint, str]]) -> str:
    return "; ".join(f"{Path(info.path).name}: {reason.rstrip('.')}" for info, reason in passed)
