"""Which checkpoints of a run folder may be deleted."""

from __future__ import annotations

from hf_divguard.core.retention import AnyOf, BestN, CheckpointRecord, LatestN

__all__ = ["Rotation"]


class Rotation:
    """The part of the ledger that names what may be deleted; its attributes are those of the ledger."""

    records: list[CheckpointRecord]
    incomplete: set[int]
    quarantined: set[int]
    suspects: set[int]
    unreadable: set[int]
    linked: set[int]
    pending_deletions: set[int]

    def counting(self, records: list[CheckpointRecord]) -> list[CheckpointRecord]:
        """Return those of ``records`` that count, of this run and of others."""
        out = self.incomplete | self.quarantined | self.suspects | self.unreadable
        return [record for record in records if record.step not in out] if out else records

    def to_delete(self, limit: int | None, preserve_n_best: int, greater_is_better: bool) -> list[int]:
        """Return the steps that neither the last ``limit`` nor the best ``preserve_n_best`` keep.

        Only good checkpoints count towards ``limit`` and the best. An incomplete one goes when
        ``limit`` good ones are newer; a quarantined one as soon as there are more than ``limit``
        in all. Of the suspects the last ``limit`` stay, beside the good ones. What is unreadable,
        a symbolic link or outside of the run folder never goes.
        """
        if limit is None or limit <= 0:
            return sorted(self.pending_deletions)
        good = self.counting(self.records)
        keep = AnyOf((LatestN(limit), BestN(preserve_n_best, greater_is_better))).keep(good)
        return self._surplus(keep, limit, good)

    def to_delete_as_stock(self, limit: int | None, best_step: int | None) -> list[int]:
        """Return the steps that the stock Trainer deletes: the oldest beyond ``limit``, never the last or best.

        Age is the order of saving, not the time of change of a folder, which anything that
        touches it alters. For what does not count, see :meth:`to_delete`.
        """
        if limit is None or limit <= 0:
            return sorted(self.pending_deletions)
        good = self.counting(self.records)
        by_age = [record.step for record in sorted(good, key=lambda record: record.sequence)]
        protected = set(by_age) & {*by_age[-1:], best_step}
        others = [step for step in by_age if step not in protected]
        room = max(0, limit - len(protected))
        return self._surplus(protected | set(others[len(others) - room :]), limit, good)

    def _surplus(self, keep: set[int], limit: int, good: list[CheckpointRecord]) -> list[int]:
        suspects = [record.step for record in self.records if record.step in self.suspects]
        keep = keep | set(suspects[-limit:]) | self.unreadable | self.linked
        surplus = []
        for record in self.records:
            if record.step in keep:
                continue
            if record.step in self.quarantined:
                may_go = len(self.records) > limit
            elif record.step in self.incomplete:
                may_go = sum(other.sequence > record.sequence for other in good) >= limit
            else:
                may_go = True
            if may_go:
                surplus.append(record.step)
        return [*surplus, *sorted(self.pending_deletions - set(surplus))]
