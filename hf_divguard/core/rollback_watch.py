"""What the raw losses say about rolling back: a deep setback, a fault that lasts on, one that has passed."""

from __future__ import annotations

import math
from typing import Any

from hf_divguard.core.findings import Finding
from hf_divguard.core.recovery import RecoveryCheck
from hf_divguard.core.rollback_policy import TRAINED_THROUGH, RollbackPolicy
from hf_divguard.core.setback import SETBACK, SetbackCheck

__all__ = ["RollbackWatch"]


class RollbackWatch:
    """Asks for a rollback where the detectors do not, or must not.

    In a cool-down findings are ignored, but the loss is not. At its end, and where
    training ends within it, the run is judged:

    - If the last losses are above what was ordinary before the fault, the fault has not
      passed: another rollback. After a setback only if the restored weights were good at
      first: where they never were, it is the data that became harder.
    - If they are back but were not at some time, the restored state has been trained
      through the rest of the fault, and what it took from that stays for long: it is put
      back once more, now that the way is free, unless that were the last attempt's end.

    Outside of incidents a setback that a detector lets heal is asked to be undone once.

    Args:
        policy: Knows the incidents and the attempts.
        minds_setbacks: Whether setbacks are asked to be undone.
    """

    def __init__(self, policy: RollbackPolicy, *, minds_setbacks: bool) -> None:
        self._policy = policy
        self._minds_setbacks = minds_setbacks
        self._recovery = RecoveryCheck()
        self._setback = SetbackCheck()
        self._setback_found: Finding | None = None
        self._was_setback = False

    def observe(self, step: int, loss: float) -> None:
        """Take the raw loss of a step."""
        self._recovery.observe(step, loss)
        if not self._policy.is_muted(step):
            self._setback_found = self._setback.observe(step, loss) or self._setback_found

    def judge(self, step: int, *, is_last: bool) -> Finding | None:
        """Return why to go back, if there is a reason.

        Args:
            step: Present step.
            is_last: Whether training ends here.
        """
        finding, self._setback_found = self._setback_found, None
        if not self._minds_setbacks or self._policy.is_open(step):
            finding = None
        if self._recovery.is_judging and (is_last or not self._policy.is_muted(step)):
            finding = self._judge_recovery(step) or finding
            self._recovery.end()
        return finding

    def _judge_recovery(self, step: int) -> Finding | None:
        check = self._recovery
        level, limit = check.level(), math.inf if check.limit is None else check.limit
        if not check.has_recovered():
            if self._was_setback and not check.began_well() and level is not None and math.isfinite(level):
                # The good weights do no better on these data, and no detector calls it a divergence: let it heal.
                return None
            kind = "not_recovered"
            above = (
                "not finite" if limit == math.inf else f"above the limit {limit:.4g} from before the fault"
            )
            message = f"`loss` has not recovered by step {step}: the median of its last values is {level:.4g}, {above}."
        elif check.was_ever_bad() and self._policy.may_try_again():
            kind = TRAINED_THROUGH
            message = (
                f"The fault lasted on after the rollback and has passed by step {step}: `loss` was above the limit "
                f"{limit:.4g} from before the fault and is back at {level:.4g}."
            )
        else:
            return None
        return Finding(
            step=step,
            onset_step=check.first_bad_step() or step,
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

    def go_back(self, target_step: int, step: int, finding: Finding) -> None:
        """Note a rollback at ``step`` to ``target_step`` because of ``finding``; begin to judge it."""
        self._recovery.go_back(target_step, step)
        self._setback.go_back(target_step)
        self._setback_found = None
        self._was_setback = finding.kind == SETBACK

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as JSON values."""
        return {
            "recovery": self._recovery.state_dict(),
            "setback": self._setback.state_dict(),
            "was_setback": self._was_setback,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory.

        Raises:
            ValueError: If it cannot be read.
        """
        try:
            self._recovery.load_state_dict(state_dict["recovery"])
            self._setback.load_state_dict(state_dict["setback"])
            self._was_setback = bool(state_dict["was_setback"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"The memory of rollbacks cannot be read: {error!r}.") from error
