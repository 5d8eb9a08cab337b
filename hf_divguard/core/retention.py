"""Which checkpoints stay: policies from records to steps, without a file in sight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["AnyOf", "BestN", "CheckpointRecord", "LatestN", "RetentionPolicy", "is_better", "rank"]


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """What a retention policy needs to know of one checkpoint.

    Args:
        step: Optimizer step of the checkpoint; unique among the records.
        sequence: Number of the save, growing by one with each: the order of age. Step
            numbers and file times are not: an old run may have left higher steps, and
            copying a folder changes its times.
        metric: Value of the ranking metric, evaluated at exactly this step; ``None``
            where this step was not evaluated. May be NaN or infinite.
        in_lineage: Whether the running training comes from this checkpoint. Folders of
            an earlier run, or of a branch that was left by resuming from an older
            checkpoint, are not ranked.
    """

    step: int
    sequence: int
    metric: float | None = None
    in_lineage: bool = True


class RetentionPolicy(Protocol):
    """Says which of the checkpoints stay."""

    def keep(self, records: Sequence[CheckpointRecord]) -> set[int]:
        """Return the steps to keep."""
        ...


def _rank_key(metric: float, greater_is_better: bool) -> float:
    if not math.isfinite(metric):
        return math.inf
    return -metric if greater_is_better else metric


def rank(records: Iterable[CheckpointRecord], *, greater_is_better: bool) -> list[CheckpointRecord]:
    """Return the records that can be ranked, best first.

    Records without a metric of their own step, and those that do not belong to the
    running training, are left out. NaN and infinities come last whatever the
    direction; of equal metrics the later step comes first.

    Example:
        >>> records = [CheckpointRecord(step, step, metric)
        ...            for step, metric in [(1, 0.5), (2, float("nan")), (3, 0.5), (4, None), (5, 0.4)]]
        >>> [record.step for record in rank(records, greater_is_better=False)]
        [5, 3, 1, 2]
    """
    ranked = [record for record in records if record.metric is not None and record.in_lineage]
    ranked.sort(key=lambda r: (_rank_key(r.metric or 0.0, greater_is_better), -r.step))
    return ranked


def is_better(metric: float, best: float | None, *, greater_is_better: bool) -> bool:
    """Return whether ``metric`` is strictly better than ``best``; a non-finite one never is.

    Example:
        >>> is_better(0.4, 0.5, greater_is_better=False), is_better(float("inf"), None, greater_is_better=True)
        (True, False)
    """
    if not math.isfinite(metric):
        return False
    if best is None or not math.isfinite(best):
        return True
    return metric > best if greater_is_better else metric < best


@dataclass(frozen=True, slots=True)
class LatestN:
    """Keep the ``n`` checkpoints that were saved last.

    Args:
        n: How many, at least 1. ``None`` keeps all.

    Example:
        >>> LatestN(1).keep([CheckpointRecord(700, 1), CheckpointRecord(100, 2)])
        {100}
    """

    n: int | None

    def keep(self, records: Sequence[CheckpointRecord]) -> set[int]:
        """Return the steps of the last ``n`` saves."""
        by_age = sorted(records, key=lambda record: record.sequence)
        return {record.step for record in (by_age if self.n is None else by_age[-self.n :])}


@dataclass(frozen=True, slots=True)
class BestN:
    """Keep the ``n`` best checkpoints.

    Args:
        n: How many, at least 1.
        greater_is_better: Direction of the metric.

    Example:
        >>> BestN(1, greater_is_better=True).keep([CheckpointRecord(1, 1, 0.9), CheckpointRecord(2, 2, 0.8)])
        {1}
    """

    n: int
    greater_is_better: bool

    def keep(self, records: Sequence[CheckpointRecord]) -> set[int]:
        """Return the steps of the ``n`` best records."""
        return {record.step for record in rank(records, greater_is_better=self.greater_is_better)[: self.n]}


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Keep whatever at least one of several policies keeps.

    Args:
        policies: The policies.

    Example:
        >>> records = [CheckpointRecord(1, 1, 0.2), CheckpointRecord(2, 2, 0.5), CheckpointRecord(3, 3, 0.4)]
        >>> sorted(AnyOf((LatestN(1), BestN(1, greater_is_better=False))).keep(records))
        [1, 3]
    """

    policies: tuple[RetentionPolicy, ...]

    def keep(self, records: Sequence[CheckpointRecord]) -> set[int]:
        """Return the union of the policies' steps."""
        return set[int]().union(*(policy.keep(records) for policy in self.policies))
