"""What findings mean for checkpoints: what is saved under a fault is suspect until the fault is over."""

from __future__ import annotations

import math
from typing import Any

from hf_divguard.hf.control import outcome_of
from hf_divguard.hf.detectors import DivergenceDetector
from hf_divguard.hf.evaluation import Evaluations
from hf_divguard.hf.host import Host
from hf_divguard.hf.journal import RunJournal
from hf_divguard.hf.reports import warn_of_stopped_checkpoint
from hf_divguard.hf.saving import Checkpoints
from hf_divguard.storage.checkpoints import verify_checkpoint

__all__ = ["Suspects"]


class Suspects:
    """Lets checkpoints, evaluations and journal follow what detectors find.

    Args:
        host: The host.
        checkpoints: The checkpoints of the run.
        evaluations: The evaluations of the run.
        journal: The events of the run.
        detectors: The detectors by their names.
    """

    def __init__(
        self,
        host: Host,
        checkpoints: Checkpoints,
        evaluations: Evaluations,
        journal: RunJournal,
        detectors: dict[str, DivergenceDetector],
    ) -> None:
        self._host = host
        self._checkpoints = checkpoints
        self._evaluations = evaluations
        self._journal = journal
        self._detectors = detectors

    def follow(self) -> None:
        """Mark what was saved since a condition began, or clear it when the condition is over; note findings."""
        state, checkpoints = self._host.state, self._checkpoints
        outcome = outcome_of(state)
        if outcome.rollback_request is not None or outcome.deferred is not None:
            return  # nothing is saved until it is decided
        condition = outcome.suspect_since
        if checkpoints.follow_condition(condition):
            if checkpoints.preserves_best:
                checkpoints.point_to_best()
            else:
                last_good = math.inf if condition is None else condition.onset_step - 2
                self._evaluations.recall_host_best(state, last_good)
        if outcome.reports:
            self._journal.note_findings(outcome, state.global_step, checkpoints.ledger)

    def pending_since(self) -> int | None:
        """Return the first step of what may become a finding; ``None`` if nothing may."""
        since = [detector.pending_since for detector in self._detectors.values()]
        return min((step for step in since if step is not None), default=None)

    def judge_again(self, resumed_from: str, note: Any) -> None:
        """After a resume from a checkpoint that was saved under a fault: warn, and have the fault found again.

        Args:
            resumed_from: The checkpoint.
            note: What it says of the finding that stopped its run; ``None`` for nothing.
        """
        if note is not None and self._host.state.is_world_process_zero:
            warn_of_stopped_checkpoint(resumed_from, note, self._checkpoints.ledger)
        if note is not None or verify_checkpoint(resumed_from, checksums=False).status == "suspect":
            for detector in self._detectors.values():
                detector.judge_again()
