"""One look: kept and present weights are compared on micro-batches of the coming step, as far as a budget goes."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.comparison import (
    Budget,
    Pair,
    Verdict,
    explains,
    judge,
    rises_by_itself,
)
from hf_divguard.core.rollback.incident import Incident
from hf_divguard.core.rollback.learnt import has_learnt_since
from hf_divguard.core.rollback.ruling import Ruling
from hf_divguard.core.rollback.soundness import is_sound, is_trusted
from hf_divguard.hf.host import Host
from hf_divguard.hf.probes import probe_on_all_ranks, why_not_comparable
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.rates import scheduled_rates
from hf_divguard.hf.recent_batches import RecentBatches, StepBatches
from hf_divguard.hf.snapshots import Snapshots

__all__ = ["WeightLooks"]

logger = logging.getLogger(__name__)

# Micro-batches of one look: a step may have many.
_MOST_BATCHES = 4
_INCIDENT_SHARE = 0.1
_RESERVE = 80.0
# Batches on which it is seen what was learnt since a state was kept.
_MOST_SINCE = 6
# Batches from before a state that show whether it is damaged.
_MOST_OWN = 4
# Steps at the end of training whose first micro-batches a last look takes.
_LAST_STEPS = 12
# Above so many times the rate of then the schedule has raised it.
_SAME_RATE = 1.05


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
        self.coming: StepBatches | None = None
        """All micro-batches of the coming step."""
        self.recent = RecentBatches(ranks)
        """The first micro-batches of the last steps and of the coming one."""
        self.passes = 0
        """Forward passes that looks have taken so far."""
        self.seconds = 0.0
        """Time that looks have taken so far."""

    def take_batches(self, batches: list[Any], num_items: Any) -> None:
        """Take the micro-batches of the coming step."""
        self.coming = StepBatches(self._host.state.global_step + 1, batches, num_items, len(batches))
        self.recent.take(self.coming)

    def forget_batches(self) -> None:
        """After training: give the memory of the batches back."""
        self.coming = None
        self.recent.forget()

    def begin_step(self) -> None:
        """Before a step: a part of its cost may be spent on looks."""
        if self.coming is not None:
            self.budget.earn(self.coming.count)

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
        assert self.coming is not None
        kept = self.usable(asked)
        is_older = not kept and asked is not None
        if is_older:
            kept = self._of_present_data()[:1]
        if not kept or not self._incident.range.is_known or self.reason is not None:
            return None
        steps = [self.coming.at_most(_MOST_BATCHES)]
        if is_last and self._incident.is_slow:
            steps = self.recent.newest(_LAST_STEPS, since=max(state.step for state in kept))
        if not self.budget.take(2 * sum(len(each.batches) for each in steps)) and not is_last:
            return Ruling("none")
        ruling: Ruling | None = None
        began = time.perf_counter()
        with self.or_off():
            ruling = (
                self._compare_with_oldest(steps, kept[0])
                if is_older
                else self._compare(step, steps, kept, is_asked=asked is not None, is_last=is_last)
            )
        self.seconds += time.perf_counter() - began
        return ruling

    @contextlib.contextmanager
    def or_off(self) -> Iterator[None]:
        """Compare nothing any more in this run, if a loss cannot be computed."""
        try:
            yield
        except Exception as error:
            if self._ranks.is_ending:
                raise
            self.reason = (
                f"the loss could not be computed apart from training ({type(error).__name__}: {error})"
            )
            if self._ranks.rank == 0:
                logger.warning(
                    "Kept and present weights are no longer compared in this run: %s.", self.reason
                )

    def usable(self, asked: Finding | None) -> list[Any]:
        """Return the kept states that are worth a comparison: from before what the curve has found."""
        step, kept = self._host.state.global_step, self._of_present_data()
        if self._incident.is_slow:
            kept = [
                state
                for state in kept
                if is_sound(state.step, self._incident.since) and self._is_as_fast(state)
            ]
        onset = asked.onset_step if asked is not None else step + 1
        return kept if any(state.step < onset for state in kept) else []

    def _of_present_data(self) -> list[Any]:
        """Return the kept states, oldest first; what was kept before the data changed for good knows other data."""
        since = self._incident.new_data_until
        return [state for state in self._snapshots.all() if state.step > since]

    def _compare_with_oldest(self, steps: list[StepBatches], oldest: Any) -> Ruling | None:
        """Compare where no state is from before the onset; ``None`` if that says nothing."""
        present, kept = self.losses(steps, None), self.losses(steps, oldest.tensors)
        usual = self._incident.range.usual
        if not rises_by_itself(present, kept, usual, self._incident.range.earlier):
            return None
        numbers = {
            "present_loss": sum(present) / len(present),
            "kept_loss": sum(kept) / len(kept),
            "usual_loss": usual.level,
        }
        self._incident.close()
        return Ruling("dismiss", "data", 0, Verdict("data", numbers=numbers))

    def _is_as_fast(self, state: Any) -> bool:
        """Return whether the rate was no lower then: one that the schedule raises may raise the loss for a while."""
        then = state.schedule.get("_last_lr") or [math.inf]
        return max(scheduled_rates(self._host)) <= _SAME_RATE * max(then)

    def _compare(
        self, step: int, steps: list[StepBatches], kept: list[Any], *, is_asked: bool, is_last: bool
    ) -> Ruling:
        incident = self._incident
        present = self.losses(steps, None)
        losses: dict[int, list[float]] = {}
        spread = incident.range.usual.spread
        for state in reversed(kept):
            if losses and not incident.is_slow and not incident.pairs.needs(state.step, spread):
                continue
            losses[state.step] = self.losses(steps, state.tensors)
            # Small damage is judged by all states; else one that does as well as can be expected is enough.
            if incident.cause == "data" or (
                not incident.is_slow
                and is_trusted(state.step, incident.last_restore, step)
                and not incident.pairs.has_older(state.step)
                and explains(present, losses[state.step], incident.range.usual)
            ):
                break
        self.budget.take_anyway((len(losses) - 1) * sum(len(each.batches) for each in steps))
        ruling = incident.rule(
            step,
            present,
            losses,
            is_asked=is_asked,
            looks=len(steps),
            is_last=is_last,
            is_damaged=self._is_damaged,
        )
        # A rollback that the fault has outlasted was examined before it was made.
        goes_back = ruling.act == "act" or (is_last and ruling.cause == "weights")
        if goes_back and incident.restores == 0 and self._was_learnt(ruling.good_step):
            return incident.overrule(step, ruling)
        return ruling

    def losses(self, steps: list[StepBatches], tensors: Mapping[str, torch.Tensor] | None) -> list[float]:
        """Return the losses of the micro-batches of all ranks."""
        losses: list[float] = []
        for of_step in steps:
            self.passes += len(of_step.batches)
            losses += probe_on_all_ranks(self._host, self._ranks, of_step, tensors)
        return losses

    def _is_damaged(self, newest: int, good: int) -> bool:
        """Return whether the state of step ``newest`` is worse than the older one on the batches before it."""
        own = self.recent.until(newest, _MOST_OWN)
        if not own:
            return False
        self.budget.take_anyway(2 * len(own))
        of_newest, of_good = (self.losses(own, self._snapshots.of(step).tensors) for step in (newest, good))
        return judge(list(map(Pair, of_newest, of_good)), self._incident.range.usual).cause == "weights"

    def _was_learnt(self, good_step: int) -> bool:
        """Return whether the present weights have learnt since what the kept ones do not know."""
        since = self.recent.since(good_step, _MOST_SINCE)
        self.budget.take_anyway(2 * len(since))
        kept = self.losses(since, self._snapshots.of(good_step).tensors)
        pairs = list(map(Pair, self.losses(since, None), kept))
        incident = self._incident
        return has_learnt_since(
            pairs,
            incident.range.usual,
            is_after_data=incident.cause == "data",
            is_small=incident.is_slow,
        )
