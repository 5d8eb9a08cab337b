"""The run's outcome on the host's ``TrainerState`` and ``TrainerControl``.

The only file that assigns the switches of the control.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerState

from hf_divguard.core.findings import Finding
from hf_divguard.core.outcome import Action, RunOutcome
from hf_divguard.hf.ranks import Ranks

__all__ = [
    "GuardedState",
    "apply",
    "cancel_end",
    "end_training",
    "enforce_abort",
    "is_world_zero",
    "mark_run_output",
    "merge_over_ranks",
    "merge_switches",
    "outcome_of",
    "request_evaluation_before_save",
    "request_log",
    "request_save",
    "save_and_end",
    "saves_checkpoints",
    "saves_on_sigterm",
    "suspend_save",
]

logger = logging.getLogger(__name__)

# ---- on the state


class GuardedState:
    """What ``trainer.state`` says of divergence. All of it is read-only, and set on a healthy run too.

    It is mixed into the class of the host's state when a guard first sees it. Nothing of it
    is a field: ``trainer_state.json`` stays as the host writes it.
    """

    _divguard_outcome: RunOutcome

    @property
    def divguard_finding(self) -> Finding | None:
        """The finding that ended the run; ``None`` if none did."""
        return self._divguard_outcome.finding

    @property
    def divguard_stop_reason(self) -> str | None:
        """The action and the sentence of that finding, ``"stop: ..."``; ``None`` if the run was not ended."""
        return self._divguard_outcome.stop_reason

    @property
    def divguard_aborted(self) -> bool:
        """Whether the run was ended without a further save."""
        return self._divguard_outcome.is_aborted

    @property
    def divguard_muted_until(self) -> int:
        """Last step in which findings are ignored after a rollback; -1 if there was none."""
        return self._divguard_outcome.muted_until


class _GuardedTrainerState(GuardedState, TrainerState):
    pass


_guarded_classes: dict[type, type] = {TrainerState: _GuardedTrainerState}


def _guarded(kind: Any) -> Any:
    if kind not in _guarded_classes:
        _guarded_classes[kind] = type(
            f"Guarded{kind.__name__}", (GuardedState, kind), {"__module__": __name__}
        )
    return _guarded_classes[kind]


def outcome_of(state: Any) -> RunOutcome:
    """Return the outcome of the run that ``state`` belongs to; the same object for the same state.

    Args:
        state: The ``TrainerState``. Without one (a detector that is used by hand) each call
            returns a new outcome.

    Example:
        >>> state = TrainerState()
        >>> outcome_of(state) is outcome_of(state), state.divguard_finding
        (True, None)
    """
    if state is None:
        return RunOutcome()
    held: RunOutcome | None = getattr(state, "_divguard_outcome", None)
    if not isinstance(held, RunOutcome):
        held = RunOutcome()
        state._divguard_outcome = held
        if isinstance(state, TrainerState):
            state.__class__ = _guarded(type(state))
    return held


def is_world_zero(state: Any) -> bool:
    """Return whether this process logs for the run; without a state it does."""
    return bool(getattr(state, "is_world_process_zero", True))


def mark_run_output(state: Any, logs: dict[str, Any] | None) -> None:
    """Write into the final log, which is also the run's output, that the run did not finish normally."""
    if logs and "train_runtime" in logs and outcome_of(state).finding is not None:
        logs["divguard/finished"] = 0
        logs["divguard/stopped_at_step"] = state.global_step


# ---- on the control


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


def saves_on_sigterm(args: Any, control: Any) -> bool:
    """Return whether the host ends training to save on SIGTERM by itself, where it saves outside of a step's end."""
    return bool(getattr(args, "enable_jit_checkpoint", False) and control.should_training_stop)


def end_training(control: Any) -> None:
    """Let training end."""
    control.should_training_stop = True


def save_and_end(control: Any) -> None:
    """Have this step saved, and let training end with it."""
    control.should_save = control.should_training_stop = True


def cancel_end(control: Any) -> None:
    """Let training go on after a callback asked for its end."""
    control.should_training_stop = False


_SWITCHES = ("should_log", "should_evaluate", "should_save", "should_training_stop", "should_epoch_stop")


def merge_switches(ranks: Ranks, control: Any) -> None:
    """Make what a callback of one rank asks for at the end of a step take place on all ranks. Called by all of them."""
    wishes = ranks.any_of([bool(getattr(control, name)) for name in _SWITCHES])
    for name, wish in zip(_SWITCHES, wishes, strict=True):
        setattr(control, name, wish)


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
