"""What a detection rule is: a fold over ``(step, value)`` that sometimes returns a finding.

A rule knows nothing of trainers, files, clocks or logs, and nothing of what happens
after a finding. Its complete memory is in its ``state_dict``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from hf_divguard.core.findings import Finding

__all__ = ["GraceRule", "IncidentRule", "Rule", "StepValues", "check_setting", "non_finite_finding"]


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


@runtime_checkable
class Rule(Protocol):
    """A detection rule over one series.

    Non-finite values never enter a rule's statistics.
    """

    metric_key: str
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
            StateError: If the state does not fit this rule; the rule is left as it was.
        """
        ...


@runtime_checkable
class IncidentRule(Rule, Protocol):
    """A rule that reports a condition once and stays silent while it lasts."""

    @property
    def is_open(self) -> bool:
        """Whether the condition of the last error finding lasts."""
        ...

    def end_incident(self) -> None:
        """Report a condition that lasts once more."""
        ...


@runtime_checkable
class GraceRule(Rule, Protocol):
    """A rule that keeps bad values out of its baseline, so that the baseline survives a rollback."""

    def start_grace(self, values: int | None = None) -> None:
        """Keep the baseline, drop what is suspected, and judge no rise for a number of values.

        Args:
            values: How many, at least 0; ``None`` takes the rule's own number.
        """
        ...


def non_finite_finding(metric_key: str, step: int, value: float) -> Finding:
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
        metric=metric_key,
        value=value,
        limit=None,
        message=f"`{metric_key}` = {value} at step {step} is not a finite number.",
    )


def check_setting(
    detector: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: int | None = None,
    at_most: float = math.inf,
    unit: str = "",
) -> None:
    """Raise unless a setting is a finite number in its range.

    Args:
        detector: Name of the detector, for the message.
        name: Name of the setting.
        value: Its value.
        above: Bound that the value must exceed.
        at_least: Smallest value of a setting that is counted.
        at_most: Largest value.
        unit: What is counted. A setting with a unit must be a whole number.

    Raises:
        TypeError: If ``value`` is not a number of the right type.
        ValueError: If it is out of range.

    Example:
        >>> check_setting("ema", "threshold", None, above=0)
        Traceback (most recent call last):
        ...
        TypeError: `threshold` must be a number, got None (detector 'ema').
    """
    got = f"got {value!r} (detector {detector!r})."
    if isinstance(value, bool) or not isinstance(value, int if unit else (int, float)):
        raise TypeError(f"`{name}` must be a {f'whole number of {unit}s' if unit else 'number'}, {got}")
    if at_least is not None and value < at_least:
        raise ValueError(f"`{name}` must be at least {at_least} {unit}{'s' * (at_least != 1)}, {got}")
    if above is not None and not (above < value <= at_most and math.isfinite(value)):
        limit = (
            "a finite number above 0" if at_most == math.inf else f"above {above:g} and at most {at_most:g}"
        )
        raise ValueError(f"`{name}` must be {limit}, {got}")
