"""Labels that were wrong for some steps: the inputs were those of before all the time, and what they left is undone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy
import torch

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.comparison import Budget, Pair, Verdict, is_new, judge
from hf_divguard.core.rollback.incident import Incident
from hf_divguard.core.rollback.learnt import FEWEST_LOOKS
from hf_divguard.core.rollback.loss_range import Usual
from hf_divguard.core.rollback.ruling import Ruling
from hf_divguard.core.rollback.words import wrong_labels_finding
from hf_divguard.hf.arbiter import Arbiter
from hf_divguard.hf.host import Host
from hf_divguard.hf.input_rows import are_alike, row_features, some_rows
from hf_divguard.hf.looks import WeightLooks
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.recent_batches import StepBatches
from hf_divguard.hf.snapshots import Snapshots

__all__ = ["LabelArbiter"]

# Micro-batches of a step, and steps, that a comparison takes.
_MOST_BATCHES = 4
# Steps from one question to the next: weights that have followed wrong labels need not show it in their usual loss.
_EVERY = 4
# What it may cost beside the looks, as part of the training time, and forward passes that may be saved up for it.
_SHARE, _RESERVE = 0.05, 24.0
# Damage of this part of all that was learnt is undone at once, smaller damage if as much of it is left after a question.
_LARGE, _LEFT = 0.5, 0.5
# Steps before the end of training within which nothing heals any more.
_LAST_STEPS = 12
# Rows of a step that are described, on each rank, and rows of all ranks that are compared.
_MOST_ROWS_OF_STEP, _MOST_ROWS = 32, 1024
# Older states are not gone back to: what was learnt since is worth more.
_MOST_STEPS = 50
# What has happened more often is no fault that passes: labels that take turns.
_MOST_UNDONE = 2


class LabelArbiter(Arbiter):
    """Goes back to before wrong labels, once right ones have come back.

    New data have new inputs, by which a model can distinguish them from those of before. Where the inputs
    were the usual ones while the labels contradicted what was learnt, the labels were wrong.

    Args:
        host: The host.
        ranks: The processes of the run.
        looks: Computes losses with kept and with present weights.
        snapshots: The kept states.
        incident: What the looks so far add up to.
    """

    def __init__(
        self, host: Host, ranks: Ranks, looks: WeightLooks, snapshots: Snapshots, incident: Incident
    ) -> None:
        super().__init__(host, snapshots, incident)
        self._ranks, self._looks = ranks, looks
        self._budget = Budget(_SHARE, _RESERVE)
        self._usual = Usual(math.nan, 0.0, math.nan)
        self._described: dict[int, list[numpy.ndarray | None]] = {}
        self._is_bad: dict[int, bool] = {}
        self._damage: float | None = None
        self.undone = 0
        """How often a rollback to before wrong labels was asked for in this run."""

    def follow(self) -> None:
        """After a look: keep the newest state from before data that are bad, until they have passed."""
        coming = self._looks.coming
        if coming is None or self._looks.reason is not None:
            self.forget()
            return
        self._budget.earn(coming.count)
        before = self.since
        if self.undone < _MOST_UNDONE:
            with self._looks.or_off():
                super().follow()
        if self.since is not None and self.since != before:
            self._usual = self._incident.range.usual
            self._clear()
        if self.since is not None and self._is_old:
            self.forget()
        if self.since is not None:
            self._described[coming.step] = self._describe(coming.at_most(_MOST_BATCHES))

    def _clear(self) -> None:
        self._described.clear()
        self._is_bad.clear()
        self._damage = None

    def forget(self) -> None:
        """Keep nothing: the data are as before, or the weights are."""
        super().forget()
        self._clear()

    def _knows_more(self, kept_step: int) -> bool:
        """Return whether a state does as well on the data of before as the one that is kept since earlier ones."""
        if self._is_old or self._kept_step is None:
            return True
        own = self._looks.recent.until(kept_step, _MOST_BATCHES)
        verdict = self._compare(own, self._snapshots.of(self._kept_step).tensors, kept_step)
        return "kept_loss" in verdict.numbers and not verdict.is_uneasy

    @property
    def _is_old(self) -> bool:
        good = self._kept_step
        return good is None or self._host.state.global_step - good > _MOST_STEPS

    def is_due(self, *, is_last: bool, stops: bool) -> bool:
        """Return whether to ask: every few steps while the data are bad, and at the end."""
        step = self._host.state.global_step
        is_now = self.since is not None and step % _EVERY == 0 and step != self._looked_at
        return is_now or super().is_due(is_last=is_last, stops=False)

    def _decide(self, good: int, *, is_last: bool) -> Ruling:
        ruling = Ruling("none")
        if not self._is_old and self._looks.reason is None and self._budget.take(1):
            with self._looks.or_off():
                ruling = self._decide_on_coming(good, is_last)
        return ruling

    def _decide_on_coming(self, good: int, is_last: bool) -> Ruling:
        coming = self._looks.coming
        assert coming is not None
        tensors = self._snapshots.of(good).tensors
        self._is_bad[coming.step] = self._are_bad(self._looks.losses([coming.at_most(1)], tensors))
        if self._is_bad[coming.step]:
            return Ruling("none")  # the data are not those of before
        verdict = self._compare([coming.at_most(_MOST_BATCHES)], tensors)
        if verdict.is_uneasy and verdict.cause != "weights":
            # The present weights were trained on these: where they still do worse, that counts all the more.
            newest = [
                coming.at_most(_MOST_BATCHES),
                *self._looks.recent.newest(_MOST_BATCHES, since=good)[:-1],
            ]
            verdict = self._compare(newest, tensors)
        if verdict.cause != "weights":
            self._damage = None
            return Ruling("none")
        is_near_end = is_last or self._host.state.max_steps - self._host.state.global_step <= _LAST_STEPS
        if self._may_heal(verdict) and not is_near_end:
            return Ruling("none")
        if not self._labels_were_wrong(good, tensors):
            return Ruling("none")
        self.undone += 1
        return Ruling("act", "data", good, verdict)

    def _may_heal(self, verdict: Verdict) -> bool:
        """Return whether to wait until the next question: what was learnt from wrong labels may help with right ones."""
        gain, before = verdict.present - verdict.kept, self._damage
        self._damage = gain
        is_large = gain >= _LARGE * (self._usual.first - verdict.kept)
        lasts = before is not None and gain >= _LEFT * before
        return not (is_large or lasts)

    def _compare(
        self, steps: list[StepBatches], tensors: Mapping[str, torch.Tensor], other: int | None = None
    ) -> Verdict:
        """Compare the present weights, or those of step ``other``, on the batches that the kept ones do not find bad."""
        of_other = None if other is None else self._snapshots.of(other).tensors
        pairs = [
            pair
            for each in steps
            if not self._are_bad(kept := self._losses(each, tensors))
            for pair in map(Pair, self._losses(each, of_other), kept)
        ]
        return judge(pairs, self._usual) if pairs else Verdict("unknown")

    def _losses(self, step: StepBatches, tensors: Mapping[str, torch.Tensor] | None) -> list[float]:
        self._budget.take_anyway(len(step.batches))
        return self._looks.losses([step], tensors)

    def _are_bad(self, losses: list[float]) -> bool:
        return is_new(sum(losses) / len(losses), self._usual)

    def _labels_were_wrong(self, good: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Return whether the inputs of the steps that the kept weights find bad are like those of the others."""
        steps, is_bad = self._looks.recent.all(), self._is_bad
        for each in steps:
            if each.step not in is_bad:
                is_bad[each.step] = each.step > good and self._are_bad(self._losses(each, tensors))
        if sum(is_bad.values()) < FEWEST_LOOKS:
            return False
        rows = {each.step: self._describe(each) for each in steps if each.step not in self._described}
        rows |= self._described
        groups = [
            self._of_all_ranks([rows[step] for step in rows if _is_among(step, is_bad, bad)])
            for bad in (False, True)
        ]
        alike = self._ranks.broadcast(are_alike(*groups))
        if alike is False:
            self.forget()  # other inputs: a turn of domains
        return alike is True

    def _describe(self, step: StepBatches) -> list[numpy.ndarray | None]:
        described = [row_features(each, self._host.label_names) for each in step.batches]
        rows = sum(len(each) for each in described if each is not None)
        every = max(1, math.ceil(rows / _MOST_ROWS_OF_STEP))
        return [None if each is None else each[::every] for each in described]

    def _of_all_ranks(self, steps: list[list[numpy.ndarray | None]]) -> list[numpy.ndarray]:
        """Return the features of the rows of all ranks; none where a batch cannot be described."""
        own = [each for step in steps for each in step]
        described = [each for each in own if each is not None]
        most = max(1, _MOST_ROWS // self._ranks.world_size)
        sent = some_rows(described, most) if len(described) == len(own) else None
        of_ranks = self._ranks.gather(sent)
        return (
            [rows for each in of_ranks if each is not None for rows in each] if None not in of_ranks else []
        )

    def finding(self, ruling: Ruling) -> Finding:
        """Return the finding that labels were wrong for some steps."""
        assert self.since is not None
        return wrong_labels_finding(ruling, self._host.state.global_step, self.since)


def _is_among(step: int, is_bad: Mapping[int, bool], bad: bool) -> bool:
    """Return whether a step is one of the bad ones, or of the others: where it is not known, as both its neighbours are.

    Example:
        >>> is_bad = {40: False, 44: True, 48: True}
        >>> [step for step in range(39, 50) if _is_among(step, is_bad, True)]
        [44, 45, 46, 47, 48]
        >>> [step for step in range(39, 50) if _is_among(step, is_bad, False)]
        [40]
    """
    before = max((each for each in is_bad if each <= step), default=None)
    after = min((each for each in is_bad if each >= step), default=None)
    return before is not None and after is not None and is_bad[before] == is_bad[after] == bad
