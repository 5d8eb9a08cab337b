"""Finding the checkpoints of a run folder: in the order of saving, the latest, the best."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_divguard.core.metrics import greater_is_better as known_direction
from hf_divguard.core.metrics import with_eval_prefix
from hf_divguard.core.retention import CheckpointRecord, rank
from hf_divguard.storage.integrity import Verdict, verify_checkpoint, verify_with_records
from hf_divguard.storage.names import checkpoint_folders
from hf_divguard.storage.sidecar import Sidecar
from hf_divguard.storage.trainer_state import logged_metric

__all__ = [
    "Checkpoint",
    "Verdict",
    "best_checkpoints",
    "find_checkpoints",
    "latest_complete_checkpoint",
    "verify_checkpoint",
]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint of a run folder.

    Args:
        path: Its folder.
        step: The optimizer step in its name.
        verdict: Whether it counts.
        sequence: Its number among the saves of this folder; ``None`` if it knows none.
        run_id: The run that saved it; ``None`` for one of the Trainer's own.
        metric_name: Name of the metric that ranks checkpoints.
        metric: Its value at this step; ``None`` if there was none.
        greater_is_better: Direction of the metric.
    """

    path: Path
    step: int
    verdict: Verdict
    sequence: int | None = None
    run_id: str | None = None
    metric_name: str | None = None
    metric: float | None = None
    greater_is_better: bool | None = None


def find_checkpoints(output_dir: str | os.PathLike[str]) -> list[Checkpoint]:
    """Return the checkpoints directly inside ``output_dir`` in the order of saving, oldest first.

    Folders ``checkpoint-<digits>`` alone count; symbolic links, files and other names are
    passed over. The order is that of the sequence numbers in sidecars and manifests, which no
    copying or touching changes. A folder without one stands where the newest sidecar lists it,
    or, if that does not know it, after all others, by step. Sizes are compared, checksums not:
    use ``verify_checkpoint`` for those.

    Args:
        output_dir: The run folder. A missing one holds no checkpoints.

    Raises:
        OSError: If the run folder is there and cannot be listed.

    Example:
        >>> find_checkpoints("no-such-folder")
        []
    """
    return [info for info, _ in _survey(output_dir)]


def _survey(output_dir: str | os.PathLike[str]) -> list[tuple[Checkpoint, Sidecar | None]]:
    found: list[tuple[Checkpoint, Sidecar | None]] = []
    for step, path in checkpoint_folders(output_dir).items():
        verdict, manifest, sidecar = verify_with_records(path, checksums=False)
        if not os.path.lexists(path):
            continue
        record = next((each for each in (sidecar, manifest) if each is not None and each.step == step), None)
        if record is None:
            found.append((Checkpoint(path, step, verdict), None))
            continue
        known = record.run_id != ""
        info = Checkpoint(
            path,
            step,
            verdict,
            record.sequence if known else None,
            record.run_id if known else None,
            record.metric_name,
            record.metric,
            record.greater_is_better,
        )
        found.append((info, sidecar if known and record is sidecar else None))
    return _in_order_of_saving(found)


def _in_order_of_saving(
    found: list[tuple[Checkpoint, Sidecar | None]],
) -> list[tuple[Checkpoint, Sidecar | None]]:
    """Sort by sequence; a folder without one goes before the next that the newest sidecar lists."""
    sequences = {info.step: info.sequence for info, _ in found if info.sequence is not None}
    newest = _newest_sidecar(found)
    places: dict[int, tuple[float, int, int]] = {}
    if newest is not None:
        before: float = newest.sequence
        for position in range(len(newest.records) - 1, -1, -1):
            record = newest.records[position]
            if sequences.get(record.step) == record.sequence:
                before = record.sequence
            elif record.step not in sequences:
                places[record.step] = (before, 0, position)
    return sorted(
        found,
        key=lambda pair: (
            (pair[0].sequence, 1, pair[0].step)
            if pair[0].sequence is not None
            else places.get(pair[0].step, (math.inf, 0, pair[0].step))
        ),
    )


def _newest_sidecar(found: Iterable[tuple[Checkpoint, Sidecar | None]]) -> Sidecar | None:
    return max(
        (sidecar for _, sidecar in found if sidecar is not None), key=lambda each: each.sequence, default=None
    )


