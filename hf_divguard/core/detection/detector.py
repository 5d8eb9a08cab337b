"""What a detection rule is: a fold over ``(step, value)`` that sometimes has a finding.

A rule knows nothing of trainers, files, clocks or logs, and nothing of what happens
after a finding. Its whole memory is in its ``state_dict``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from hf_divguard.core.findings import Finding

__all__ = ["Rule", "StepValues", "non_finite_finding"]


@runtime_checkable
class Rule(Protocol):
    """A detection rule over one series.

    Non-finite values never enter a rule's statistics.
    """

    metric: str
    """Log key of the series that the rule is fed; used in its messages."""

    def observe(self, step: int, value: float) -> Finding | None:
        """Feed one value; return a finding if the rule has one.

        Args:
            step: Optimizer step the value belongs to. Never decreases.
            value: The value. NaN and infinities are allowed.
        """
        ...

    def reset(self) -> None:
        """Forget everything that was observed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of the rule as JSON values (no settings)."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory that ``state_dict`` returned. Settings stay as constructed.

        Raises:
            ValueError: If the state does not fit this rule; the rule is left as it was.
        """
        ...


def non_finite_finding(metric: str, step: int, value: float) -> Finding:
    """Return the finding for a NaN or infinite value.

    Example:
        >>> print(non_finite_finding("loss", 7, float("nan")))
        `loss` = nan at step 7 is not a finite number.
    """
    assert not math.isfinite(value)
    return Finding(
        step=step,
        onset_step=step,
        kind="non_finite",
        severity="error",
        metric=metric,
        value=value,
        limit=None,
        message=f"`{metric}` = {value} at step {step} is not a finite number.",
    )


@dataclass(frozen=True, slots=True)
class StepValues:
    """What one optimizer step showed.

    Args:
        step: The step, counted as ``TrainerState.global_step`` after it.
        loss: Its training loss: the micro-batches of the step together, the mean over all
            ranks. Not filtered; NaN on any rank makes it NaN.
        grad_norm: Norm of the gradient before clipping, the mean over all ranks; ``None``
            where the host has none.
    """

    step: int
    loss: float
    grad_norm: float | None
