"""What losses and gradients say about rolling back: damage that may heal, a fault that lasts on, one that has passed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hf_divguard.core.detection.gradients import GRAD_EXPLOSION, Gradients
from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.policy import ROLLBACK_REPEATED, RollbackPolicy
from hf_divguard.core.rollback.recovery import RecoveryCheck
from hf_divguard.core.rollback.setback import SETBACK, SetbackCheck

__all__ = ["UNDONE_ONCE", "RollbackTriggers"]

UNDONE_ONCE = frozenset({SETBACK, GRAD_EXPLOSION})
"""Kinds of damage that a run may live with: one rollback if that is possible, and never the end of a run."""

# Gradient norms that tell what is usual: as many as ordinary losses tell it elsewhere.
_USUAL_NORMS = 100
# Steps without a large gradient after which an explosion has passed: as many as tell that it began.
_CALM_NORMS = 5


class RollbackTriggers:
    """Asks for a rollback where the detectors do not, or must not.

    In a cool-down findings are ignored, but the loss is not. At its end, and where
    training ends within it, the run is judged:

    - If the last losses are above what was ordinary before the fault, the fault has not
      passed: another rollback. After a setback only if the restored weights were good at
      first: where they never were, it is the data that became harder.
    - If they are back but were not at some time, the restored state has been trained
      through the rest of the fault, and what it took from that stays for long: it is put
      back once more, now that the way is free, unless that were the last attempt's end.
      Gradients that still exploded and no longer do count like losses that were not back.

    Outside of incidents it asks once to undo what a detector lets pass: a setback that may
    heal, and gradients a hundred times the usual that nothing clips. Those ruin the running
    averages of an optimizer for hundreds of steps, whether the loss shows it or not.

    Args:
        policy: Knows the incidents and the attempts.
        minds_setbacks: Whether setbacks are asked to be undone.
        minds_explosions: Whether exploding gradients are.
    """

    def __init__(
        self, policy: RollbackPolicy, *, minds_setbacks: bool, minds_explosions: bool = False
    ) -> None:
        self._policy = policy
        self._minds_setbacks = minds_setbacks
        self._minds_explosions = minds_explosions
        self._recovery = RecoveryCheck()
        self._setback = SetbackCheck()
        self._gradients = Gradients()
        self._damage: Finding | None = None
        self._exploded: list[int] = []
        self._may_heal = False

    def observe(self, step: int, loss: float, grad_norm: float | None = None) -> None:
        """Take the raw loss of a step, and its gradient norm before clipping if it is known."""
        self._recovery.observe(step, loss)
        norm = grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None
        if self._policy.is_muted(step):
            if norm is not None and self._minds_explosions and self._gradients.is_large(norm):
                self._exploded.append(step)
            return
        found = self._setback.observe(step, loss) if self._minds_setbacks else None
        if norm is not None:
            self._gradients.see(norm)
            explosion = self._gradients.judge(step)
            self._gradients.accept(norm, _USUAL_NORMS)
            if explosion is not None and self._minds_explosions:
                found = replace(explosion, severity="error")
        self._damage = found or self._damage

    def judge(self, step: int, *, is_last: bool) -> Finding | None:
        """Return why to go back, if there is a reason.

        Args:
            step: Present step.
            is_last: Whether training ends here.
        """
        finding, self._damage = self._damage, None
        if self._policy.is_open(step):
            finding = None
        if self._recovery.is_judging and (is_last or not self._policy.is_muted(step)):
            finding = self._judge_recovery(step) or finding
            self._recovery.end()
        return finding

    def _judge_recovery(self, step: int) -> Finding | None:
        check = self._recovery
        level, limit = check.level(), math.inf if check.limit is None else check.limit
        onset = check.first_bad_step() or step
        if not check.has_recovered():
            if self._may_heal and not check.began_well() and level is not None and math.isfinite(level):
                # The good weights do no better on these data, and no detector calls it a divergence: let it heal.
                return None
            kind = "not_recovered"
            above = (
                "not finite" if limit == math.inf else f"above the limit {limit:.4g} from before the fault"
            )
            message = f"`loss` has not recovered by step {step}: its last values are at {level:.4g}, {above}."
        elif check.was_ever_bad() and self._policy.may_try_again():
            kind = ROLLBACK_REPEATED
            message = (
                f"The fault lasted on after the rollback and has passed by step {step}: `loss` was above the limit "
                f"{limit:.4g} from before the fault and is back at {level:.4g}."
            )
        elif self._exploded and self._exploded[-1] < step - _CALM_NORMS and self._policy.may_try_again():
            kind, onset = ROLLBACK_REPEATED, self._exploded[0]
            message = (
                f"Gradients exploded on after the rollback, last at step {self._exploded[-1]}, and no longer do by "
                f"step {step}."
            )
        else:
            return None
        return Finding(
            step=step,
            onset_step=onset,
            kind=kind,
            severity="error",
            metric="loss",
            value=math.nan if level is None else level,
            limit=check.limit,
            message=message,
        )

    def sees_the_fault(self) -> bool:
        """Return whether the run is in a cool-down and its loss still says that the fault is there."""
        return self._recovery.is_judging and not self._recovery.has_recovered()

    def rewind(self, target_step: int, step: int, finding: Finding) -> None:
        """Note a rollback at ``step`` to ``target_step`` because of ``finding``; begin to judge it."""
        self._recovery.rewind(target_step, step)
        self._setback.rewind(target_step)
        self._gradients.forget_last()
        self._damage, self._exploded = None, []
        self._may_heal = finding.kind in UNDONE_ONCE

    def let_heal(self) -> None:
        """Note that damage which was asked to be undone has to be lived with."""
        self._setback.begin_anew()

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as JSON values."""
        return {
            "recovery": self._recovery.state_dict(),
            "setback": self._setback.state_dict(),
            "gradients": self._gradients.state_dict(),
            "exploded": list(self._exploded),
            "may_heal": self._may_heal,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory.

        Raises:
            ValueError: If it cannot be read.
        """
        try:
            self._recovery.load_state_dict(state_dict["recovery"])
            self._setback.load_state_dict(state_dict["setback"])
            self._gradients.load_state_dict(state_dict["gradients"])
            self._exploded = [int(step) for step in state_dict["exploded"]]
            self._may_heal = bool(state_dict["may_heal"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"The memory of rollbacks cannot be read: {error!r}.") from error
