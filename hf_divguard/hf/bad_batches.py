"""Which rows made a loss high: kept weights look at the batch of a step that lies above the usual range."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.comparison import Pair, is_informed, judge
from hf_divguard.core.rollback.incident import Incident
from hf_divguard.core.rollback.rows import MOST_PROBES, bar_of, or_infinity
from hf_divguard.core.rollback.ruling import Ruling
from hf_divguard.hf.batch_indices import BatchIndices
from hf_divguard.hf.engines.tensors import bytes_of
from hf_divguard.hf.host import Host
from hf_divguard.hf.looks import WeightLooks
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.recent_batches import StepBatches
from hf_divguard.hf.rows import row_count, suspect_rows
from hf_divguard.hf.snapshots import Snapshots

__all__ = ["BadBatches"]

# Spreads above the usual loss from which a batch is reported although no row of it stands out.
_STANDS_OUT = 8.0
# ... and from which a row is searched in it, beside the batches with which an incident begins. Three spreads are too few
# where the rows are probed in groups: where their losses differ much, one of them makes a step so high by chance every
# few hundred steps. Where each row of a step has a probe of its own, it is compared with all others.
_SEARCHED, _SEARCHED_FEW = 4.0, 3.0
# Steps whose loss is not finite that are looked into beyond the budget of looks: the row is certain, and there are few.
_BEYOND_BUDGET = 3
# Memory that the batches of steps whose losses are not known yet may take.
_LIMIT_BYTES = 64e6
_FEWEST = 2


@dataclass(frozen=True)
class _Step:
    """Micro-batches of a step, and which rows of the dataset they hold, where that is known."""

    step: int
    batches: list[Any]
    num_items: Any
    rows: list[list[int] | None]
    count: int


class BadBatches:
    """Names rows in batches with a high loss. All ranks call each method at the same step.

    Args:
        host: The host.
        ranks: The processes of the run.
        looks: Computes losses with kept weights, within its budget.
        incident: What the looks so far add up to; knows the usual range.
        snapshots: The kept states.
    """

    def __init__(
        self, host: Host, ranks: Ranks, looks: WeightLooks, incident: Incident, snapshots: Snapshots
    ) -> None:
        self._host, self._ranks, self._looks = host, ranks, looks
        self._incident, self._snapshots = incident, snapshots
        self._steps: deque[_Step] = deque()
        self._high: dict[int, float] = {}
        self.rows: list[dict[str, int]] = []
        """Rows that stood out: step, rank, micro-batch, position, and index if known."""
        args = host.args
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._searched = _SEARCHED_FEW if rows <= MOST_PROBES else _SEARCHED
        self._beyond_budget = _BEYOND_BUDGET
        self.indices = BatchIndices()
        """Which rows of the dataset are in the batches."""

    def take_batches(self, batches: list[Any], num_items: Any) -> None:
        """Take the micro-batches of the coming step, and keep those whose losses are not known yet."""
        rows = self.indices.take([row_count(each) for each in batches])
        self._steps.append(
            _Step(self._host.state.global_step + 1, list(batches), num_items, rows, len(batches))
        )
        while len(self._steps) > _FEWEST and self._keeps_too_many():
            self._steps.popleft()

    def _keeps_too_many(self) -> bool:
        oldest = self._steps[0].step
        is_known = oldest < self._host.state.global_step - self._host.args.divguard_check_steps
        return is_known or sum(bytes_of(each.batches) for each in self._steps) > _LIMIT_BYTES

    def forget(self) -> None:
        """After training: give the memory of the batches back."""
        self._steps.clear()

    def observe(self, step: int, loss: float, *, opens: bool) -> None:
        """Take the loss of a step.

        Args:
            step: The step.
            loss: Its loss.
            opens: Whether an incident begins with it.
        """
        usual = self._incident.range
        if usual.is_known and (opens or usual.is_above(loss, self._searched)):
            self._high[step] = loss

    @property
    def worst(self) -> int | None:
        """The step with the highest loss above the usual range that was not looked into yet; ``None`` for none."""
        return max(self._high, key=lambda step: or_infinity(self._high[step]), default=None)

    @property
    def is_certain(self) -> bool:
        """Whether a loss that is not finite was seen: there is something to find, whatever else is looked into."""
        return any(not math.isfinite(loss) for loss in self._high.values())

    def search(self, ruling: Ruling, asked: Finding | None) -> Ruling:
        """Return the ruling on the step with the highest loss: its batch is bad, if kept weights find it bad too.

        Where ``ruling`` says that the data are bad, the batch is the coming one.
        """
        worst, is_coming, is_certain = self.worst, ruling.cause == "data", self.is_certain
        trained_at = or_infinity(self._high.get(worst, math.inf)) if worst is not None else math.inf
        self._high.clear()
        if is_coming and ruling.verdict is not None and ruling.verdict.cause == "weights":
            return ruling  # most of the rise is not in the batch
        looked_at = self._steps[-1] if is_coming else next((e for e in self._steps if e.step == worst), None)
        kept = self._looks.usable(asked)
        if not kept or looked_at is None or self._looks.reason is not None:
            return ruling
        # A state from within an instability finds every batch bad: the better one says how bad a batch is.
        kept = list({state.step: state for state in (kept[0], kept[-1])}.values())
        looked_at = replace(looked_at, batches=looked_at.batches[:MOST_PROBES])
        if not self._takes(len(kept) * len(looked_at.batches), is_certain):
            return ruling
        of_step = StepBatches(looked_at.step, looked_at.batches, looked_at.num_items, looked_at.count)
        losses = {state.step: self._looks.losses([of_step], state.tensors) for state in kept}
        best = min(losses, key=lambda kept_step: _mean(losses[kept_step]))
        usual, ruled = self._incident.range, ruling
        mean = _mean(losses[best])
        if not is_coming:
            if not usual.is_above(mean) or not is_informed(trained_at, mean, usual.usual):
                return ruling
            verdict = judge([Pair(loss, loss) for loss in losses[best]], usual.usual)
            ruled = Ruling("dismiss", "data", 0, replace(verdict, cause="data"))
        found = self._name_rows(looked_at, losses[best], self._snapshots.of(best).tensors)
        is_far = mean > usual.usual.level + _STANDS_OUT * usual.usual.spread
        return ruled if found or (is_far and (is_coming or verdict.cause == "data")) else ruling

    def _takes(self, passes: int, is_certain: bool) -> bool:
        """Return whether so many forward passes may be taken, and note them."""
        if self._looks.budget.take(passes):
            return True
        if not is_certain or self._beyond_budget == 0:
            return False
        self._beyond_budget -= 1
        self._looks.budget.take_anyway(passes)
        return True

    def _name_rows(self, looked_at: _Step, losses: list[float], tensors: Mapping[str, torch.Tensor]) -> bool:
        """Note the rows of a bad batch that stand out; return whether there are any."""
        count = len(looked_at.batches)
        of_ranks = [losses[start : start + count] for start in range(0, len(losses), count)]
        own = of_ranks[min(self._ranks.rank, len(of_ranks) - 1)]
        found: list[dict[str, int]] = []
        probes = 0
        if _mean(own) >= bar_of([_mean(each) for each in of_ranks]):
            found, probes = suspect_rows(self._host, looked_at.batches, own, tensors)
        for row in found:
            known = looked_at.rows[row["micro_batch"]]
            if known is not None:
                row["dataset_index"] = known[row["row"]]
        by_rank = self._ranks.gather((found, probes))
        most = max(probes for _, probes in by_rank)  # the budget stays the same on all ranks
        self._looks.passes += most
        self._looks.budget.take_anyway(most)
        for rank, (rows, _) in enumerate(by_rank):
            self.rows += [{"step": looked_at.step, "rank": rank, **row} for row in rows]
        return any(rows for rows, _ in by_rank)


def _mean(losses: list[float]) -> float:
    return or_infinity(sum(losses) / len(losses))
