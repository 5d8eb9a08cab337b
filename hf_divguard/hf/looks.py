"""One look: kept and present weights are compared on micro-batches of the coming step, as far as a budget goes."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.comparison import Budget, Pair, explains
from hf_divguard.core.rollback.incident import Incident
from hf_divguard.core.rollback.ruling import Ruling
from hf_divguard.hf.host import Host
from hf_divguard.hf.probes import probe_on_all_ranks, why_not_comparable
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.rates import scheduled_rates
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
# Steps at the end of training whose first micro-batches are kept, for a last look.
_LAST_STEPS = 8
# Above so many times the rate of then the schedule has raised it.
_SAME_RATE = 1.05

Step = tuple[list[Any], Any]
"""Micro-batches of a step, and the number of items in all of them."""


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
        self._coming: Step | None = None
        self._between: list[Step] = []
        self._at_end: deque[Step] = deque(maxlen=_LAST_STEPS)
        self.passes = 0
        """Forward passes that looks have taken so far."""
        self.seconds = 0.0
        """Time that looks have taken so far."""

    def take_batches(self, batches: list[Any], num_items: Any) -> None:
        """Take the micro-batches of the coming step."""
        self._coming = (batches, num_items)
        if self._host.state.global_step >= self._host.state.max_steps - _LAST_STEPS:
            self._at_end.append((batches[:1], num_items))

    def forget_batches(self) -> None:
        """After training: give the memory of the batches back."""
        self._coming = None
        self._between = []
        self._at_end.clear()

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
        kept = self.usable(asked)
        if not kept or not self._incident.range.is_known or self.reason is not None:
            return None
        steps = [(self._coming[0][:_MOST_BATCHES], self._coming[1])]
        if is_last and self._incident.is_slow:
            steps = list(self._at_end)
        if not self.budget.take(2 * sum(len(batches) for batches, _ in steps)) and not is_last:
            return Ruling("none")
        began = time.perf_counter()
        try:
            ruling = self._compare(step, steps, kept, is_asked=asked is not None)
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

    def usable(self, asked: Finding | None) -> list[Any]:
        """Return the kept states that are worth a comparison: from before what the curve has found."""
        # What was kept before the data changed for good knows other data.
        since = self._incident.new_data_until
        kept = [state for state in self._snapshots.all() if state.step > since]
        if self._incident.is_slow:
            kept = [
                state for state in kept if self._incident.is_sound(state.step) and self._is_as_fast(state)
            ]
        onset = asked.onset_step if asked is not None else self._host.state.global_step + 1
        return kept if any(state.step < onset for state in kept) else []

    def _is_as_fast(self, state: Any) -> bool:
        """Return whether the rate was no lower then: one that the schedule raises may raise the loss for a while."""
        then = state.schedule.get("_last_lr") or [math.inf]
        return max(scheduled_rates(self._host)) <= _SAME_RATE * max(then)

    def _compare(self, step: int, steps: list[Step], kept: list[Any], *, is_asked: bool) -> Ruling:
        incident = self._incident
        present = self.losses(steps, None)
        losses: dict[int, list[float]] = {}
        for state in reversed(kept):
            losses[state.step] = self.losses(steps, state.tensors)
            # Small damage is judged by all states; else one that does as well as can be expected is enough.
            if incident.cause == "data" or (
                not incident.is_slow
                and not incident.has_compared_older(state.step)
                and explains(present, losses[state.step], incident.range.usual)
            ):
                break
        self.budget.take_anyway((len(losses) - 1) * sum(len(batches) for batches, _ in steps))
        ruling = incident.rule(step, present, losses, is_asked=is_asked, looks=len(steps))
        if ruling.act == "dismiss" and ruling.cause == "data":
            self._between = [*self._between, (steps[0][0][:1], steps[0][1])][-_BETWEEN:]
        if ruling.act == "act" and ruling.cause == "data" and self._was_learnt(ruling.good_step):
            incident.take_as_usual(step)
            return Ruling("dismiss", "data", 0, ruling.verdict)
        return ruling

    def losses(self, steps: list[Step], tensors: Mapping[str, torch.Tensor] | None) -> list[float]:
        """Return the losses of the micro-batches of all ranks."""
        losses: list[float] = []
        for batches, num_items in steps:
            self.passes += len(batches)
            losses += probe_on_all_ranks(self._host, self._ranks, batches, num_items, tensors)
        return losses

    def _was_learnt(self, good_step: int) -> bool:
        """Return whether the present weights have learnt the data of the incident, which the kept ones do not know.

        Then a return to the data of before looks as if a data fault had passed. Data that nobody
        can learn leave the loss where it was at the start of training.
        """
        tensors = self._snapshots.of(good_step).tensors
        if not self._between:
            return False
        pairs = list(map(Pair, self.losses(self._between, None), self.losses(self._between, tensors)))
        usual = self._incident.range.usual
        there = sum(pair.present for pair in pairs) / len(pairs)
        before = sum(pair.kept for pair in pairs) / len(pairs)
        return there < _LEARNT * usual.first and before > there + usual.spread
