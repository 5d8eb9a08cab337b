"""The checkpoints of a run folder as the running training knows them."""

from __future__ import annotations

import math
import os
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from hf_divguard.core.retention import AnyOf, BestN, CheckpointRecord, LatestN, is_better, rank
from hf_divguard.storage.checkpoints import find_checkpoints
from hf_divguard.storage.layout import checkpoint_folders, checkpoint_name, checkpoint_step
from hf_divguard.storage.sidecar import SidecarError, read_sidecar
from hf_divguard.storage.trainer_state import logged_metric

__all__ = ["CheckpointLedger", "RankedCheckpoint", "describe"]


@dataclass(frozen=True, slots=True)
class RankedCheckpoint:
    """One of the best checkpoints.

    Args:
        path: Folder of the checkpoint.
        step: Optimizer step it was saved at.
        metric: Value of the ranking metric, evaluated at that step.
    """

    path: str
    step: int
    metric: float


@dataclass
class CheckpointLedger:
    """Which checkpoints stand in a run folder, in order of saving, with their metrics.

    Built by rank 0 at the start of training and the same on every rank.

    Args:
        run_dir: Folder that holds the checkpoints.
        run_id: Name of this training; kept across a resume.
        records: The checkpoints, oldest save first.
    """

    run_dir: str
    run_id: str
    records: list[CheckpointRecord]

    @classmethod
    def read(cls, run_dir: str, resumed_from: str | None, ranking_key: str) -> CheckpointLedger:
        """Build the ledger from what is on disk.

        Only checkpoints that the run resumes from, directly or through their own past,
        are in its lineage and can be best.

        Args:
            run_dir: Folder that holds the checkpoints.
            resumed_from: Checkpoint that training resumes from, if any.
            ranking_key: Key of the metric that ranks, with its ``eval_``.
        """
        ancestors, run_id = _ancestors(resumed_from, ranking_key) if resumed_from else ({}, None)
        at_home = resumed_from is not None and _same_folder(Path(resumed_from).parent, run_dir)
        records = []
        for number, info in enumerate(find_checkpoints(run_dir), start=1):
            ancestor = ancestors.get(info.step) if at_home else None
            if info.verdict.status in ("incomplete", "quarantined"):
                ancestor = None
            if (
                ancestor
                and None not in (ancestor.sequence, info.sequence)
                and ancestor.sequence != info.sequence
            ):
                ancestor = None  # another run has written over that step since
            records.append(
                CheckpointRecord(
                    step=info.step,
                    sequence=info.sequence if info.sequence is not None else number,
                    metric=ancestor.metric if ancestor else None,
                    in_lineage=ancestor is not None,
                )
            )
        # Folders without a save number of their own get one that keeps the order they were found in.
        for index in range(1, len(records)):
            if records[index].sequence <= records[index - 1].sequence:
                records[index] = replace(records[index], sequence=records[index - 1].sequence + 1)
        return cls(run_dir=run_dir, run_id=run_id or uuid.uuid4().hex, records=records)

    def path(self, step: int) -> str:
        """Return the folder of the checkpoint of ``step``, as the host spells it."""
        return os.path.join(self.run_dir, checkpoint_name(step))

    def add(self, step: int, metric: float | None) -> CheckpointRecord:
        """Enter the checkpoint that is being saved; one of the same step is replaced."""
        sequence = max((record.sequence for record in self.records), default=0) + 1
        record = CheckpointRecord(step=step, sequence=sequence, metric=metric)
        self.records = [other for other in self.records if other.step != step] + [record]
        return record

    def forget(self, step: int) -> None:
        """Drop the checkpoint of ``step``."""
        self.records = [record for record in self.records if record.step != step]

    def drop_missing(self) -> None:
        """Drop checkpoints whose folders are gone."""
        present = checkpoint_folders(self.run_dir)
        self.records = [record for record in self.records if record.step in present]

    def best(self, greater_is_better: bool, n: int | None = None) -> list[RankedCheckpoint]:
        """Return the best ``n`` checkpoints (all that can be ranked for ``None``), best first."""
        ranked = rank(self.records, greater_is_better=greater_is_better)
        return [RankedCheckpoint(self.path(r.step), r.step, float(r.metric or 0.0)) for r in ranked[:n]]

    def finite_best(self, greater_is_better: bool) -> RankedCheckpoint | None:
        """Return the best checkpoint if its metric is a finite number."""
        best = self.best(greater_is_better, 1)
        return best[0] if best and math.isfinite(best[0].metric) else None

    def to_delete(self, limit: int | None, preserve_n_best: int, greater_is_better: bool) -> list[int]:
        """Return the steps that neither the last ``limit`` nor the best ``preserve_n_best`` keep."""
        if limit is None or limit <= 0:
            return []
        policy = AnyOf((LatestN(limit), BestN(preserve_n_best, greater_is_better)))
        keep = policy.keep(self.records)
        return [record.step for record in self.records if record.step not in keep]

    def would_be_best(self, metric: float, greater_is_better: bool) -> bool:
        """Return whether ``metric`` beats every checkpoint there is."""
        best = self.finite_best(greater_is_better)
        return is_better(metric, best.metric if best else None, greater_is_better=greater_is_better)


def _same_folder(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


@dataclass(frozen=True, slots=True)
class _Ancestor:
    sequence: int | None
    metric: float | None


def _ancestors(checkpoint: str, ranking_key: str) -> tuple[dict[int, _Ancestor], str | None]:
    """Return the checkpoints that ``checkpoint`` comes from, itself included, and the name of its run."""
    folder = Path(checkpoint)
    logged = logged_metric(folder, ranking_key)
    try:
        sidecar = read_sidecar(folder)
    except (OSError, SidecarError):
        sidecar = None
    if sidecar is None or not sidecar.run_id:
        # Saved by a stock Trainer: what stands beside it with a lower step is taken for its past.
        own = checkpoint_step(folder.name)
        steps = [step for step in checkpoint_folders(folder.parent) if own is not None and step <= own]
        return {step: _Ancestor(None, logged.get(step)) for step in steps}, None
    same_metric = sidecar.metric_name == ranking_key
    return {
        record.step: _Ancestor(
            record.sequence,
            record.metric if same_metric and record.metric is not None else logged.get(record.step),
        )
        for record in sidecar.records
        if record.in_lineage
    }, sidecar.run_id


def describe(checkpoints: list[RankedCheckpoint], metric: str) -> str:
    """Return one line that lists checkpoints with their metrics, best first."""
    return ", ".join(f"{entry.path} ({metric} {entry.metric:.6g})" for entry in checkpoints)
