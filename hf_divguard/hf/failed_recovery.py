"""The end of a run that rollbacks did not help."""

from __future__ import annotations

import logging
from typing import Any

from hf_divguard.core.events import event_of
from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.policy import Decision
from hf_divguard.errors import TrainingDivergedError
from hf_divguard.hf import control as switches
from hf_divguard.hf.control import outcome_of
from hf_divguard.hf.engines import engine_of
from hf_divguard.hf.host import Host
from hf_divguard.hf.journal import RunJournal, good_before
from hf_divguard.hf.last_weights import best_before, load_first_of
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.snapshots import Snapshots
from hf_divguard.storage.ledger import CheckpointLedger

__all__ = ["FailedRecovery"]

logger = logging.getLogger(__name__)


class FailedRecovery:
    """Ends a run with the best weights from before the fault.

    Args:
        host: The host.
        options: The options.
        ledger: The checkpoints of the run.
        ranks: The processes of the run.
        journal: The events of the run.
        snapshots: The states in memory.
    """

    def __init__(
        self,
        host: Host,
        options: Any,
        ledger: CheckpointLedger,
        ranks: Ranks,
        journal: RunJournal,
        snapshots: Snapshots,
    ) -> None:
        self._host = host
        self._options = options
        self._ledger = ledger
        self._ranks = ranks
        self._journal = journal
        self._snapshots = snapshots
        self._last_good = -1

    def end_run(
        self, finding: Finding, decision: Decision, *, last_good: int, number: int
    ) -> TrainingDivergedError:
        """Load the best weights from before the fault, and have the host end training. Called by all ranks.

        Args:
            finding: What asked for a rollback.
            decision: Why there is none.
            last_good: Last step that is not suspect.
            number: Number of the event.

        Returns:
            The error to raise when the host has ended.
        """
        self._last_good = last_good
        holds, path = self.load_best()
        step = self._host.state.global_step
        message = f"Training was ended at step {step}: {decision.reason}. {finding.message} The model holds {holds}."
        if not self._host.args.save_only_model and any(r.in_lineage for r in self._ledger.records):
            message += (
                " With the cause removed, resume_from_checkpoint='latest' continues from before the fault."
            )
        good = good_before(self._ledger, decision.onset_step)
        self._journal.add(
            {
                **event_of("gave_up", finding, "rollback", step=step, last_good=good),
                "number": number,
                "incident": decision.incident,
                "attempt": decision.attempt - 1,
                "onset_step": decision.onset_step,
                "checkpoint": path,
                "model_holds": holds,
                "reason": decision.reason,
            }
        )
        if self._ranks.rank == 0:
            logger.info("%s", message)
        self._journal.write()
        outcome = outcome_of(self._host.state)
        outcome.report_failed_recovery(finding, message)
        switches.enforce_abort(outcome, self._host.control)
        return TrainingDivergedError(message, finding)

    def load_best(self) -> tuple[str, str | None]:
        """Load the best weights from before the fault. Called by all ranks.

        Returns:
            What the model holds now, in words, and the folder of the checkpoint, if it is one.
        """
        greater_is_better = bool(self._options.divguard_greater_is_better)
        candidates = self._ranks.run_on_main(
            lambda: best_before(self._ledger, self._snapshots, self._last_good, greater_is_better)
        )
        held = load_first_of(candidates, self._host, self._ledger, self._snapshots, self._ranks)
        # It has been through the fault. A further `train()` of this trainer starts with a fresh one.
        engine_of(self._host).reset_optimizer()
        return held
