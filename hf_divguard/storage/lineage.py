"""Which checkpoints a checkpoint comes from, and what their metrics were."""

from __future__ import annotations

import heapq
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from hf_divguard.core.metrics import with_eval_prefix
from hf_divguard.storage.names import checkpoint_step
from hf_divguard.storage.sidecar import CheckpointRecord, ExternalRecord, Sidecar, SidecarError, read_sidecar
from hf_divguard.storage.survey import Checkpoint, find_checkpoints, look_at
from hf_divguard.storage.trainer_state import logged_metric, read_trainer_state

__all__ = ["Lineage", "Summary"]

# What a sidecar remembers: enough to place the neighbours and to rank the best, whatever the direction.
_LAST_RECORDS = 24
_EXTREME_RECORDS = 8
_MOST_SPANS = 200


@dataclass(frozen=True)
class Lineage:
    """The checkpoints that one checkpoint comes from, itself included.

    A checkpoint of the stock Trainer names no ancestors: what stands beside it with a lower step
    is taken for its past.

    Args:
        source: Folder of the checkpoint.
        step: Its step; ``None`` if nothing gives it.
        metric_key: Key of the metric that ranks, with its ``eval_``.
        sidecar: Its sidecar; ``None`` for one of the stock Trainer.
    """

    source: str
    step: int | None
    metric_key: str
    sidecar: Sidecar | None = None
    _logs: dict[str, dict[int, float]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, checkpoint: str | os.PathLike[str], metric_key: str) -> Lineage:
        """Return the lineage of the checkpoint in the folder ``checkpoint``."""
        try:
            sidecar = read_sidecar(checkpoint)
        except (OSError, SidecarError):
            sidecar = None
        # Without the states of callbacks, which may be large: a lineage goes to all ranks.
        sidecar = replace(sidecar, callbacks={}) if sidecar is not None and sidecar.run_id else None
        step = sidecar.step if sidecar is not None else checkpoint_step(Path(checkpoint).name)
        return cls(
            os.fspath(checkpoint), step if step is not None else _step_in(checkpoint), metric_key, sidecar
        )

    @property
    def run_id(self) -> str | None:
        """The run that saved the checkpoint; ``None`` for the stock Trainer."""
        return None if self.sidecar is None else self.sidecar.run_id

    def is_in(self, run_dir: str | os.PathLike[str]) -> bool:
        """Return whether the checkpoint stands directly in ``run_dir``."""
        return same_folder(Path(self.source).parent, run_dir)

    def holds(self, each: Checkpoint) -> bool:
        """Return whether the lineage comes through ``each``, which stands in the run folder of its source."""
        if self.sidecar is None:
            return self.step is not None and each.step <= self.step
        if each.run_id is not None and each.run_id != self.sidecar.run_id:
            return False
        if each.sequence == self.sidecar.sequence:
            return True
        record = self._record(each)
        if record is not None:
            return record.in_lineage
        # Without a record: by the rows of saves. Another run's save of this step has another number.
        return each.sequence is not None and any(
            first <= each.sequence <= last for first, last in self.sidecar.lineage
        )

    def _record(self, each: Checkpoint) -> CheckpointRecord | None:
        records = () if self.sidecar is None else self.sidecar.records
        return next((r for r in records if r.step == each.step and each.sequence in (None, r.sequence)), None)

    def metric_of(self, each: Checkpoint) -> float | None:
        """Return the metric that was evaluated on the weights of ``each``, if it was."""
        if each.sequence is not None and self._ranks_by(each.metric_name):
            # Its own record counts even where it holds no metric: after a rollback the log has, for the
            # same step, what the weights gave that were undone.
            return each.metric
        record = self._record(each)
        if record is not None and self.sidecar is not None and self._ranks_by(self.sidecar.metric_name):
            return record.metric
        for path in (self.source, each.path):
            if path not in self._logs:
                self._logs[path] = logged_metric(path, self.metric_key)
            if each.step in self._logs[path]:
                return self._logs[path][each.step]
        return None

    def _ranks_by(self, metric_name: str | None) -> bool:
        return metric_name is not None and with_eval_prefix(metric_name) == self.metric_key

    def elsewhere(self, run_dir: str | os.PathLike[str]) -> list[Checkpoint]:
        """Return the checkpoints of the lineage that stand outside of ``run_dir``, or in it under another name.

        They are looked for beside the source, where the source was saved, and where its sidecar
        says that older ones stand. What cannot be read now is kept if the sidecar names it.
        """
        found: dict[int, Checkpoint] = {}
        parent = Path(self.source).parent
        homes = [parent] + ([Path(self.sidecar.home)] if self.sidecar and self.sidecar.home else [])
        for place in homes:
            if same_folder(place, run_dir):
                continue
            try:
                others = find_checkpoints(place)
            except OSError:
                continue
            for each in others:
                is_sure = each.sequence is not None or place == parent
                if each.verdict.status == "complete" and is_sure and self.holds(each):
                    found.setdefault(each.step, self._outside(each))
        for record in () if self.sidecar is None else self.sidecar.elsewhere:
            named = self._named(record)
            if named is not None:
                found.setdefault(record.step, named)
        stands_here = same_folder(parent, run_dir) and checkpoint_step(Path(self.source).name) == self.step
        if self.step is not None and not stands_here and self.step not in found:
            found[self.step] = self._outside(look_at(self.source, self.step))
        return list(found.values())

    def _outside(self, each: Checkpoint) -> Checkpoint:
        return replace(
            each, path=os.path.abspath(each.path), metric=self.metric_of(each), metric_name=self.metric_key
        )

    def _named(self, record: ExternalRecord) -> Checkpoint | None:
        """Return the checkpoint that the sidecar names, if it still is that one."""
        each = look_at(record.path, record.step)
        if each.verdict.status == "unreadable":
            return replace(each, sequence=record.sequence, metric=record.metric, metric_name=self.metric_key)
        if each.verdict.status != "complete" or each.sequence != record.sequence:
            return None
        is_other_run = each.run_id is not None and each.run_id != self.run_id
        return None if is_other_run else self._outside(each)


