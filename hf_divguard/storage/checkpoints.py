"""What users ask of a run folder: its checkpoints, the latest complete one, the best ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

from hf_divguard.core.metrics import greater_is_better as known_direction
from hf_divguard.core.metrics import with_eval_prefix
from hf_divguard.errors import CheckpointError
from hf_divguard.storage.integrity import verify_checkpoint
from hf_divguard.storage.ledger import CheckpointLedger
from hf_divguard.storage.names import checkpoint_step
from hf_divguard.storage.survey import Checkpoint
from hf_divguard.storage.survey import find_checkpoints as checkpoints_in
from hf_divguard.storage.verdict import Verdict

__all__ = [
    "Checkpoint",
    "Verdict",
    "best_checkpoints",
    "find_checkpoints",
    "latest_complete_checkpoint",
    "ledger_of",
    "ranked",
    "ranking",
    "verify_checkpoint",
]

logger = logging.getLogger(__name__)


def find_checkpoints(output_dir: str | os.PathLike[str]) -> list[Checkpoint]:
    """Return the checkpoints directly inside ``output_dir`` in the order of saving, oldest first.

    Folders ``checkpoint-<digits>`` alone count, and symbolic links of such names. Files and other
    names are passed over. The order is that of the sequence numbers in manifests and sidecars,
    which no copying or touching changes. A folder without one stands where the newest sidecar
    lists it, or, if that does not know it, after all others, by step. Sizes are compared,
    checksums not: use ``verify_checkpoint`` for those.

    Args:
        output_dir: The run folder. A missing one holds no checkpoints, and a warning says so.

    Raises:
        OSError: If the run folder is there and cannot be listed. A single checkpoint that cannot
            be read has the verdict ``"unreadable"`` instead.

    Example:
        >>> find_checkpoints("no-such-folder")
        []
    """
    _warn_of_wrong_path(output_dir)
    return checkpoints_in(output_dir)


def _warn_of_wrong_path(path: str | os.PathLike[str]) -> None:
    """Log a warning if ``path`` can hold no checkpoints, so that an empty list is not taken for an answer."""
    name = os.path.abspath(path)
    if not os.path.lexists(path):
        logger.warning("There is no folder %s, so there are no checkpoints in it. Check the path.", name)
    elif not os.path.isdir(path):
        logger.warning(
            "%s is a file, so there are no checkpoints in it. Give the output folder of a run.", name
        )
    elif checkpoint_step(os.path.basename(name)) is not None:
        logger.warning(
            "%s is a checkpoint. Give the output folder that holds it: %s.", name, os.path.dirname(name)
        )


def latest_complete_checkpoint(output_dir: str | os.PathLike[str]) -> Checkpoint | None:
    """Return the newest complete checkpoint in ``output_dir``, ``None`` if there is none.

    Newest is the one saved last, not the one of the highest number. Where its manifest has
    checksums, they are compared. Newer ones that are suspect, quarantined or cannot be read are
    passed over with a warning.

    Raises:
        CheckpointError: If no complete one was found and some cannot be read: there may be one.
        OSError: If ``output_dir`` is there and cannot be listed.

    Example:
        >>> latest_complete_checkpoint("no-such-folder") is None
        True
    """
    _warn_of_wrong_path(output_dir)
    passed: list[Checkpoint] = []
    for each in reversed(checkpoints_in(output_dir)):
        verdict = each.verdict
        if verdict.status == "complete":
            verdict = verify_checkpoint(each.path)
            if verdict.status == "complete":
                for other in passed:
                    logger.warning("%s is passed over: %s", other.path, other.verdict.reason)
                return replace(each, verdict=verdict)
        if verdict.status in ("suspect", "quarantined", "unreadable"):
            passed.append(replace(each, verdict=verdict))
    unreadable = [each for each in passed if each.verdict.status == "unreadable"]
    if unreadable:
        raise CheckpointError(
            f"Whether {os.fspath(output_dir)} holds a complete checkpoint is not known: {len(unreadable)} cannot be "
            f"read. {unreadable[0].verdict.reason} Try again when the disk answers; nothing was changed."
        )
    for other in passed:
        logger.warning("%s is passed over: %s", other.path, other.verdict.reason)
    return None


def best_checkpoints(
    output_dir: str | os.PathLike[str],
    n: int | None = None,
    *,
    metric: str | None = None,
    greater_is_better: bool | None = None,
) -> list[Checkpoint]:
    """Return the complete checkpoints in ``output_dir`` by their metric, best first.

    Only checkpoints with a metric of their very step are ranked, and only those from which the
    newest complete one descends. NaN and infinities come last in both directions; on a tie the
    later step comes first. The metric stands in the manifest; for checkpoints of the Trainer
    alone it is read from the log history in ``trainer_state.json``. Suspect ones are not ranked.

    Args:
        output_dir: The run folder.
        n: How many to return at most; ``None`` returns all.
        metric: Name of the metric, with or without ``eval_``. ``None`` takes the one that the
            newest checkpoint was ranked by, else ``"loss"``.
        greater_is_better: Its direction. ``None`` takes the one that was saved with it, else looks
            the name up.

    Raises:
        ValueError: If ``n`` is negative or the direction of the metric is not known.

    Example:
        >>> best_checkpoints("no-such-folder", 3)
        []
    """
    if n is not None and n < 0:
        raise ValueError(f"`n` must be at least 0, got {n}.")
    _warn_of_wrong_path(output_dir)
    found = checkpoints_in(output_dir)
    key, greater = ranking(metric, greater_is_better, found)
    return ranked(ledger_of(output_dir, found, key), found, greater)[:n]


def ledger_of(
    output_dir: str | os.PathLike[str], found: list[Checkpoint], metric_key: str
) -> CheckpointLedger:
    """Return the ledger of what was ``found`` in ``output_dir``, in the lineage of the newest complete one."""
    complete = [each for each in found if each.verdict.status == "complete"]
    return CheckpointLedger.of(
        os.fspath(output_dir), found, complete[-1].path if complete else None, metric_key
    )


def ranked(
    ledger: CheckpointLedger, found: Sequence[Checkpoint], greater_is_better: bool
) -> list[Checkpoint]:
    """Return the complete ones of ``found`` that ``ledger`` ranks, best first."""
    by_step = {each.step: each for each in found if each.verdict.status == "complete"}
    key = ledger.metric_key
    return [
        replace(by_step[each.step], metric_name=key, metric=each.metric, greater_is_better=greater_is_better)
        for each in ledger.best(greater_is_better)
        if each.step in by_step
    ]


def ranking(
    metric: str | None, greater_is_better: bool | None, found: Sequence[Checkpoint]
) -> tuple[str, bool]:
    """Return the name of the ranking metric as evaluations report it, and its direction.

    Raises:
        ValueError: If the direction is not known.
    """
    named = [each for each in found if each.metric_name is not None]
    if metric is None:
        metric = named[-1].metric_name if named else "loss"
    key = with_eval_prefix(str(metric))
    if greater_is_better is None:
        directions = [
            each.greater_is_better for each in named if with_eval_prefix(str(each.metric_name)) == key
        ]
        greater_is_better = next(
            (each for each in reversed(directions) if each is not None), known_direction(key)
        )
    if greater_is_better is None:
        raise ValueError(
            f"`greater_is_better` must be given for the metric {metric!r}: its name does not say which is better."
        )
    return key, greater_is_better
