"""The checkpoints of a run folder as the running training knows them."""

from __future__ import annotations

import math
import os
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

from hf_divguard.core.retention import AnyOf, BestN, CheckpointRecord, LatestN, is_better, rank
from hf_divguard.storage.checkpoints import find_checkpoints
from hf_divguard.storage.names import checkpoint_folders, checkpoint_name, checkpoint_step
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
        incomplete: Steps of those that do not count: unfinished or damaged.
        quarantined: Steps of those that must not be resumed; they are deleted first.
    """

    run_dir: str
    run_id: str
    records: list[CheckpointRecord]
    incomplete: set[int] = field(default_factory=set)
    quarantined: set[int] = field(default_factory=set)

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
        found = find_checkpoints(run_dir)
        for number, info in enumerate(found, start=1):
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
        return cls(
            run_dir=run_dir,
            run_id=run_id or uuid.uuid4().hex,
            records=records,
            incomplete={info.step for info in found if info.verdict.status == "incomplete"},
            quarantined={info.step for info in found if info.verdict.status == "quarantined"},
        )

    def path(self, step: int) -> str:
        """Return the folder of the checkpoint of ``step``, as the host spells it."""
        return os.path.join(self.run_dir, checkpoint_name(step))

    def add(self, step: int, metric: float | None) -> CheckpointRecord:
        """Enter the checkpoint that is being saved; one of the same step is replaced."""
        sequence = max((record.sequence for record in self.records), default=0) + 1
        record = CheckpointRecord(step=step, sequence=sequence, metric=metric)
        self.records = [other for other in self.records if other.step != step] + [record]
        self.incomplete = self.incomplete - {step}
        self.quarantined = self.quarantined - {step}
        return record

    def rewind_to(self, earlier: CheckpointLedger) -> None:
        """Take over what ``earlier``, a copy of this ledger, holds."""
        self.records, self.incomplete, self.quarantined = (
            earlier.records,
            earlier.incomplete,
            earlier.quarantined,
        )

    def forget(self, step: int) -> None:
        """Drop the checkpoint of ``step``."""
        self.records = [record for record in self.records if record.step != step]

    def drop_missing(self) -> None:
        """Drop checkpoints whose folders are gone."""
        present = checkpoint_folders(self.run_dir)
        self.records = [record for record in self.records if record.step in present]

    def leave_behind(self, target_step: int) -> list[int]:
        """Take the checkpoints of the running training after ``target_step`` out of its lineage.

        Returns:
            Their steps; their folders are to be marked.
        """
        left = [record.step for record in self.records if record.in_lineage and record.step > target_step]
        self.records = [replace(r, in_lineage=False) if r.step in left else r for r in self.records]
        self.quarantined = self.quarantined | set(left)
        return left

    def best(self, greater_is_better: bool, n: int | None = None) -> list[RankedCheckpoint]:
        """Return the best ``n`` checkpoints (all that can be ranked for ``None``), best first."""
        ranked = rank(self.records, greater_is_better=greater_is_better)
        return [RankedCheckpoint(self.path(r.step), r.step, float(r.metric or 0.0)) for r in ranked[:n]]

    def ranked(self, records: list[CheckpointRecord], greater_is_better: bool) -> list[CheckpointRecord]:
        """Return ``records`` with those of a finite metric first, best first; the others newest first."""
        finite = [record for record in records if record.metric is not None and math.isfinite(record.metric)]
        best = rank(finite, greater_is_better=greater_is_better)
        return best + sorted((r for r in records if r not in best), key=lambda r: -r.sequence)

    def finite_best(self, greater_is_better: bool) -> RankedCheckpoint | None:
        """Return the best checkpoint if its metric is a finite number."""
        best = self.best(greater_is_better, 1)
        return best[0] if best and math.isfinite(best[0].metric) else None

    def to_delete(self, limit: int | None, preserve_n_best: int, greater_is_better: bool) -> list[int]:
        """Return the steps that neither the last ``limit`` nor the best ``preserve_n_best`` keep.

        One that does not count, or must not be resumed, keeps no other out of the last
        ``limit``. An unfinished one goes when ``limit`` good ones are newer; a quarantined
        one as soon as there are more than ``limit`` at all.
        """
        if limit is None or limit <= 0:
            return []
        good = self._good()
        keep = AnyOf((LatestN(limit), BestN(preserve_n_best, greater_is_better))).keep(good)
        return self._outside(keep, limit, good)

    def to_delete_as_stock(self, limit: int | None, best_step: int | None) -> list[int]:
        """Return the steps that the stock Trainer deletes: the oldest beyond ``limit``, never the last or best.

        Age is the order of saving, not the time of change of a folder, which anything that
        touches it alters.
        """
        if limit is None or limit <= 0 or not self.records:
            return []
        good = self._good()
        by_age = [record.step for record in sorted(good, key=lambda record: record.sequence)]
        protected = set(by_age) & {*by_age[-1:], best_step}
        others = [step for step in by_age if step not in protected]
        room = max(0, limit - len(protected))
        return self._outside(protected | set(others[len(others) - room :]), limit, good)

    def _good(self) -> list[CheckpointRecord]:
        return [r for r in self.records if r.step not in self.incomplete and r.step not in self.quarantined]

    def _outside(self, keep: set[int], limit: int, good: list[CheckpointRecord]) -> list[int]:
        doomed = []
        for record in self.records:
            if record.step in self.quarantined:
                is_doomed = len(self.records) > limit
            elif record.step in self.incomplete:
                is_doomed = sum(other.sequence > record.sequence for other in good) >= limit
            else:
                is_doomed = record.step not in keep
            if is_doomed:
                doomed.append(record.step)
        return doomed

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
    # The log knows what was evaluated at a step, the sidecar what was evaluated on the weights saved there: after a
    # rollback that is not the same. The log is asked for other metrics only.
    same_metric = sidecar.metric_name == ranking_key
    return {
        record.step: _Ancestor(record.sequence, record.metric if same_metric else logged.get(record.step))
        for record in sidecar.records
        if record.in_lineage
    }, sidecar.run_id


def describe(checkpoints: list[RankedCheckpoint], metric: str) -> str:
    """Return one line that lists checkpoints with their metrics, best first."""
    return ", ".join(f"{entry.path} ({metric} {entry.metric:.6g})" for entry in checkpoints)
