"""When kept weights are compared with the present ones: before the coming step, if the curve gives a reason to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_divguard.core.detection.detector import StepValues
from hf_divguard.core.findings import Finding
from hf_divguard.core.outcome import Action, RunOutcome
from hf_divguard.core.rollback.incident import Incident
from hf_divguard.core.rollback.ruling import Ruling
from hf_divguard.core.rollback.words import why
from hf_divguard.hf.arbiter import Arbiter
from hf_divguard.hf.bad_batches import BadBatches
from hf_divguard.hf.consequences import Consequences
from hf_divguard.hf.control import outcome_of
from hf_divguard.hf.evaluation_arbiter import EvaluationArbiter
from hf_divguard.hf.host import Host
from hf_divguard.hf.journal import RunJournal
from hf_divguard.hf.label_arbiter import LabelArbiter
from hf_divguard.hf.looks import WeightLooks
from hf_divguard.hf.policy_gradients import policy_gradient_class
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.snapshots import Snapshots

__all__ = ["Comparison"]


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
        arbiter_action: What follows if the evaluation set decides for kept weights; ``None`` if it is not asked.
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
        arbiter_action: Action | None = None,
    ) -> None:
        self._host, self._ranks = host, ranks
        self.incident = Incident(watches_small=action == "rollback")
        self.looks = WeightLooks(host, ranks, snapshots, self.incident)
        self.bad_batches = BadBatches(host, ranks, self.looks, self.incident, snapshots)
        self._consequences = Consequences(
            host, ranks, journal, self.incident, action=action, margin_steps=margin_steps
        )
        self._arbiter, self._arbiter_action = self._make_arbiter(snapshots, action, arbiter_action)
        self._is_first_micro_batch = False
        self._last_step = self._ended_at = -1
        self._may_differ = False

    def _make_arbiter(
        self, snapshots: Snapshots, action: Action | None, arbiter_action: Action | None
    ) -> tuple[Arbiter | None, Action]:
        host, ranks, incident = self._host, self._ranks, self.incident
        if arbiter_action is not None:
            return EvaluationArbiter(host, ranks, snapshots, incident), arbiter_action
        # The damage heals in time: no reason to end a run.
        is_on = action == "rollback"
        return LabelArbiter(host, ranks, self.looks, snapshots, incident) if is_on else None, "rollback"

    # ---- memory

    def state_dict(self) -> dict[str, Any]:
        """Return the usual range, the open incident, what is left of the budget, and how often labels were undone."""
        return {
            "incident": self.incident.state_dict(),
            "budget": self.looks.budget.state_dict(),
            "labels_undone": self._arbiter.undone if isinstance(self._arbiter, LabelArbiter) else 0,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory.

        Raises:
            ValueError: If it cannot be read.
        """
        self.incident.load_state_dict(state_dict["incident"])
        self.looks.budget.load_state_dict(state_dict["budget"])
        if isinstance(self._arbiter, LabelArbiter):
            self._arbiter.undone = state_dict.get("labels_undone", 0)

    def begin(self) -> None:
        """At the start of training: say where nothing can be compared."""
        self.looks.explain_off()
        self._outcome.is_deferring = self.looks.reason is None or self._ignores_level

    @property
    def _outcome(self) -> RunOutcome:
        return outcome_of(self._host.state)

    @property
    def _ignores_level(self) -> bool:
        """Whether the level of the loss says nothing: policy gradients."""
        is_policy = policy_gradient_class(self._host.trainer) is not None
        return is_policy or (self.incident.range.is_known and not self.incident.range.is_objective)

    @property
    def suspects(self) -> bool:
        """Whether the present state should not be kept, because something is being looked into."""
        return self._outcome.deferred is not None or self.incident.is_suspicious

    @property
    def vouches(self) -> bool:
        """Whether the looks after a rollback have found the restored state good."""
        incident = self.incident
        return self.looks.reason is None and incident.range.is_known and not incident.is_suspicious

    # ---- one step

    def take_batches(self, batches: list[Any], num_items: Any) -> None:
        """Take the micro-batches of the coming step."""
        self.looks.take_batches(batches, num_items)
        self.bad_batches.take_batches(batches, num_items)
        self._is_first_micro_batch = True

    def on_raw_losses(self, values: list[StepValues], args: Any, state: Any, control: Any) -> None:
        """Take the raw losses of the last few steps."""
        for entry in values:
            self.observe(entry.step, entry.loss, entry.grad_norm)

    def observe(self, step: int, loss: float, grad_norm: float | None) -> None:
        """Take the raw loss of a step, once."""
        if step <= self._last_step or self.looks.reason is not None:
            return
        self._last_step = step
        was_open = self.incident.is_open
        self.incident.observe(step, loss, grad_norm)
        self.bad_batches.observe(step, loss, opens=self.incident.is_open and not was_open)

    def forget_batches(self) -> None:
        """After training: give the memory of the batches back."""
        self.looks.forget_batches()
        self.bad_batches.forget()
        if self._arbiter is not None:
            self._arbiter.forget()

    def begin_step(self) -> None:
        """Before the first micro-batch of a step: look, if there is a reason to."""
        if not self._is_first_micro_batch:
            return
        self._is_first_micro_batch = False
        self.looks.begin_step()
        if self._may_differ and self._ranks.world_size > 1:
            asked = self._ranks.gather(self._outcome.deferred)
            self._outcome.deferred = next((each for each in asked if each is not None), None)
        self._may_differ = False
        self.settle(is_last=False)

    def end_step(self, *, losses_delivered: bool, save_was_due: bool) -> None:
        """At the end of a step: stop, if the look at its beginning has found a reason to."""
        self._may_differ |= losses_delivered
        then = self._consequences
        then.save_was_due = save_was_due or (then.save_was_due and self._outcome.deferred is not None)
        then.end_step()

    def has_restored(self, step: int, target: int, finding: Finding) -> None:
        """After a rollback at ``step`` to ``target``: look whether the fault has passed, and have enough left for it."""
        self.looks.budget.renew()
        self.incident.has_restored(step, target if finding.cause == "data" else None)

    def settle(self, *, is_last: bool) -> None:
        """Look, if there is a reason to, and carry out or dismiss what the curve asks for.

        Args:
            is_last: Whether no step follows: then the batches of the last one have to do.
        """
        self._look(is_last)
        if self._arbiter is not None:
            self._arbiter.follow()
            self._ask_arbiter(self._arbiter, self._arbiter_action, is_last)

    def _ask_arbiter(self, arbiter: Arbiter, action: Action, is_last: bool) -> None:
        if not arbiter.is_due(is_last=is_last, stops=action != "rollback"):
            return
        if any(self._ranks.gather(self._consequences.is_decided)):
            return
        ruling = arbiter.ask(is_last=is_last)
        if ruling.act == "act":
            self._consequences.act_on(arbiter.finding(ruling), action, ruling.good_step, is_last)
            arbiter.forget()

    def _look(self, is_last: bool) -> None:
        step, deferred = self._host.state.global_step, self._outcome.deferred
        if self._ignores_level:
            self.incident.close()
        if deferred is not None and self._ignores_level:
            self._consequences.dismiss(deferred[0], "the level of this loss does not measure progress")
            return
        if deferred is not None and deferred[0].onset_step <= self.incident.new_data_until:
            self._consequences.dismiss(
                deferred[0], "the data have changed there, and are the usual ones by now"
            )
            return
        if deferred is not None:
            self.incident.ask(step)
        elif is_last and step == self._ended_at:
            return  # the last batches have been looked at
        elif is_last and self.looks.reason is None:
            self.incident.observe_level(step, is_last=True)
        self._ended_at = step if is_last else -1
        if self.bad_batches.is_certain or not self.incident.is_open:
            self._search_rows(step)
        if not self.incident.is_open:
            return
        if not (is_last or self.incident.is_due(step)):
            return
        is_new = self.incident.cause is None and deferred is None
        asked = None if deferred is None else deferred[0]
        ruling = self.looks.look(step, asked, is_last)
        if is_new and ruling is not None and ruling.act == "dismiss":
            ruling = self.bad_batches.search(ruling, asked)
        if ruling is None and self.incident.is_slow and deferred is None:
            self.incident.dismiss()
        elif ruling is None:
            self._without_comparison()
        elif ruling.act == "act" or (is_last and ruling.cause == "weights" and self.incident.cause != "data"):
            self._consequences.act(ruling, step, is_last)
        elif ruling.act == "dismiss" or is_last:
            self._consequences.note_data(ruling, step, self.bad_batches.rows, since=self.incident.since)
            if deferred is not None:
                self._consequences.dismiss(deferred[0], why(ruling))

    def _search_rows(self, step: int) -> None:
        """Look into a batch with a loss above the usual range that calls for no look at the weights."""
        since = self.bad_batches.worst
        if since is not None:
            ruling = self.bad_batches.search(Ruling("dismiss"), None)
            self._consequences.note_data(ruling, step, self.bad_batches.rows, since=since)

    def _without_comparison(self) -> None:
        """Nothing is kept or known: the curve alone decides, as it does without comparisons."""
        deferred, self._outcome.deferred = self._outcome.deferred, None
        self.incident.close()
        if deferred is not None:
            finding, action = deferred
            message = f"{finding.message} (No kept weights to compare with.)"
            self._consequences.perform(replace(finding, cause="unknown", message=message), action)
