"""Reasons for a rollback beside the detectors: damage that may recover, a fault that lasts, one that has passed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hf_divguard.core.detection.baseline import LONGEST_WINDOW
from hf_divguard.core.detection.gradients import Gradients
from hf_divguard.core.findings import Finding, Kind
from hf_divguard.core.rollback.policy import RollbackPolicy
from hf_divguard.core.rollback.recovery import RecoveryCheck
from hf_divguard.core.rollback.setback import SetbackCheck
from hf_divguard.core.state import Stateful, memory

__all__ = ["UNDONE_ONCE", "RollbackTriggers"]

UNDONE_ONCE: frozenset[Kind] = frozenset({"setback", "grad_explosion", "damage"})
"""Kinds of damage that a run may live with: one rollback if that is possible, and never the end of a run."""

# Steps without a large gradient after which an explosion has passed: as many as show that it began.
_CALM_NORMS = 5


@dataclass
class RollbackTriggers(Stateful):
    """Asks for a rollback where the detectors do not.

    In a cool-down findings are ignored, but the loss is not. At its end, and where
    training ends within it, the run is judged:

    - If the last losses are above the baseline from before the fault, the fault has not
      passed: another rollback. After a setback only if the restored weights were good at
      first: where they never were, the data have become harder.
    - If they have recovered but were bad at some time, the restored state has been trained
      through the rest of the fault, and its damage lasts: it is restored once more, unless
      that were the last attempt. Gradients that still exploded and no longer do count like
      losses that were bad.

    Outside of incidents it asks once to undo what a detector does not report: a setback
    that may recover, and gradients a hundred times their baseline that nothing clips. Those
    ruin the running averages of an optimizer for hundreds of steps, whether the loss shows
    it or not.

    Args:
        policy: Knows the incidents and the attempts.
        watches_setbacks: Whether setbacks are asked to be undone.
        watches_gradients: Whether exploding gradients are.
    """

    policy: RollbackPolicy
    watches_setbacks: bool = False
    watches_gradients: bool = False

    _recovery: RecoveryCheck = memory(RecoveryCheck)
    _setback: SetbackCheck = memory(SetbackCheck)
    _gradients: Gradients = memory(Gradients)
    _exploded: list[int] = memory(list)
    _may_recover: bool = memory(False)

    def __post_init__(self) -> None:
        self._damage: Finding | None = None

    def observe(self, step: int, loss: float, grad_norm: float | None = None) -> None:
        """Take the raw loss of a step, and its gradient norm before clipping if it is known."""
        if step <= self._recovery.since:
            return  # delivered after the rollback that has undone it
        self._recovery.observe(step, loss)
        norm = grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None
        if self.policy.is_muted(step):
            if norm is not None and self.watches_gradients and self._gradients.is_large(norm):
                self._exploded.append(step)
            return
        found = self._setback.observe(step, loss) if self.watches_setbacks else None
        if norm is not None:
            self._gradients.see(norm)
            explosion = self._gradients.judge(step)
            self._gradients.accept(norm, LONGEST_WINDOW)
            if explosion is not None and self.watches_gradients:
                found = replace(explosion, severity="error")
        self._damage = found or self._damage

    def judge(self, step: int, *, is_last: bool) -> Finding | None:
        """Return why to roll back, if there is a reason.

        Args:
            step: Present step.
            is_last: Whether training ends here.
        """
        finding, self._damage = self._damage, None
        if self.policy.is_open(step):
            finding = None
        if self._recovery.is_judging and (is_last or not self.policy.is_muted(step)):
            finding = self._judge_recovery(step) or finding
            self._recovery.end()
        return finding

    def _judge_recovery(self, step: int) -> Finding | None:
        check = self._recovery
        level, limit = check.level(), math.inf if check.limit is None else check.limit
        metric = "loss"
        onset = check.first_bad_step() or step
        if not check.has_recovered():
            if self._may_recover and not check.began_well() and level is not None and math.isfinite(level):
                # The good weights do no better on these data, and no detector calls it a divergence.
                return None
            kind: Kind = "not_recovered"
            above = (
                "not finite" if limit == math.inf else f"above the limit {limit:.4g} from before the fault"
            )
            message = f"`loss` has not recovered by step {step}: its last values are at {level:.4g}, {above}."
        elif check.was_ever_bad() and self.policy.may_try_again():
            kind = "rollback_repeated"
            message = (
                f"The fault lasted beyond the rollback and has passed by step {step}: `loss` was above the limit "
                f"{limit:.4g} from before the fault and is back at {level:.4g}."
            )
        elif self._exploded and self._exploded[-1] < step - _CALM_NORMS and self.policy.may_try_again():
            # They ruin the averages of the optimizer: no loss shows it.
            kind, onset, metric = "rollback_repeated", self._exploded[0], "grad_norm"
            message = (
                f"Gradients still exploded after the rollback, last at step {self._exploded[-1]}, and no longer do by "
                f"step {step}."
            )
        else:
            return None
        return Finding(
            step=step,
            onset_step=onset,
            kind=kind,
            severity="error",
            metric=metric,
            value=math.nan if level is None or metric != "loss" else level,
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
        self._may_recover = finding.kind in UNDONE_ONCE

    def accept_damage(self) -> None:
        """Note that damage which was asked to be undone stays."""
        self._setback.restart_baseline()
