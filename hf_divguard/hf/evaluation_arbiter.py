"""The evaluation set decides on data that stay bad, or that were bad or new for a while (`divguard_eval_arbiter`)."""

from __future__ import annotations

import logging
import math
from typing import Any

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.comparison import Pair, judge
from hf_divguard.core.rollback.incident import Incident
from hf_divguard.core.rollback.loss_range import Usual
from hf_divguard.core.rollback.ruling import Ruling
from hf_divguard.core.rollback.words import evaluated_finding
from hf_divguard.hf.arbiter import Arbiter
from hf_divguard.hf.evaluation_batches import evaluation_batches
from hf_divguard.hf.host import Host
from hf_divguard.hf.probes import probe_on_all_ranks, random_states_kept
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.recent_batches import StepBatches
from hf_divguard.hf.snapshots import Snapshots

__all__ = ["EvaluationArbiter"]

logger = logging.getLogger(__name__)

# Batches of each rank: enough for a difference of a few percent.
_MOST_BATCHES = 16
# The noise of a difference that is assumed before there are many batches, as part of the loss.
_PRIOR_NOISE = 0.1


class EvaluationArbiter(Arbiter):
    """Compares a state from before bad data with the present one on the evaluation set.

    Args:
        host: The host.
        ranks: The processes of the run.
        snapshots: The kept states.
        incident: What the looks so far add up to.
    """

    def __init__(self, host: Host, ranks: Ranks, snapshots: Snapshots, incident: Incident) -> None:
        super().__init__(host, snapshots, incident)
        self._ranks = ranks
        self._batches: list[Any] | None = None
        self._is_off = False

    def follow(self) -> None:
        """After a look: keep the newest state from before data that are bad, until they have passed."""
        if not self._is_off:
            super().follow()
        if self._is_off:
            self.forget()

    def _knows_more(self, kept_step: int) -> bool:
        before = [kept for kept in self._snapshots.all() if kept.step == self._snapshots.pinned]
        return not before or self._mean_loss(kept_step) < self._mean_loss(before[0].step)

    def _mean_loss(self, kept_step: int) -> float:
        losses = self._losses(self._snapshots.of(kept_step).tensors) or [math.inf]
        return sum(losses) / len(losses)

    def _decide(self, good: int, *, is_last: bool) -> Ruling:
        present, kept = self._losses(None), self._losses(self._snapshots.of(good).tensors)
        if self._is_off:
            return Ruling("none")
        level = sum(kept) / len(kept)
        verdict = judge(list(map(Pair, present, kept)), Usual(level, _PRIOR_NOISE * abs(level), level))
        return Ruling("act" if verdict.cause == "weights" else "none", "data", good, verdict)

    def finding(self, ruling: Ruling) -> Finding:
        """Return the finding that the kept state does better on the evaluation set."""
        assert self.since is not None
        return evaluated_finding(ruling, self._host.state.global_step, self.since)

    def _losses(self, tensors: Any) -> list[float]:
        """Return the losses on the evaluation set; none from the first time on at which that fails."""
        losses: list[float] = []
        if self._is_off:
            return losses
        try:
            if self._batches is None:
                self._batches = self._take_batches()
            for batch in self._batches:
                losses += probe_on_all_ranks(
                    self._host, self._ranks, StepBatches(0, [batch], None, 1), tensors
                )
        except Exception as error:
            if self._ranks.is_ending:
                raise
            self._is_off, losses = True, []
            self.forget()
            if self._ranks.rank == 0:
                logger.warning(
                    "The evaluation set decides on nothing in this run: its loss could not be computed (%s: %s).",
                    type(error).__name__,
                    error,
                )
        return losses

    def _take_batches(self) -> list[Any]:
        """Return as many batches as every rank has."""
        batches: list[Any] = []
        caught: Exception | None = None
        try:
            with random_states_kept():
                batches = evaluation_batches(self._host.trainer, _MOST_BATCHES)
        except Exception as error:
            caught = error
        self._ranks.raise_if_any_failed(caught, "Reading the evaluation set")
        count = min(self._ranks.gather(len(batches)))
        if count == 0:
            raise ValueError("the evaluation set gives no batch")
        return batches[:count]
