"""What follows from a comparison: a rollback, the end of the run, or nothing but a note."""

from __future__ import annotations

import logging
from dataclasses import replace

from hf_divguard.core.events import event_of
from hf_divguard.core.findings import Finding
from hf_divguard.core.outcome import Action, RunOutcome
from hf_divguard.core.rollback.incident import Incident
from hf_divguard.core.rollback.ruling import Ruling
from hf_divguard.core.rollback.words import damage_finding, rounded, why
from hf_divguard.hf import control as switches
from hf_divguard.hf.control import outcome_of
from hf_divguard.hf.host import Host
from hf_divguard.hf.journal import RunJournal
from hf_divguard.hf.ranks import Ranks

__all__ = ["Consequences"]

logger = logging.getLogger(__name__)


class Consequences:
    """Carries out or dismisses what a detector or a comparison asks for.

    Args:
        host: The host.
        ranks: The processes of the run.
        journal: Gets an event for data that the kept weights do no better on.
        incident: What the looks so far add up to.
        action: What follows on damaged weights that no detector has reported; ``None`` for nothing.
        margin_steps: How much older than needed a restored state has to be.
    """

    def __init__(
        self,
        host: Host,
        ranks: Ranks,
        journal: RunJournal,
        incident: Incident,
        *,
        action: Action | None,
        margin_steps: int,
    ) -> None:
        self._host, self._ranks, self._journal, self._incident = host, ranks, journal, incident
        self._action = action
        self._margin_steps = margin_steps
        self._ready: tuple[Finding, Action] | None = None
        self._noted = -1
        self.save_was_due = False
        """Whether a save was held back until the comparison."""

    @property
    def _outcome(self) -> RunOutcome:
        return outcome_of(self._host.state)

    def end_step(self) -> None:
        """At the end of a step: stop, if the look at its beginning has found a reason to."""
        if self._ready is not None:
            (finding, action), self._ready = self._ready, None
            self._carry_out(finding, action)

    def act(self, ruling: Ruling, step: int, is_last: bool) -> None:
        """Roll back or stop, because the weights are damaged."""
        deferred, self._outcome.deferred = self._outcome.deferred, None
        action = deferred[1] if deferred is not None else self._action
        if action is None:
            self._incident.close()
            return
        finding = damage_finding(ruling, step, self._incident.since)
        if deferred is not None:
            finding = replace(
                deferred[0],
                cause=ruling.cause,
                message=f"{deferred[0].message} {finding.message}",
                evidence={**deferred[0].evidence, **finding.evidence},
            )
        self.act_on(finding, action, ruling.good_step, is_last)

    def act_on(self, finding: Finding, action: Action, good_step: int, is_last: bool) -> None:
        """Roll back to ``good_step`` or before, or stop: now if training ends here, else at the end of the step."""
        if action == "rollback":
            finding = replace(finding, onset_step=good_step + 2 + self._margin_steps)
        if action == "rollback" or is_last:
            self.perform(finding, action)
        else:
            self._ready = (finding, action)

    @property
    def is_decided(self) -> bool:
        """Whether something follows in this step anyway."""
        decided = self._ready is not None or self._outcome.finding is not None
        return decided or self._outcome.rollback_request is not None

    def perform(self, finding: Finding, action: Action) -> None:
        """Have a detector's finding acted on."""
        if action == "rollback":
            self._outcome.request_rollback(finding)
        else:
            self._carry_out(finding, action)

    def _carry_out(self, finding: Finding, action: Action) -> None:
        self._incident.close()
        if self._outcome.finding is not None and action != "abort":
            return
        if self._ranks.rank == 0:
            logger.warning(
                "Divergence found at step %d: %s Training %s.",
                finding.step,
                finding.message,
                "ends now" if action == "abort" else "stops after this step",
            )
        self._outcome.report(finding, action)
        switches.apply(self._outcome, finding, action, self._host.args, self._host.control)

    def dismiss(self, finding: Finding, reason: str) -> None:
        """Let training go on, in spite of a detector's finding."""
        action = self._outcome.deferred[1] if self._outcome.deferred is not None else "warn"
        step = self._host.state.global_step
        event = event_of("dismissed", finding, action, step=step, last_good=None)
        self._journal.add({**event, "reason": reason})
        self._outcome.deferred = None
        self._outcome.conditions.clear()
        if self.save_was_due:
            switches.request_save(self._host.control, True)
            self.save_was_due = False
        if self._ranks.rank == 0:
            logger.warning("%s Nothing is undone: %s. Training goes on.", finding.message, reason)

    def note_data(self, ruling: Ruling, step: int, rows: list[dict[str, int]], *, since: int) -> None:
        """Report once what the data are the cause of.

        Args:
            ruling: What was found.
            step: Present step.
            rows: All rows that have stood out so far.
            since: First step with a high loss.
        """
        if ruling.cause != "data" or ruling.verdict is None or self._noted == since:
            return
        self._noted = since
        self._journal.add(
            {
                "event": "data",
                "step": step,
                "onset_step": since,
                "cause": "data",
                "rows": [row for row in rows if row["step"] >= since],
                **rounded(ruling),
            }
        )
        is_ending = self._outcome.deferred is not None or self._outcome.finding is not None
        if not is_ending and self._ranks.rank == 0:
            logger.warning("`loss` is high since step %d: %s. Training goes on.", since, why(ruling))
