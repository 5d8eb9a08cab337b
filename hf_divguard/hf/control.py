"""The run's outcome, applied to the ``TrainerControl``: the only file that assigns its switches."""

from __future__ import annotations

import logging
from typing import Any

from hf_divguard.core.findings import Finding
from hf_divguard.core.outcome import Action, RunOutcome
from hf_divguard.hf.ranks import Ranks

__all__ = [
    "apply",
    "cancel_end",
    "enforce_abort",
    "merge_over_ranks",
    "request_evaluation_before_save",
    "request_log",
    "request_save",
    "saves_checkpoints",
    "suspend_save",
]

logger = logging.getLogger(__name__)


def saves_checkpoints(args: Any) -> bool:
    """Return whether the arguments ask for checkpoints at all."""
    return _strategy(args, "save_strategy") != "no"


def _strategy(args: Any, name: str) -> str | None:
    strategy = getattr(args, name, None)
    return getattr(strategy, "value", strategy)


def apply(outcome: RunOutcome, finding: Finding, action: Action, args: Any, control: Any) -> None:
    """Switch ``control`` as ``action`` asks for.

    ``stop`` lets the present step finish: its log, an evaluation and a save take place.
    ``abort`` cancels a save and an evaluation that are due, and sets
    ``control.should_abort_without_save`` where the control has such a switch. ``rollback``
    holds the save back until the rollback is done.

    Args:
        outcome: What was decided in this run, ``finding`` included.
        finding: What was found.
        action: ``"warn"``, ``"stop"``, ``"abort"`` or ``"rollback"``.
        args: The ``TrainingArguments``, or ``None`` outside of a Trainer.
        control: The ``TrainerControl``.
    """
    if action == "warn":
        return
    if action == "rollback":
        control.should_save = False
        return
    control.should_training_stop = True
    if outcome.is_aborted:
        enforce_abort(outcome, control)
        return
    if saves_checkpoints(args):
        control.should_save = True
    if _strategy(args, "eval_strategy") not in (None, "no") and not finding.metric.startswith("eval_"):
        control.should_evaluate = True


def enforce_abort(outcome: RunOutcome, control: Any) -> None:
    """Cancel a save or an evaluation that something asked for after an abort."""
    if not outcome.is_aborted:
        return
    control.should_training_stop = True
    control.should_save = control.should_evaluate = False
    if hasattr(control, "should_abort_without_save"):
        control.should_abort_without_save = True


def suspend_save(control: Any) -> None:
    """Cancel the save of this step."""
    control.should_save = False


def request_save(control: Any, wanted: bool) -> None:
    """Set whether this step is saved."""
    control.should_save = wanted


def request_log(control: Any) -> None:
    """Have this step logged."""
    control.should_log = True


def request_evaluation_before_save(control: Any, *, is_evaluated: bool) -> None:
    """Have a step that is saved evaluated first, once."""
    if is_evaluated:
        control.should_evaluate = False
    elif control.should_save:
        control.should_evaluate = True


def cancel_end(control: Any) -> None:
    """Let training go on after a callback asked for its end."""
    control.should_training_stop = False


def merge_over_ranks(ranks: Ranks, outcome: RunOutcome, control: Any) -> None:
    """Make a stop, an abort, a save or a rollback that one rank asks for take place on all ranks.

    ``compute_metrics`` may give each rank another value. A rank that stopped or saved alone
    would leave the others waiting. Called by all ranks.
    """
    if ranks.world_size == 1:
        return
    had_reason = outcome.stop_reason is not None
    wishes = ranks.gather((outcome, bool(control.should_training_stop), bool(control.should_save)))
    outcome.merge([theirs for theirs, _, _ in wishes])
    if outcome.stop_reason is not None and not had_reason and ranks.rank == 0:
        logger.warning("Another rank has asked for the end of training. %s", outcome.stop_reason)
    control.should_training_stop = any(stops for _, stops, _ in wishes)
    control.should_save = any(saves for _, _, saves in wishes)
    enforce_abort(outcome, control)
    if not outcome.may_save:
        control.should_save = False
