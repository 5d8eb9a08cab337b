"""From a finding to what happens to the run: the only place that touches ``control``."""

from __future__ import annotations

import logging
from typing import Any, Literal, get_args

from hf_divguard.core.findings import Finding
from hf_divguard.storage.quarantine import quarantine_note
from hf_divguard.storage.record import Quarantine

__all__ = [
    "Action",
    "act_on",
    "check_action",
    "is_muted",
    "is_world_zero",
    "keep_aborted",
    "mark_run_output",
    "saves_checkpoints",
    "spoilt_note",
]

logger = logging.getLogger(__name__)

Action = Literal["warn", "stop", "abort", "rollback"]

_SPOILS_WEIGHTS = frozenset({"non_finite", "nan_filtered"})

_CONSEQUENCE = {
    "warn": "Training goes on.",
    "stop": "Training stops after this step's log, evaluation and save.",
    "abort": "Training ends now and nothing more is saved.",
}


def check_action(action: str) -> None:
    """Raise ``ValueError`` unless ``action`` is one of the known ones."""
    if action not in get_args(Action):
        raise ValueError(f"`action` must be one of {list(get_args(Action))}, got {action!r}.")


def saves_checkpoints(args: Any) -> bool:
    """Return whether the arguments ask for checkpoints at all."""
    strategy = getattr(args, "save_strategy", None)
    return bool(getattr(strategy, "value", strategy) != "no")


def is_world_zero(state: Any) -> bool:
    """Return whether this process speaks for the run; without a state it does."""
    return bool(getattr(state, "is_world_process_zero", True))


def act_on(finding: Finding, action: str, args: Any, state: Any, control: Any, *, source: str) -> None:
    """Carry out ``action`` for ``finding`` on ``control``, and tell it once at rank 0.

    ``stop`` lets the step that is under way finish: its log, an evaluation and a save
    take place. ``abort`` cancels the save and the evaluation that may be due, and sets
    ``control.should_abort_without_save`` where the control has such a switch.

    Args:
        finding: What was found.
        action: ``"warn"``, ``"stop"``, ``"abort"`` or ``"rollback"``.
        args: The ``TrainingArguments``, or ``None`` outside of a Trainer.
        state: The ``TrainerState``, or ``None``; gets ``divguard_finding`` and
            ``divguard_stop_reason``.
        control: The ``TrainerControl`` to act on.
        source: Name of the detector, for the line.
    """
    if is_world_zero(state) and action != "rollback":  # a rollback tells its own story when it is done
        logger.warning("%s: %s %s", source, finding.message, _CONSEQUENCE[action])
    if action == "warn":
        return
    if action == "rollback":
        # `DivGuardTrainer` picks the request up at the end of the step; nothing is saved until then.
        if state is None:
            raise ValueError(
                "`action='rollback'` needs `DivGuardTrainer`; without a trainer use 'stop' or 'abort'."
            )
        if getattr(state, "divguard_rollback_request", None) is None:
            state.divguard_rollback_request = finding
        control.should_save = False
        return
    control.should_training_stop = True
    if state is not None and (action == "abort" or getattr(state, "divguard_finding", None) is None):
        # Plain attributes, not fields: `trainer_state.json` stays as the host writes it.
        state.divguard_finding = finding
        state.divguard_stop_reason = f"{action}: {finding.message}"
    if action == "abort":
        control.should_save = False
        control.should_evaluate = False
        if hasattr(control, "should_abort_without_save"):
            control.should_abort_without_save = True
        if state is not None:
            state.divguard_aborted = True
        return
    if saves_checkpoints(args):
        control.should_save = True
    eval_strategy = getattr(
        getattr(args, "eval_strategy", None), "value", getattr(args, "eval_strategy", "no")
    )
    if eval_strategy != "no" and not finding.metric.startswith("eval_"):
        control.should_evaluate = True


def is_muted(state: Any, step: int | None) -> bool:
    """Return whether findings are ignored at ``step``, shortly after a rollback."""
    return step is not None and step <= getattr(state, "divguard_muted_until", -1)


def spoilt_note(state: Any) -> Quarantine | None:
    """Return why what is saved now must never be resumed; ``None`` if nothing speaks against it.

    After a training loss or a gradient that was not finite the weights are not either. A
    stop has them saved all the same, to be looked into.
    """
    finding = getattr(state, "divguard_finding", None)
    if finding is None or finding.kind not in _SPOILS_WEIGHTS or finding.metric.startswith("eval_"):
        return None
    if finding.step <= getattr(state, "divguard_went_back_at", -1):
        return None  # another detector has had these weights put back
    return quarantine_note(finding.message, finding.onset_step)


def keep_aborted(state: Any, control: Any) -> None:
    """Take back a save or an evaluation that the host asked for after an abort."""
    if getattr(state, "divguard_aborted", False):
        control.should_save = False
        control.should_evaluate = False


def mark_run_output(state: Any, logs: dict[str, Any] | None) -> None:
    """Write into the final log, which is also the run's output, that it did not finish normally."""
    finding = getattr(state, "divguard_finding", None)
    if finding is None or not logs or "train_runtime" not in logs:
        return
    logs["divguard/finished"] = 0
    logs["divguard/stopped_at_step"] = state.global_step