def latest_complete_checkpoint(output_dir: str | os.PathLike[str]) -> Checkpoint | None:
    """Return the newest complete checkpoint in ``output_dir``, ``None`` if there is none.

    Newest is the one saved last, not the one of the highest number. Where its manifest has
    checksums, they are compared.

    Example:
        >>> latest_complete_checkpoint("no-such-folder") is None
        True
    """
    for info in reversed(find_checkpoints(output_dir)):
        if info.verdict.status == "complete":
            verdict = verify_checkpoint(info.path)
            if verdict.status == "complete":
                return replace(info, verdict=verdict)
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
    newest one descends. NaN and infinities come last in both directions; on a tie the later
    step comes first. The metric stands in the sidecar; for checkpoints of the Trainer alone it
    is read from the log history in ``trainer_state.json``.

    Args:
        output_dir: The run folder.
        n: How many to return at most; ``None`` returns all.
        metric: Name of the metric, with or without ``eval_``. ``None`` takes that of the newest
            sidecar, else ``"loss"``.
        greater_is_better: Its direction. ``None`` takes that of the newest sidecar, else looks
            the name up.

    Raises:
        ValueError: If ``n`` is negative or the direction of the metric is not known.

    Example:
        >>> best_checkpoints("no-such-folder", 3)
        []
    """
    if n is not None and n < 0:
        raise ValueError(f"`n` must be at least 0, got {n}.")
    surveyed = _survey(output_dir)
    newest = _newest_sidecar(surveyed)
    name, greater = _ranking(metric, greater_is_better, [info for info, _ in surveyed])
    outside = set() if newest is None else {record.step for record in newest.records if not record.in_lineage}
    remembered = {} if newest is None else {record.step: record.metric for record in newest.records}
    histories = _Histories([info for info, _ in surveyed], name)
    ranked = {}
    for info, _ in surveyed:
        if info.verdict.status != "complete" or info.step in outside:
            continue
        value = info.metric if _is(info.metric_name, name) else None
        if value is None and info.sequence is None and newest is not None and _is(newest.metric_name, name):
            value = remembered.get(info.step)
        if value is None and not (info.sequence is not None and _is(info.metric_name, name)):
            # A sidecar without the metric it ranks by says that these very weights were not evaluated, whatever the
            # log holds for their step: after a rollback it holds what the undone weights gave.
            value = histories.value(info)
        if value is not None:
            ranked[info.step] = replace(info, metric_name=name, metric=value, greater_is_better=greater)
    records = (
        CheckpointRecord(step, place, info.metric) for place, (step, info) in enumerate(ranked.items())
    )
    return [ranked[record.step] for record in rank(records, greater_is_better=greater)[:n]]


def _is(metric_name: str | None, name: str) -> bool:
    return metric_name is not None and with_eval_prefix(metric_name) == name


def _ranking(
    metric: str | None, greater_is_better: bool | None, infos: Sequence[Checkpoint]
) -> tuple[str, bool]:
    """Return the name of the ranking metric as evaluations report it, and its direction."""
    named = [info for info in infos if info.metric_name is not None]
    if metric is None:
        metric = named[-1].metric_name if named else "loss"
    name = with_eval_prefix(str(metric))
    if greater_is_better is None:
        directions = [info.greater_is_better for info in named if _is(info.metric_name, name)]
        greater_is_better = next(
            (each for each in reversed(directions) if each is not None), known_direction(name)
        )
    if greater_is_better is None:
        raise ValueError(
            f"`greater_is_better` must be given for the metric {metric!r}: its name does not tell."
        )
    return name, greater_is_better


class _Histories:
    """Metrics out of the log histories of checkpoints: of the checkpoint itself, else of the newest one."""

    def __init__(self, infos: Sequence[Checkpoint], name: str) -> None:
        self._newest = infos[-1:]
        self._name = name
        self._read: dict[int, dict[int, float]] = {}

    def value(self, info: Checkpoint) -> float | None:
        for source in (info, *self._newest):
            if source.step not in self._read:
                self._read[source.step] = logged_metric(source.path, self._name)
            if info.step in self._read[source.step]:
                return self._read[source.step][info.step]
        return None
