"""The checkpoints of a run: what stands in its folder, which count, which are best, which may go."""

from __future__ import annotations

import math
import os
import uuid
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hf_divguard.core.retention import CheckpointRecord, is_better, rank
from hf_divguard.storage.lineage import Lineage, Summary
from hf_divguard.storage.names import checkpoint_folders, checkpoint_name
from hf_divguard.storage.record import Quarantine
from hf_divguard.storage.rotation import Rotation
from hf_divguard.storage.sidecar import ExternalRecord, Sidecar
from hf_divguard.storage.survey import Checkpoint, find_checkpoints, look_at
from hf_divguard.storage.verdict import Verdict

__all__ = ["CheckpointLedger"]

_GAP = 1000
_JUST_SAVED = Verdict("complete", "This training saved it.", (), True, True)


@dataclass
class CheckpointLedger(Rotation):
    """Which checkpoints there are, in order of saving, with their metrics.

    Built by rank 0 at the start of training and the same on every rank.

    Args:
        run_dir: Folder that holds the checkpoints.
        run_id: Name of this training; kept across a resume.
        records: The checkpoints in ``run_dir``, oldest save first.
        metric_key: Key of the metric that ranks, with its ``eval_``.
        incomplete: Steps of those that do not count: unfinished or damaged.
        quarantined: Steps of those that must not be resumed; they are deleted first.
        suspects: Steps of those that were saved under a fault. They are not ranked.
        unreadable: Steps of those that could not be judged. They are never deleted.
        linked: Steps of those that are symbolic links. They are never deleted.
        external: Checkpoints of the lineage that stand outside of ``run_dir``, by step. They are
            ranked, and never deleted.
        pending_deletions: Steps whose deletion failed, to be tried again.
        verdicts: What was found out about each, by step.
        lineage: Where the run comes from; ``None`` if it started from scratch.
        last_sequence: Number of the newest save.
    """

    run_dir: str
    run_id: str
    records: list[CheckpointRecord]
    metric_key: str | None = None
    incomplete: set[int] = field(default_factory=set)
    quarantined: set[int] = field(default_factory=set)
    suspects: set[int] = field(default_factory=set)
    unreadable: set[int] = field(default_factory=set)
    linked: set[int] = field(default_factory=set)
    external: dict[int, Checkpoint] = field(default_factory=dict)
    pending_deletions: set[int] = field(default_factory=set)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    lineage: Lineage | None = None
    last_sequence: int = 0
    _known_summary: Summary | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        self.last_sequence = max([self.last_sequence, *(record.sequence for record in self.records)])

    @classmethod
    def read(cls, run_dir: str, resumed_from: str | None, metric_key: str) -> CheckpointLedger:
        """Build the ledger from what is on disk.

        Only checkpoints that the run resumes from, directly or through their own past,
        are in its lineage and can be best. They may stand in other folders.

        Args:
            run_dir: Folder that holds the checkpoints.
            resumed_from: Checkpoint that training resumes from, if any.
            metric_key: Key of the metric that ranks, with its ``eval_``.

        Raises:
            OSError: If ``run_dir`` cannot be listed.
        """
        ledger = cls.of(run_dir, find_checkpoints(run_dir), resumed_from, metric_key)
        if ledger.lineage is not None:
            own = {record.step for record in ledger.records if record.in_lineage}
            outside = ledger.lineage.elsewhere(run_dir)
            ledger.external = {each.step: each for each in outside if each.step not in own}
        return ledger

    @classmethod
    def of(
        cls, run_dir: str, found: list[Checkpoint], resumed_from: str | None, metric_key: str
    ) -> CheckpointLedger:
        """Build the ledger from what was ``found`` in ``run_dir``, without looking elsewhere."""
        lineage = None if resumed_from is None else Lineage.of(resumed_from, metric_key)
        run_id = (lineage.run_id if lineage else None) or uuid.uuid4().hex
        ledger = cls(run_dir, run_id, [], metric_key, lineage=lineage)
        here = lineage if lineage is not None and lineage.is_in(run_dir) else None
        for each in found:
            # One without a number of its own gets that of the save before it.
            ledger.last_sequence = max(ledger.last_sequence, each.sequence or 0)
            ledger._note(each, ledger.last_sequence, here)
        # One that cannot be read may have a number that this training would give again.
        ledger.last_sequence += _GAP if ledger.unreadable else 0
        return ledger

    def _note(self, each: Checkpoint, sequence: int, lineage: Lineage | None) -> None:
        """Enter what was found out about a checkpoint in the run folder, as the newest one."""
        step, status = each.step, each.verdict.status
        belongs = lineage is not None and status not in ("incomplete", "quarantined") and lineage.holds(each)
        metric = lineage.metric_of(each) if belongs and lineage is not None else None
        self.records.append(CheckpointRecord(step, sequence, metric, in_lineage=belongs))
        self.verdicts[step] = each.verdict
        by_status = {
            "incomplete": self.incomplete,
            "quarantined": self.quarantined,
            "suspect": self.suspects,
            "unreadable": self.unreadable,
        }
        if status in by_status:
            by_status[status].add(step)
        if os.path.islink(each.path):
            self.linked.add(step)

    def judge_again(self) -> list[int]:
        """Judge once more what was unreadable; return the steps in the run folder that can be read now.

        It reads the disk: call it on one rank, and give the ledger to the others.
        """
        readable = []
        here = self.lineage if self.lineage is not None and self.lineage.is_in(self.run_dir) else None
        for step in sorted(self.unreadable):
            each = look_at(self.folder(step), step)
            if each.verdict.status != "unreadable":
                readable.append(step)
                was_quarantined, sequences = (
                    step in self.quarantined,
                    {r.step: r.sequence for r in self.records},
                )
                self.forget(step)
                self._note(each, sequences[step], None if was_quarantined else here)
                self.records.sort(key=lambda record: record.sequence)
                self.quarantined |= {step} if was_quarantined else set()
        for step, outside in self.external.items():
            if outside.verdict.status == "unreadable":
                verdict = look_at(outside.path, step).verdict
                self.external = {**self.external, step: replace(outside, verdict=verdict)}
        return readable

    # ---- places

    def folder(self, step: int) -> str:
        """Return where the checkpoint of ``step`` stands, or would stand, in the run folder."""
        return os.path.join(self.run_dir, checkpoint_name(step))

    def path(self, step: int) -> str:
        """Return the folder of the lineage's checkpoint of ``step``, wherever it stands."""
        return self.external[step].path if step in self.external else self.folder(step)

    def checkpoint(self, record: CheckpointRecord, greater_is_better: bool | None = None) -> Checkpoint:
        """Return what is known of the checkpoint of ``record``."""
        if record.step in self.external:
            return replace(self.external[record.step], greater_is_better=greater_is_better)
        return Checkpoint(
            self.folder(record.step),
            record.step,
            self.verdicts.get(record.step, _JUST_SAVED),
            record.sequence,
            self.run_id,
            self.metric_key,
            record.metric,
            greater_is_better,
        )

    # ---- changes

    def add(self, step: int, metric: float | None) -> CheckpointRecord:
        """Enter the checkpoint that is being saved; one of the same step is replaced."""
        self.last_sequence += 1
        record = CheckpointRecord(step=step, sequence=self.last_sequence, metric=metric)
        self.forget(step)
        summary = self._summary()
        self.records = [*self.records, record]
        self._known_summary = summary.with_added(record, self.records)
        return record

    def rewind_to(self, earlier: CheckpointLedger) -> None:
        """Take over what ``earlier``, a copy of this ledger, holds; the run folder stays as each rank spells it."""
        for each in fields(self):
            if each.name != "run_dir":
                setattr(self, each.name, getattr(earlier, each.name))

    def forget(self, step: int) -> None:
        """Drop the checkpoint of ``step``."""
        if step <= self._summary().max_step:
            self.records = [record for record in self.records if record.step != step]
        for name in ("incomplete", "quarantined", "suspects", "unreadable", "linked", "pending_deletions"):
            setattr(self, name, getattr(self, name) - {step})
        for name in ("verdicts", "external"):
            known = getattr(self, name)
            if step in known:
                setattr(self, name, {other: each for other, each in known.items() if other != step})

    def _summary(self) -> Summary:
        # The list is replaced with each change, never changed in place.
        if self._known_summary is None or self._known_summary.records is not self.records:
            self._known_summary = Summary.of(self.records)
        return self._known_summary

    def drop_missing(self) -> None:
        """Drop checkpoints whose folders are gone."""
        present = checkpoint_folders(self.run_dir)
        self.records = [record for record in self.records if record.step in present]

    def deletion_failed(self, step: int) -> None:
        """Note that the folder of ``step`` is still there: ``to_delete`` names it again."""
        self.pending_deletions = self.pending_deletions | {step}

    def quarantine_after(self, step: int) -> list[int]:
        """Take the checkpoints of the running training after ``step`` out of its lineage.

        Returns:
            Their steps; their folders are to be quarantined. What stands outside of the run folder
            is forgotten only.
        """
        after = [record.step for record in self.records if record.in_lineage and record.step > step]
        gone = set(after)
        self.records = [replace(r, in_lineage=False) if r.step in gone else r for r in self.records]
        self.quarantined = self.quarantined | gone
        self.suspects = self.suspects - gone
        self.external = {known: each for known, each in self.external.items() if known <= step}
        return after

    def mark_suspect(self, step: int) -> None:
        """Note that the checkpoint of ``step`` was saved under a fault; its folder is to be marked."""
        self.suspects = self.suspects | {step}

    # ---- ranking

    def best(self, greater_is_better: bool, n: int | None = None) -> list[Checkpoint]:
        """Return the best ``n`` checkpoints (all that can be ranked for ``None``), best first."""
        ranked = rank(self._lineage(), greater_is_better=greater_is_better)
        return [self.checkpoint(record, greater_is_better) for record in ranked[:n]]

    def ranked(self, records: list[CheckpointRecord], greater_is_better: bool) -> list[CheckpointRecord]:
        """Return ``records`` with those of a finite metric first, best first; the others newest first."""
        finite = [record for record in records if record.metric is not None and math.isfinite(record.metric)]
        best = rank(finite, greater_is_better=greater_is_better)
        return best + sorted((r for r in records if r not in best), key=lambda r: -r.sequence)

    def finite_best(self, greater_is_better: bool) -> Checkpoint | None:
        """Return the best checkpoint if its metric is a finite number."""
        # Called at each save, so it does not look at all records if it need not.
        summary = self._summary()
        extremes = self.counting(summary.highest if greater_is_better else summary.lowest)
        candidates = [*self._outside_records(), *extremes] if extremes else self._lineage()
        best = self.ranked(candidates, greater_is_better)
        has_metric = bool(best) and best[0].metric is not None and math.isfinite(best[0].metric)
        return self.checkpoint(best[0], greater_is_better) if has_metric else None

    def would_be_best(self, metric: float, greater_is_better: bool) -> bool:
        """Return whether ``metric`` beats every checkpoint there is."""
        best = self.finite_best(greater_is_better)
        return is_better(metric, best.metric if best else None, greater_is_better=greater_is_better)

    def usable_steps(self, *, before: int | None = None) -> list[int]:
        """Return the steps of good checkpoints of the lineage whose metric, if any, is finite; lowest first.

        Args:
            before: Only steps lower than this one.
        """
        return sorted(
            record.step
            for record in self._lineage()
            if (record.metric is None or math.isfinite(record.metric))
            and (before is None or record.step < before)
        )

    def good_records(self, last_step: int) -> list[CheckpointRecord]:
        """Return the checkpoints of this run up to ``last_step`` that count, wherever they stand."""
        return [record for record in self._lineage() if record.step <= last_step]

    def last_good(self, onset_step: int) -> Checkpoint | None:
        """Return the newest good checkpoint from before a fault that began at ``onset_step``.

        The loss of a step shows what the update before it did, so the last two steps before the
        onset do not count.
        """
        old = self.good_records(onset_step - 2)
        return self.checkpoint(max(old, key=lambda record: record.step)) if old else None

    def _lineage(self) -> list[CheckpointRecord]:
        """Return the checkpoints of this run that count, wherever they stand."""
        own = [record for record in self.counting(self.records) if record.in_lineage]
        return [*self._outside_records(), *own]

    def _outside_records(self) -> list[CheckpointRecord]:
        complete = [each for each in self.external.values() if each.verdict.status == "complete"]
        return [CheckpointRecord(each.step, 0, each.metric) for each in complete]

    # ---- memory

    def sidecar(
        self,
        step: int,
        *,
        metric_name: str | None,
        greater_is_better: bool | None,
        callbacks: dict[str, Any] | None = None,
        manifest_expected: bool = True,
        quarantine: Quarantine | None = None,
        suspect: Quarantine | None = None,
    ) -> Sidecar:
        """Return the sidecar of the checkpoint of ``step``, which ``add`` has entered."""
        record = next(record for record in reversed(self.records) if record.step == step)
        summary = self._summary()
        remembered = summary.remembered()
        outside = Summary.of([CheckpointRecord(e.step, e.step, e.metric) for e in self.external.values()])
        return Sidecar(
            step=step,
            run_id=self.run_id,
            sequence=record.sequence,
            metric_name=metric_name,
            metric=record.metric,
            greater_is_better=greater_is_better,
            records=tuple(remembered),
            is_partial=len(remembered) < len(self.records),
            lineage=tuple(summary.spans),
            home=os.path.abspath(self.run_dir),
            elsewhere=tuple(
                ExternalRecord(self.external[r.step].path, r.step, self.external[r.step].sequence, r.metric)
                for r in outside.remembered()
            ),
            callbacks=callbacks or {},
            manifest_expected=manifest_expected,
            quarantine=quarantine,
            suspect=suspect,
        )
