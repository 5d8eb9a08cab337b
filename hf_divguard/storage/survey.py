"""Looking at the checkpoints of a run folder, in the order of saving."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_divguard.storage.disk_usage import DiskUsage
from hf_divguard.storage.integrity import verify_with_record
from hf_divguard.storage.names import checkpoint_folders
from hf_divguard.storage.sidecar import Sidecar, SidecarError, read_sidecar
from hf_divguard.storage.verdict import Verdict

__all__ = ["Checkpoint", "find_checkpoints", "find_with_usage", "look_at", "newest_sidecar"]

_PAUSE_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint folder.

    Args:
        path: The folder; it can be given to ``resume_from_checkpoint`` as it is.
        step: The optimizer step it was saved at.
        verdict: Whether it is complete.
        sequence: Its number among the saves of its run folder; ``None`` if it has none.
        run_id: The run that saved it; ``None`` for one of the Trainer's own.
        metric_name: Name of the metric that ranks checkpoints.
        metric: Its value at this step; ``None`` if there was none.
        greater_is_better: Direction of the metric.
    """

    path: str
    step: int
    verdict: Verdict
    sequence: int | None = None
    run_id: str | None = None
    metric_name: str | None = None
    metric: float | None = None
    greater_is_better: bool | None = None


def find_checkpoints(output_dir: str | os.PathLike[str]) -> list[Checkpoint]:
    """Return the checkpoints directly inside ``output_dir`` in the order of saving, oldest first.

    As the public function of this name, without its warning for a path that can hold none.
    """
    return _in_order_of_saving(_find(output_dir, None))


def find_with_usage(output_dir: str | os.PathLike[str]) -> tuple[list[Checkpoint], DiskUsage]:
    """Return what ``find_checkpoints`` does, and what the checkpoints take on the disk: each file is looked at once."""
    usage = DiskUsage()
    return _in_order_of_saving(_find(output_dir, usage)), usage


def _find(output_dir: str | os.PathLike[str], usage: DiskUsage | None) -> list[Checkpoint]:
    folders = checkpoint_folders(output_dir)
    found = {
        step: look_at(path, step, None if usage is None else usage.look_at(os.fspath(path)))
        for step, path in folders.items()
    }
    unreadable = [step for step, each in found.items() if each.verdict.status == "unreadable"]
    if unreadable:
        # Most such errors pass at once.
        time.sleep(_PAUSE_SECONDS)
        found.update((step, look_at(folders[step], step)) for step in unreadable)
    gone = [
        step
        for step, each in found.items()
        if each.verdict.status == "incomplete" and not os.path.lexists(each.path)
    ]
    for step in gone:
        each = found.pop(step)
        if usage is not None:
            usage.forget(each.path)
    return list(found.values())


def look_at(path: str | os.PathLike[str], step: int, sizes: Mapping[str, int] | None = None) -> Checkpoint:
    """Return what is known of the checkpoint of ``step`` in the folder ``path``; sizes are compared alone.

    Args:
        path: The folder.
        step: Its step.
        sizes: The sizes of regular files directly in it, if somebody has just looked at them.
    """
    verdict, record = verify_with_record(path, checksums=False, sizes=sizes)
    shown = os.fspath(path)
    if record is None or record.step != step:
        return Checkpoint(shown, step, verdict)
    has_place = record.run_id != ""
    return Checkpoint(
        shown,
        step,
        verdict,
        record.sequence if has_place else None,
        record.run_id if has_place else None,
        record.metric_name,
        record.metric,
        record.greater_is_better,
    )


def _in_order_of_saving(found: list[Checkpoint]) -> list[Checkpoint]:
    """Sort by sequence; a folder without one goes before the next that the newest sidecar lists."""
    sequences = {each.step: each.sequence for each in found if each.sequence is not None}
    places: dict[int, tuple[float, int, int]] = {}
    newest = newest_sidecar(found) if len(sequences) < len(found) else None
    if newest is not None:
        before: float = newest.sequence
        for position in range(len(newest.records) - 1, -1, -1):
            record = newest.records[position]
            if sequences.get(record.step) == record.sequence:
                before = record.sequence
            elif record.step not in sequences:
                places[record.step] = (before, 0, position)

    def place(each: Checkpoint) -> tuple[float, int, int]:
        if each.sequence is not None:
            return each.sequence, 1, each.step
        if newest is not None and newest.is_partial and each.step < newest.step:
            return places.get(each.step, (-1, 0, each.step))  # one of the older ones that it leaves out
        return places.get(each.step, (math.inf, 0, each.step))

    return sorted(found, key=place)


def newest_sidecar(found: Sequence[Checkpoint]) -> Sidecar | None:
    """Return the sidecar of the checkpoint that was saved last, of those that have a readable one."""
    placed = [each for each in found if each.sequence is not None]
    for each in sorted(placed, key=lambda each: -(each.sequence or 0)):
        try:
            sidecar = read_sidecar(each.path)
        except (OSError, SidecarError):
            continue
        if sidecar.step == each.step and sidecar.sequence == each.sequence:
            return sidecar
    return None
