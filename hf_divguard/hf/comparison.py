"""Compares kept with present weights before the coming step, and rules on what the curve asks for."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from hf_divguard.core.detection.detector import StepValues
from hf_divguard.core.findings import Finding
from hf_divguard.core.outcome import Action, RunOutcome
from hf_divguard.core.rollback.comparison import Budget, Pair, explains, judge
from hf_divguard.core.rollback.incident import Incident, Ruling
from hf_divguard.core.rollback.words import damage_finding, rounded, why
from hf_divguard.hf import control as switches
from hf_divguard.hf.control import outcome_of
from hf_divguard.hf.host import Host
from hf_divguard.hf.probes import probe, why_not_comparable
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.reports import RunJournal
from hf_divguard.hf.rows import suspect_rows
from hf_divguard.hf.snapshots import Snapshots

__all__ = ["Comparison"]

logger = logging.getLogger(__name__)

# Micro-batches of one look: a step may have many.
_MOST_BATCHES = 4
_INCIDENT_SHARE = 0.1
_RESERVE = 80.0
# Batches from within an incident that are kept, to see whether the data there can be learnt.
_BETWEEN = 3
_LEARNT = 0.8


class Comparison:
    """Decides whether the weights are damaged or the data have changed.

    A step out of the usual range, or a finding of a detector, only starts a look: kept and
    present weights are compared on micro-batches of the coming step, before its update. All
    ranks call each method at the same step.

    Args:
        host: The host.
        ranks: The processes of the run.
        journal: Gets an event for data that the kept weights do no better on.
        snapshots: The kept states.
        action: What follows on damaged weights that no detector has reported; ``None`` for nothing.
        margin_steps: How much older than needed a restored state has to be.
    """

    def __init__(
        self,
        host: Host,
        ranks: Ranks,
        journal: RunJournal,
        snapshots: Snapshots,
        *,
        action: Action | None,
        margin_steps: int,
    ) -> None:
        self._host, self._ranks, self._journal, self._snapshots = host, ranks, journal, snapshots
        self._action = action
        self._margin_steps = margin_steps
        self.incident = Incident()
        self._budget = Budget(_INCIDENT_SHARE, _RESERVE)
        self._reason = why_not_comparable(host)
        self._coming: tuple[list[Any], Any] | None = None
        self._is_first_micro_batch = False
        self._last: tuple[list[Any], Any] | None = None
        self._last_step = -1
        self._between: list[tuple[list[Any], Any]] = []
        self._ready: tuple[Finding, Action] | None = None
        self._may_differ = False
        self._noted = -1
        self.save_was_due = False
        """Whether a save was held back until the comparison."""
        self.rows: list[dict[str, int]] = []
        """Rows that stood out in batches with a high loss: step, rank, micro-batch and position."""
        self.passes = 0
        """Forward passes that looks have taken so far."""
        self.seconds = 0.0
        """Time that looks have taken so far."""

    # ---- memory

    def state_dict(self) -> dict[str, Any]:
        """Return the usual range, the open incident and what is left of the budget."""
        return {"incident": self.incident.state_dict(), "budget": self._budget.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory.

        Raises:
            ValueError: If it cannot be read.
        """
        self.incident.load_state_dict(state_dict["incident"])
        self._budget.load_state_dict(state_dict["budget"])

    def begin(self) -> None:
        """At the start of training: say where nothing can be compared."""
        if self._reason is not None and self._ranks.rank == 0:
            logger.info("Kept and present weights are not compared in this run: %s.", self._reason)
        self._outcome.is_deferring = self._reason is None or self._ignores_level

    @property
    def _outcome(self) -> RunOutcome:
        return outcome_of(self._host.state)

    @property
    def _ignores_level(self) -> bool:
        """Whether the level of the loss says nothing: policy gradients."""
        is_policy = self._reason is not None and "does not measure progress" in self._reason
        return is_policy or (self.incident.range.is_known and not self.incident.range.is_objective)

    @property
    def suspects(self) -> bool:
        """Whether the present state should not be kept, because something is being looked into."""
        return self._outcome.deferred is not None or self.incident.is_suspicious

    # ---- one step

    def take_batches(self, batches: list[Any], num_items: Any) -> None:
        """Take the micro-batches of the coming step."""
        self._last = self._coming
        self._coming, self._is_first_micro_batch = (batches, num_items), True

    def on_raw_losses(self, values: list[StepValues], args: Any, state: Any, control: Any) -> None:
        """Take the raw losses of the last few steps."""
        for entry in values:
            self.observe(entry.step, entry.loss, entry.grad_norm)

    def observe(self, step: int, loss: float, grad_norm: float | None) -> None:
        """Take the raw loss of a step, once."""
        if step <= self._last_step or self._reason is not None:
            return
        self._last_step = step
        self.incident.observe(step, loss, grad_norm)

    def begin_step(self) -> None:
        """Before the first micro-batch of a step: look, if there is a reason to."""
        if not self._is_first_micro_batch or self._coming is None:
            return
        self._is_first_micro_batch = False
        self._budget.earn(len(self._coming[0]))
        if self._may_differ and self._ranks.world_size > 1:
            asked = self._ranks.gather(self._outcome.deferred)
            self._outcome.deferred = next((each for each in asked if each is not None), None)
        self._may_differ = False
        self.settle(is_last=False)

    def end_step(self, *, losses_delivered: bool, save_was_due: bool) -> None:
        """At the end of a step: stop, if the look at its beginning has found a reason to."""
        self._may_differ |= losses_delivered
        self.save_was_due = save_was_due or (self.save_was_due and self._outcome.deferred is not None)
        if self._ready is not None:
            (finding, action), self._ready = self._ready, None
            self._carry_out(finding, action)

    def settle(self, *, is_last: bool) -> None:
        """Look, if there is a reason to, and carry out or dismiss what the curve asks for.

        Args:
            is_last: Whether no step follows: then the batches of the last one have to do.
        """
        step, deferred = self._host.state.global_step, self._outcome.deferred
        if self._ignores_level:
            self.incident.close()
        if deferred is not None and self._ignores_level:
            self._dismiss(deferred[0], "the level of this loss does not measure progress")
            return
        if deferred is not None and self.incident.is_about_new_data(deferred[0].onset_step):
            self._dismiss(deferred[0], "the data have changed there, and are the usual ones by now")
            return
        if deferred is not None:
            self.incident.ask(step)
        if not self.incident.is_open or not (is_last or self.incident.is_due(step)):
            return
        is_new = self.incident.since == step and self.incident.cause is None and deferred is None
        ruling = self._look(step, is_last)
        if is_new and ruling is not None and ruling.act == "dismiss":
            ruling = self._look_back(ruling, step)
        if ruling is None:
            self._without_comparison()
        elif ruling.act == "act" or (is_last and ruling.cause == "weights" and self.incident.cause != "data"):
            self._act(ruling, step, is_last)
        elif ruling.act == "dismiss" or is_last:
            self._note_data(ruling, step)
            if deferred is not None:
                self._dismiss(deferred[0], why(ruling))

    def _without_comparison(self) -> None:
        """Nothing is kept or known: the curve alone decides, as it does without comparisons."""
        deferred, self._outcome.deferred = self._outcome.deferred, None
        self.incident.close()
        if deferred is not None:
            finding, action = deferred
            message = f"{finding.message} (No kept weights to compare with.)"
            self._perform(replace(finding, cause="unknown", message=message), action)

    # ---- looking

    def _look(self, step: int, is_last: bool) -> Ruling | None:
        """Compare, as far as the budget goes; ``None`` where that is not possible."""
        assert self._coming is not None
        kept = self._usable()
        if not kept or not self.incident.range.is_known or self._reason is not None:
            return None
        batches, num_items = self._coming[0][:_MOST_BATCHES], self._coming[1]
        if not self._budget.take(2 * len(batches)) and not is_last:
            return Ruling("none")
        began = time.perf_counter()
        try:
            ruling = self._compare(step, batches, num_items, kept)
        except Exception as error:
            self._reason = (
                f"the loss could not be computed apart from training ({type(error).__name__}: {error})"
            )
            ruling = None
        self.seconds += time.perf_counter() - began
        if self._reason is not None and self._ranks.rank == 0:
            logger.warning("Kept and present weights are no longer compared in this run: %s.", self._reason)
        return ruling

    def _look_back(self, ruling: Ruling, step: int) -> Ruling:
        """Return the ruling on a step out of the range: a bad batch, if kept weights find it bad too.

        The batch is that of the step where ``ruling`` says that nothing is wrong after it, and
        the coming one where that is bad.
        """
        kept = self._usable()
        steps = self._coming if ruling.cause == "data" else self._last
        if not kept or steps is None or not self._budget.take(len(steps[0][:_MOST_BATCHES])):
            return ruling
        batches, num_items = steps[0][:_MOST_BATCHES], steps[1]
        tensors, usual = kept[-1].tensors, self.incident.range.usual
        if ruling.cause != "data":
            losses = self._losses(batches, num_items, tensors)
            verdict = judge([Pair(loss, loss) for loss in losses], usual)
            if verdict.cause != "data":
                return ruling
            ruling = Ruling("dismiss", "data", 0, verdict)
            step -= 1
        found, probes = suspect_rows(self._host, batches, tensors)
        self.passes += probes
        self._budget.take_anyway(probes)
        for rank, rows in enumerate(self._ranks.gather(found)):
            self.rows += [{"step": step + 1, "rank": rank, **row} for row in rows]
        return ruling

    def _usable(self) -> list[Any]:
        """Return the kept states that are worth a comparison: from before what the curve has found."""
        # What was kept before the data changed for good knows other data.
        deferred, since = self._outcome.deferred, self.incident.new_data_until
        kept = [state for state in self._snapshots.all() if state.step > since]
        onset = deferred[0].onset_step if deferred is not None else self._host.state.global_step + 1
        return kept if any(state.step < onset for state in kept) else []

    def _compare(self, step: int, batches: list[Any], num_items: Any, kept: list[Any]) -> Ruling:
        present = self._losses(batches, num_items, None)
        losses: dict[int, list[float]] = {}
        for state in reversed(kept):
            losses[state.step] = self._losses(batches, num_items, state.tensors)
            if self.incident.cause == "data" or explains(
                present, losses[state.step], self.incident.range.usual
            ):
                break
        self._budget.take_anyway((len(losses) - 1) * len(batches))
        ruling = self.incident.rule(step, present, losses, is_asked=self._outcome.deferred is not None)
        if ruling.act == "dismiss" and ruling.cause == "data":
            self._between = [*self._between, (batches[:1], num_items)][-_BETWEEN:]
        if ruling.act == "act" and ruling.cause == "data" and self._was_learnt(ruling.good_step):
            self.incident.take_as_usual(step)
            return Ruling("dismiss", "data", 0, ruling.verdict)
        return ruling

    def _losses(
        self, batches: list[Any], num_items: Any, tensors: Mapping[str, torch.Tensor] | None
    ) -> list[float]:
        """Return the losses of the micro-batches of all ranks."""
        self.passes += len(batches)
        own = probe(self._host, batches, num_items, tensors)
        return [loss for losses in self._ranks.gather(own) for loss in losses]

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
        usual = self.incident.range.usual
        there = sum(pair.present for pair in pairs) / len(pairs)
        before = sum(pair.kept for pair in pairs) / len(pairs)
        return there < _LEARNT * usual.first and before > there + usual.spread

    # ---- consequences

    def _act(self, ruling: Ruling, step: int, is_last: bool) -> None:
        deferred, self._outcome.deferred = self._outcome.deferred, None
        action = deferred[1] if deferred is not None else self._action
        if action is None:
            self.incident.close()
            return
        finding = damage_finding(ruling, step, self.incident.since)
        if deferred is not None:
            finding = replace(
                deferred[0],
                cause=ruling.cause,
                message=f"{deferred[0].message} {finding.message}",
                evidence={**deferred[0].evidence, **finding.evidence},
            )
        if action == "rollback":
            finding = replace(finding, onset_step=ruling.good_step + 2 + self._margin_steps)
        if action == "rollback" or is_last:
            self._perform(finding, action)
        else:
            self._ready = (finding, action)

    def _perform(self, finding: Finding, action: Action) -> None:
        if action == "rollback":
            self._outcome.request_rollback(finding)
        else:
            self._carry_out(finding, action)

    def _carry_out(self, finding: Finding, action: Action) -> None:
        self.incident.close()
        if self._outcome.finding is not None and action != "abort":
            return
        if self._ranks.rank == 0:
            logger.warning(
                "%s Training %s.", finding.message, "ends" if action == "abort" else "stops after this step"
            )
        self._outcome.report(finding, action)
        switches.apply(self._outcome, finding, action, self._host.args, self._host.control)

    def _dismiss(self, finding: Finding, reason: str) -> None:
        self._outcome.deferred = None
        self._outcome.conditions.clear()
        if self.save_was_due:
            switches.request_save(self._host.control, True)
            self.save_was_due = False
        if self._ranks.rank == 0:
            logger.warning("%s Nothing is undone: %s. Training goes on.", finding.message, reason)

    def _note_data(self, ruling: Ruling, step: int) -> None:
        """Report once an incident that the data are the cause of."""
        if ruling.cause != "data" or ruling.verdict is None or self._noted == self.incident.since:
            return
        self._noted = self.incident.since
        self._journal.add(
            {
                "event": "data",
                "step": step,
                "onset_step": self.incident.since,
                "cause": "data",
                "rows": [row for row in self.rows if row["step"] >= self.incident.since],
                **rounded(ruling),
            }
        )
        if self._outcome.deferred is None and self._ranks.rank == 0:
            logger.warning(
                "`loss` is high since step %d: %s. Training goes on.", self.incident.since, why(ruling)
            )