def same_folder(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Return whether two paths lead to the same folder."""
    return os.path.realpath(first) == os.path.realpath(second)


def _step_in(checkpoint: str | os.PathLike[str]) -> int | None:
    try:
        step = read_trainer_state(checkpoint).get("global_step")
    except (OSError, ValueError):
        return None
    return step if type(step) is int else None


@dataclass(frozen=True)
class Summary:
    """What a sidecar needs to know of a long list of records, brought up to date with each save.

    Args:
        records: The records, in order of saving.
        max_step: The highest step.
        lowest: The records of the lineage with the lowest finite metrics, lowest first.
        highest: Those with the highest ones, highest first; of equal ones the later step first.
        spans: First and last sequence number of each row of saves that no foreign one interrupts.
    """

    records: list[CheckpointRecord]
    max_step: int
    lowest: list[CheckpointRecord]
    highest: list[CheckpointRecord]
    spans: list[tuple[int, int]]

    @classmethod
    def of(cls, records: list[CheckpointRecord]) -> Summary:
        """Return the summary of ``records``."""
        finite = [r for r in records if r.in_lineage and r.metric is not None and math.isfinite(r.metric)]
        spans: list[tuple[int, int]] = []
        goes_on = False
        for record in records:
            if record.in_lineage:
                first = spans.pop()[0] if goes_on else record.sequence
                spans.append((first, record.sequence))
            goes_on = record.in_lineage
        lowest = heapq.nsmallest(_EXTREME_RECORDS, finite, key=_low)
        highest = heapq.nsmallest(_EXTREME_RECORDS, finite, key=_high)
        return cls(records, max((r.step for r in records), default=-1), lowest, highest, spans[-_MOST_SPANS:])

    def with_added(self, record: CheckpointRecord, records: list[CheckpointRecord]) -> Summary:
        """Return the summary of ``records``, which have ``record``, one of the lineage, as a new last one."""
        new = [record] if record.metric is not None and math.isfinite(record.metric) else []
        goes_on = bool(self.records) and self.records[-1].in_lineage
        span = (self.spans[-1][0] if goes_on else record.sequence, record.sequence)
        return Summary(
            records,
            max(self.max_step, record.step),
            sorted(self.lowest + new, key=_low)[:_EXTREME_RECORDS],
            sorted(self.highest + new, key=_high)[:_EXTREME_RECORDS],
            [*(self.spans[:-1] if goes_on else self.spans), span][-_MOST_SPANS:],
        )

    def remembered(self) -> list[CheckpointRecord]:
        """Return the last records and those with the lowest and highest metrics, in order of saving."""
        if len(self.records) <= _LAST_RECORDS + 2 * _EXTREME_RECORDS:
            return self.records
        kept = {r.step: r for r in (*self.lowest, *self.highest, *self.records[-_LAST_RECORDS:])}
        return sorted(kept.values(), key=lambda r: (r.sequence, r.step))


def _low(record: CheckpointRecord) -> tuple[float, int]:
    return record.metric or 0.0, -record.step


def _high(record: CheckpointRecord) -> tuple[float, int]:
    return -(record.metric or 0.0), -record.step
