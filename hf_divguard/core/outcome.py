"""What was decided in one run: the one value that detectors and rollbacks report to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.skipping import SKIPPED

__all__ = ["Action", "RunOutcome", "check_action"]

Action = Literal["warn", "stop", "abort", "rollback"]

_DAMAGES_WEIGHTS = frozenset({"non_finite", "nan_filtered"})

# With a stock Trainer nobody takes the reports.
_MOST_REPORTS = 1000


def check_action(action: str) -> None:
    """Raise ``ValueError`` unless ``action`` is one of the known ones."""
    if action not in get_args(Action):
        raise ValueError(f"`action` must be one of {list(get_args(Action))}, got {action!r}.")


@dataclass(eq=False)
class RunOutcome:
    """What was found and decided in one run, the same on all ranks after :meth:`merge`.

    Args:
        finding: The finding that ends the run; ``None`` for a healthy run.
        stop_reason: The action and the sentence of that finding.
        is_aborted: Whether nothing more is saved or evaluated.
        rollback_request: The finding that asks for a rollback which is still to be done.
        muted_until: Last step in which findings are ignored, after a rollback.
        rolled_back_at: Step of the last rollback; -1 if there was none.
        conditions: The error findings whose condition lasts, by the detector that made them.
        reports: Findings, and the actions that they call for, that are not in the journal yet.
        is_deferring: Whether kept weights are compared before something is done.
        deferred: A finding that waits for that, and the action that it calls for.

    Example:
        >>> finding = Finding(step=9, onset_step=8, kind="jump", severity="error", metric="loss",
        ...                   value=9.0, limit=2.0, message="`loss` = 9 at step 9.")
        >>> outcome = RunOutcome()
        >>> outcome.report(finding, "stop")
        >>> outcome.stop_reason, outcome.is_aborted
        ('stop: `loss` = 9 at step 9.', False)
    """

    finding: Finding | None = None
    stop_reason: str | None = None
    is_aborted: bool = False
    rollback_request: Finding | None = None
    muted_until: int = -1
    rolled_back_at: int = -1
    conditions: dict[str, Finding] = field(default_factory=dict)
    reports: list[tuple[Finding, Action]] = field(default_factory=list)
    is_deferring: bool = False
    deferred: tuple[Finding, Action] | None = None

    def defers(self, finding: Finding, action: Action) -> bool:
        """Return whether ``action`` waits until kept and present weights were compared; if so, remember it.

        A comparison can say nothing about evaluations, nor about losses that are not finite.
        """
        if not self.is_deferring or action == "warn" or not finding.rests_on_finite_loss:
            return False
        self.deferred = self.deferred or (finding, action)
        return True

    def record(self, finding: Finding, action: Action) -> None:
        """Have a finding recorded in the journal, whatever its severity; nothing else follows from it."""
        self.reports.append((finding, action))
        del self.reports[:-_MOST_REPORTS]

    def report(self, finding: Finding, action: Action) -> None:
        """Take an error finding and the action that it calls for.

        The first finding that stops the run is kept; an abort takes the place of a stop.
        """
        self.record(finding, action)
        if action == "rollback":
            self.request_rollback(finding)
        elif action != "warn" and (self.finding is None or (action == "abort" and not self.is_aborted)):
            self.finding = finding
            self.stop_reason = f"{action}: {finding.message}"
            self.is_aborted |= action == "abort"
            self.open_condition("stop", finding)

    def request_rollback(self, finding: Finding) -> None:
        """Ask for a rollback at the end of the step; the first request of a step is kept."""
        self.rollback_request = self.rollback_request or finding

    def report_failed_recovery(self, finding: Finding, message: str) -> None:
        """End the run because rollbacks did not help; nothing more is saved."""
        self.finding, self.stop_reason, self.is_aborted = finding, f"rollback: {message}", True

    def open_condition(self, source: str, finding: Finding) -> None:
        """Note that the condition of an error finding of ``source`` has begun, or lasts.

        Where the updates were skipped, the weights are good, and so is what is saved. Steps from
        before the last rollback do not count.
        """
        if SKIPPED in finding.evidence:
            return
        if finding.onset_step <= self.rolled_back_at:
            finding = replace(finding, onset_step=self.rolled_back_at + 1)
        first = self.conditions.get(source)
        if first is None or finding.onset_step < first.onset_step:
            self.conditions[source] = finding

    def close_condition(self, source: str) -> None:
        """Note that ``source`` finds nothing wrong any more. After a stop the condition stays."""
        if self.finding is None:
            self.conditions.pop(source, None)

    @property
    def suspect_since(self) -> Finding | None:
        """The lasting condition with the earliest onset: what is saved from there on is suspect."""
        return min(self.conditions.values(), key=lambda finding: finding.onset_step, default=None)

    def has_rolled_back(self, step: int, muted_until: int) -> None:
        """Note a rollback at ``step`` and until when findings are ignored."""
        self.rolled_back_at, self.muted_until = step, muted_until
        self.conditions.clear()

    def is_muted(self, step: int | None) -> bool:
        """Return whether findings at ``step`` are ignored, shortly after a rollback."""
        return step is not None and step <= self.muted_until

    @property
    def stopped_by(self) -> Finding | None:
        """The finding that ended the run, unless a rollback has undone what it found."""
        if self.finding is None or self.finding.step <= self.rolled_back_at:
            return None
        return self.finding

    def stop_note(self) -> dict[str, object] | None:
        """Return onset and message of the finding that ended the run, as JSON values; ``None`` if none did."""
        finding = self.stopped_by
        return None if finding is None else {"onset_step": finding.onset_step, "message": finding.message}

    @property
    def damaged_by(self) -> Finding | None:
        """The finding after which the weights themselves are not finite, if there is one.

        After a training loss or a gradient that was not finite the weights are not either.
        """
        finding = self.stopped_by
        if finding is None or finding.kind not in _DAMAGES_WEIGHTS or finding.metric.startswith("eval_"):
            return None
        return None if SKIPPED in finding.evidence else finding

    @property
    def may_save(self) -> bool:
        """Whether a checkpoint may be saved: not after an abort, nor while a rollback is still to be done."""
        return not self.is_aborted and self.rollback_request is None and self.deferred is None

    def merge(self, outcomes: Sequence[RunOutcome]) -> None:
        """Take over what any of ``outcomes``, one of each rank, says. The reason of an abort goes first."""
        ordered = sorted(outcomes, key=lambda outcome: not outcome.is_aborted)
        self.finding = next((each.finding for each in ordered if each.finding is not None), None)
        self.stop_reason = next((each.stop_reason for each in ordered if each.stop_reason is not None), None)
        self.rollback_request = next(
            (each.rollback_request for each in ordered if each.rollback_request is not None), None
        )
        self.is_aborted = any(each.is_aborted for each in ordered)
        known = {_identity(*report) for report in self.reports}
        for each in ordered:
            self.reports += [report for report in each.reports if _identity(*report) not in known]
            known |= {_identity(*report) for report in each.reports}
            for source, finding in each.conditions.items():
                self.open_condition(source, finding)


def _identity(finding: Finding, action: Action) -> tuple[object, ...]:
    # Not the value: each rank may have one of its own, and NaN equals nothing.
    return finding.step, finding.kind, finding.metric, action
