"""What updates that were left out, because their loss or gradient was not finite, mean for a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hf_divguard.core.findings import Finding, Kind
from hf_divguard.core.state import Stateful, memory

__all__ = ["SKIPPED", "SkippedUpdates"]

SKIPPED = "updates_skipped"
"""Key in the evidence of a finding whose update was left out: the number of such updates in a row."""

_DAMAGES: frozenset[Kind] = frozenset({"non_finite", "nan_filtered"})


@dataclass
class SkippedUpdates(Stateful):
    """Turn a non-finite value that has changed no weight into a warning, and a series of them into an error.

    Args:
        max_in_a_row: Updates that may be left out one after the other, at least 1. With the
            next one the finding is an error.
        counts_gradients: Whether a gradient that is not finite counts. Not with a loss
            scaler, which finds its scale by such gradients.

    Example:
        >>> skipped, nan = SkippedUpdates(max_in_a_row=1), float("nan")
        >>> print(skipped.judge(7, nan, nan, None), skipped.judge(8, nan, nan, None), sep="\\n")
        None
        2 updates in a row up to step 8 were skipped, because the loss or the gradient was not finite (at most 1).
    """

    max_in_a_row: int = 10
    counts_gradients: bool = True
    in_a_row: int = memory(0)
    _since: int = memory(0)

    def judge(self, step: int, loss: float, grad_norm: float | None, found: Finding | None) -> Finding | None:
        """Return what is to be reported of a step.

        Args:
            step: The step.
            loss: Its loss.
            grad_norm: Its gradient norm, or ``None``.
            found: What the rule found in it.
        """
        bad_gradient = self.counts_gradients and grad_norm is not None and not math.isfinite(grad_norm)
        if math.isfinite(loss) and not bad_gradient:
            self.in_a_row = 0
            return found
        self._since = self._since if self.in_a_row else step
        self.in_a_row += 1
        if self.in_a_row == self.max_in_a_row + 1:
            return self._lasting(step, loss)
        if found is None or found.kind not in _DAMAGES or found.severity != "error":
            return found
        return replace(
            found,
            severity="warning",
            message=f"{found.message} The update was skipped, so the weights are unharmed.",
            evidence={**found.evidence, SKIPPED: self.in_a_row},
        )

    def _lasting(self, step: int, loss: float) -> Finding:
        message = (
            f"{self.in_a_row} updates in a row up to step {step} were skipped, because the loss or the gradient was not "
            f"finite (at most {self.max_in_a_row})."
        )
        return Finding(
            step=step,
            onset_step=self._since,
            kind="non_finite",
            severity="error",
            metric="loss",
            value=loss,
            limit=None,
            message=message,
            evidence={SKIPPED: self.in_a_row},
        )
