"""The end of a run: whether it had come before this start, and what is noted of it."""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from hf_divguard.core.outcome import RunOutcome
from hf_divguard.hf import control as switches
from hf_divguard.hf.host import Host
from hf_divguard.hf.ranks import Ranks
from hf_divguard.storage.ledger import CheckpointLedger
from hf_divguard.storage.outcome_file import RunEnd, Status, read_outcome, remove_outcome, write_outcome

__all__ = ["Ending"]

logger = logging.getLogger(__name__)


class Ending:
    """Notes how a run ended, and lets a run that has ended already end again without a step.

    Args:
        host: The host.
        ranks: The processes of the run.
        ledger: The checkpoints of the run.
        resumed_from: Checkpoint that training resumes from, if any.
        resumes_newest: Whether that is the newest one of the run, not one that the user has named.
        is_active: Whether the end is noted at all.
    """

    def __init__(
        self,
        host: Host,
        ranks: Ranks,
        ledger: CheckpointLedger,
        resumed_from: str | None,
        *,
        resumes_newest: bool,
        is_active: bool,
    ) -> None:
        self._host = host
        self._ranks = ranks
        self._ledger = ledger
        self._resumed_from = resumed_from
        self._resumes_newest = resumes_newest
        self._is_active = is_active
        self._earlier: RunEnd | None = None
        self.had_come = False
        """Whether the run had ended before this start: then no step is trained, and nothing is changed."""

    def begin(self) -> None:
        """At the start of training, see whether there is anything left to train."""
        if not self._is_active:
            return
        state = self._host.state
        if self._resumed_from is not None:
            earlier = self._ranks.run_on_main(self._read_earlier)
            reached = 0 < state.max_steps <= state.global_step
            if reached or self._has_ended_with_its_best(earlier):
                self.had_come = True
                self._earlier = earlier if self._is_of_the_same_step(earlier) else None
                self._report()
                return
        if self._ranks.rank == 0:
            try:
                remove_outcome(self._ledger.run_dir)
            except OSError as error:
                logger.warning("%s", error)

    def end_at_once(self) -> None:
        """Let training end before a step, if the run had ended before."""
        if self.had_come:
            switches.end_training(self._host.control)

    def _read_earlier(self) -> RunEnd | None:
        earlier = read_outcome(Path(str(self._resumed_from)).parent)
        return earlier if earlier is not None and earlier.run_id == self._ledger.run_id else None

    def _is_of_the_same_step(self, earlier: RunEnd | None) -> bool:
        return earlier is not None and (
            earlier.step == self._host.state.global_step or self._has_ended_with_its_best(earlier)
        )

    def _has_ended_with_its_best(self, earlier: RunEnd | None) -> bool:
        """Return whether the run has finished later than the resumed checkpoint, whose weights it ended with.

        With ``load_best_model_at_end`` and ``save_total_limit=1`` the best checkpoint alone is kept.
        """
        return (
            earlier is not None
            and earlier.status == "finished"
            and self._resumes_newest
            and self._host.args.load_best_model_at_end
            and earlier.loaded == os.path.basename(str(self._resumed_from))
            and earlier.step >= self._host.state.max_steps
        )

    def _report(self) -> None:
        state = self._host.state
        if self._earlier is not None:
            state.global_step = max(state.global_step, self._earlier.step)
        if self._ranks.rank == 0:
            logger.warning(
                "This run has finished: step %d of %d is in %s. Nothing is trained, evaluated, saved or deleted. To "
                "train on, raise `max_steps` or `num_train_epochs`.",
                state.global_step,
                state.max_steps,
                self._resumed_from,
            )

    def complete_log(self, logs: dict[str, Any]) -> None:
        """Put the metrics of the end into the host's final log of a run that had ended before."""
        if self._earlier is not None and "train_runtime" in logs:
            logs.update(self._earlier.metrics)

    def conclude(
        self, output: Any, outcome: RunOutcome, *, gave_up: bool = False, interrupted_by: str | None = None
    ) -> Any:
        """Note how the run ended.

        Args:
            output: What the host's ``train()`` returns.
            outcome: What was decided in the run.
            gave_up: Whether rollbacks did not help.
            interrupted_by: The signal that ended the run, if one did.

        Returns:
            ``output``, or what the run returned when it ended, if it had ended before.
        """
        if not self._is_active:
            return output
        if self.had_come:
            earlier = self._earlier
            if earlier is None:
                return output
            loss = math.nan if earlier.train_loss is None else earlier.train_loss
            return output._replace(global_step=earlier.step, training_loss=loss)
        if self._ranks.rank == 0:
            try:
                write_outcome(self._ledger.run_dir, self._end(output, outcome, gave_up, interrupted_by))
            except (OSError, ValueError, TypeError) as error:
                logger.warning("How the run ended could not be noted (%s).", error)
        return output

    def _end(self, output: Any, outcome: RunOutcome, gave_up: bool, interrupted_by: str | None) -> RunEnd:
        state = self._host.state
        finding = outcome.stopped_by
        status: Status = "finished" if state.global_step >= state.max_steps else "ended_early"
        if interrupted_by is not None:
            status = "interrupted"
        if finding is not None:
            status = "stopped"
        if gave_up:
            status = "gave_up"
        good = self._ledger.last_good(state.global_step + 2 if finding is None else finding.onset_step)
        loads = self._host.args.load_best_model_at_end and state.best_model_checkpoint is not None
        loads = loads and interrupted_by is None
        return RunEnd(
            status=status,
            step=state.global_step,
            max_steps=state.max_steps,
            run_id=self._ledger.run_id,
            time=time.time(),
            train_loss=float(output.training_loss),
            reason=outcome.stop_reason or interrupted_by,
            resume_from=None if good is None else good.path,
            loaded=os.path.basename(state.best_model_checkpoint) if loads else None,
            metrics=dict(output.metrics),
        )
