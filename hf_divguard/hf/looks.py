"""One look: kept and present weights are compared on micro-batches of the coming step, as far as a budget goes."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.comparison import Budget, Pair, explains, judge
from hf_divguard.core.rollback.incident import Incident, Ruling
from hf_divguard.hf.host import Host
from hf_divguard.hf.probes import probe_on_all_ranks, why_not_comparable
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.rows import suspect_rows
from hf_divguard.hf.snapshots import Snapshots

__all__ = ["WeightLooks"]

logger = logging.getLogger(__name__)

# Micro-batches of one look: a step may have many.
_MOST_BATCHES = 4
_INCIDENT_SHARE = 0.1
_RESERVE = 80.0
# Batches from within an incident that are kept, to see whether the data there can be learnt.
_BETWEEN = 3
_LEARNT = 0.8


class WeightLooks:
    """Computes losses with kept and with present weights. All ranks call each method at the same step.

    Args:
        host: The host.
        ranks: The processes of the run.
        snapshots: The kept states.
        incident: What the looks so far add up to.
    """

    def __init__(self, host: Host, ranks: Ranks, snapshots: Snapshots, incident: Incident) -> None:
        self._host, self._ranks, self._snapshots, self._incident = host, ranks, snapshots, incident
        self.budget = Budget(_INCIDENT_SHARE, _RESERVE)
        self.reason = why_not_comparable(host)
        """Why nothing can be compared; ``None`` where it can."""
        self._coming: tuple[list[Any], Any] | None = None
        self._last: tuple[list[Any], Any] | None = None
        self._between: list[tuple[list[Any], Any]] = []
        self.rows: list[dict[str, int]] = []
        """Rows that stood out in batches with a high loss: step, rank, micro-batch and position."""
        self.passes = 0
        """Forward passes that looks have taken so far."""
        self.seconds = 0.0
        """Time that looks have taken so far."""

    def take_batches(self, batches: list[Any], num_items: Any) -> None:
        """Take the micro-batches of the coming step."""
        self._last = self._coming
        self._coming = (batches, num_items)

    def forget_batches(self) -> None:
        """After training: give the memory of the batches back."""
        self._coming = self._last = None
        self._between = []

    def begin_step(self) -> None:
        """Before a step: a part of its cost may be spent on looks."""
        if self._coming is not None:
            self.budget.earn(len(self._coming[0]))

    def explain_off(self) -> None:
        """At the start of training: say where nothing can be compared."""
        if self.reason is not None and self._ranks.rank == 0:
            logger.info("Kept and present weights are not compared in this run: %s.", self.reason)

    def look(self, step: int, asked: Finding | None, is_last: bool) -> Ruling | None:
        """Compare, as far as the budget goes; ``None`` where that is not possible.

        Args:
            step: Present step.
            asked: What a detector wants to act on, if anything.
            is_last: Whether no step follows; then the budget does not count.
        """
        assert self._coming is not None
        kept = self._usable(asked)
        if not kept or not self._incident.range.is_known or self.reason is not None:
            return None
        batches, num_items = self._coming[0][:_MOST_BATCHES], self._coming[1]
        if not self.budget.take(2 * len(batches)) and not is_last:
            return Ruling("none")
        began = time.perf_counter()
        try:
            ruling = self._compare(step, batches, num_items, kept, is_asked=asked is not None)
        except Exception as error:
            if self._ranks.is_ending:
                raise
            self.reason = (
                f"the loss could not be computed apart from training ({type(error).__name__}: {error})"
            )
            ruling = None
        self.seconds += time.perf_counter() - began
        if self.reason is not None and self._ranks.rank == 0:
            logger.warning("Kept and present weights are no longer compared in this run: %s.", self.reason)
        return ruling

    def look_back(self, ruling: Ruling, step: int, asked: Finding | None) -> Ruling:
        """Return the ruling on a step out of the range: a bad batch, if kept weights find it bad too.

        The batch is that of the step where ``ruling`` says that nothing is wrong after it, and
        the coming one where that is bad.
        """
        kept = self._usable(asked)
        steps = self._coming if ruling.cause == "data" else self._last
        if not kept or steps is None or not self.budget.take(len(steps[0][:_MOST_BATCHES])):
            return ruling
        batches, num_items = steps[0][:_MOST_BATCHES], steps[1]
        tensors, usual = kept[-1].tensors, self._incident.range.usual
        if ruling.cause != "data":
            losses = self._losses(batches, num_items, tensors)
            verdict = judge([Pair(loss, loss) for loss in losses], usual)
            if verdict.cause != "data":
                return ruling
            ruling = Ruling("dismiss", "data", 0, verdict)
            step -= 1
        found, probes = suspect_rows(self._host, batches, tensors)
        self.passes += probes
        self.budget.take_anyway(probes)
        for rank, rows in enumerate(self._ranks.gather(found)):
            self.rows += [{"step": step + 1, "rank": rank, **row} for row in rows]
        return ruling

    def _usable(self, asked: Finding | None) -> list[Any]:
        """Return the kept states that are worth a comparison: from before what the curve has found."""
        # What was kept before the data changed for good knows other data.
        since = self._incident.new_data_until
        kept = [state for state in self._snapshots.all() if state.step > since]
        onset = asked.onset_step if asked is not None else self._host.state.global_step + 1
        return kept if any(state.step < onset for state in kept) else []

    def _compare(
        self, step: int, batches: list[Any], num_items: Any, kept: list[Any], *, is_asked: bool
    ) -> Ruling:
        present = self._losses(batches, num_items, None)
        losses: dict[int, list[float]] = {}
        for state in reversed(kept):
            losses[state.step] = self._losses(batches, num_items, state.tensors)
            if self._incident.cause == "data" or explains(
                present, losses[state.step], self._incident.range.usual
            ):
                break
        self.budget.take_anyway((len(losses) - 1) * len(batches))
        ruling = self._incident.rule(step, present, losses, is_asked=is_asked)
        if ruling.act == "dismiss" and ruling.cause == "data":
            self._between = [*self._between, (batches[:1], num_items)][-_BETWEEN:]
        if ruling.act == "act" and ruling.cause == "data" and self._was_learnt(ruling.good_step):
            self._incident.take_as_usual(step)
            return Ruling("dismiss", "data", 0, ruling.verdict)
        return ruling

    def _losses(
        self, batches: list[Any], num_items: Any, tensors: Mapping[str, torch.Tensor] | None
    ) -> list[float]:
        """Return the losses of the micro-batches of all ranks."""
        self.passes += len(batches)
        return probe_on_all_ranks(self._host, self._ranks, batches, num_items, tensors)

    def _was_learnt(self, good_step: int) -> bool:
        """Return whether the present weights have learnt the data of the incident, which the kept ones do not know.

        Then a return to the data of before looks as if a data fault had passed. Data that nobody
        can learn leave the loss where it was at the start of training.
        """
        tensors = self._snapshots.of(good_step).tensors
        pairs: list[Pair] = []
        for batches, num_items in self._between:
            present = self._losses(batches, num_items, None)
            pairs += map(Pair, present, self._losses(batches, num_items, tensors))
        if not pairs:
            return False
        usual = self._incident.range.usual
        there = sum(pair.present for pair in pairs) / len(pairs)
        before = sum(pair.kept for pair in pairs) / len(pairs)
        return there < _LEARNT * usual.first and before > there + usual.spread
