"""The evaluation set decides on data that stay bad, or that were bad or new for a while (`divguard_eval_arbiter`)."""

from __future__ import annotations

import logging
import math
from typing import Any

from hf_divguard.core.rollback.comparison import Pair, judge
from hf_divguard.core.rollback.incident import Incident
from hf_divguard.core.rollback.loss_range import Usual
from hf_divguard.core.rollback.ruling import Ruling
from hf_divguard.core.rollback.soundness import is_sound
from hf_divguard.hf.evaluation_batches import evaluation_batches
from hf_divguard.hf.host import Host
from hf_divguard.hf.probes import probe_on_all_ranks, random_states_kept
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.recent_batches import StepBatches
from hf_divguard.hf.snapshots import Snapshots

__all__ = ["Arbiter"]

logger = logging.getLogger(__name__)

# Batches of each rank: enough for a difference of a few percent.
_MOST_BATCHES = 16
# The noise of a difference that is assumed before there are many batches, as part of the loss.
_PRIOR_NOISE = 0.1


class Arbiter:
    """Keeps a state from before bad data, and compares it with the present one on the evaluation set.

    Data that stay bad and data that are new look alike to the loss of training: present weights
    follow both. All ranks call each method at the same step.

    Args:
        host: The host.
        ranks: The processes of the run.
        snapshots: The kept states.
        incident: What the looks so far add up to.
    """

    def __init__(self, host: Host, ranks: Ranks, snapshots: Snapshots, incident: Incident) -> None:
        self._host, self._ranks, self._snapshots, self._incident = host, ranks, snapshots, incident
        self._batches: list[Any] | None = None
        self._looked_at: int | None = None
        self._asked_for: int | None = None
        self._is_off = False
        self._followed: int | None = None
        self.since: int | None = None
        """Step since which the data are bad; ``None`` if they are not."""

    def follow(self) -> None:
        """After a look: keep the newest state from before data that are bad, until they have passed."""
        incident = self._incident
        if self._is_off:
            return
        if incident.is_open and incident.cause == "data" and incident.since != self._followed:
            self._followed = incident.since
            sound = [kept.step for kept in self._snapshots.all() if is_sound(kept.step, incident.since)]
            is_better = self.since is None or (bool(sound) and self._knows_more(max(sound)))
            if sound and is_better and not self._is_off:
                self.since, self._snapshots.pinned = incident.since, max(sound)
        elif self.since is not None and not incident.is_open and incident.new_data_until < self.since:
            self.forget()

    def _knows_more(self, kept_step: int) -> bool:
        """Return whether a state does better on the evaluation set than the one that is kept since earlier data."""
        before = [kept for kept in self._snapshots.all() if kept.step == self._snapshots.pinned]
        return not before or self._mean_loss(kept_step) < self._mean_loss(before[0].step)

    def _mean_loss(self, kept_step: int) -> float:
        losses = self._losses(self._snapshots.of(kept_step).tensors) or [math.inf]
        return sum(losses) / len(losses)

    def forget(self) -> None:
        """Keep nothing for the arbiter: the data are as before, or the weights are."""
        self.since, self._snapshots.pinned = None, None

    def is_due(self, *, is_last: bool, stops: bool) -> bool:
        """Return whether to ask the evaluation set.

        It is asked when the data have changed again, when those of before have come back, and at the end.

        Args:
            is_last: Whether training ends here.
            stops: Whether the action ends training: a rollback within bad data would be undone by them.
        """
        if self.since is None or not any(
            kept.step == self._snapshots.pinned for kept in self._snapshots.all()
        ):
            return False
        incident, step = self._incident, self._host.state.global_step
        # The data may have changed back from what counts as usual by now.
        has_changed_again = incident.is_open and incident.cause == "data" and incident.since > self.since
        is_now = incident.open_question_at == step or (stops and incident.has_bad_data)
        is_now |= has_changed_again and self._asked_for != incident.since
        return is_last or (is_now and self._looked_at != step)

    def ask(self) -> Ruling:
        """Return whether the kept state does clearly better on the evaluation set than the present one."""
        self._looked_at, self._asked_for = self._host.state.global_step, self._incident.since
        good = self._snapshots.pinned
        assert good is not None
        present, kept = self._losses(None), self._losses(self._snapshots.of(good).tensors)
        if self._is_off:
            return Ruling("none")
        level = sum(kept) / len(kept)
        verdict = judge(list(map(Pair, present, kept)), Usual(level, _PRIOR_NOISE * abs(level), level))
        return Ruling("act" if verdict.cause == "weights" else "none", "data", good, verdict)

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
