"""What a rule returns: one finding, with its numbers and its sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["SEVERITIES", "Finding", "Severity", "json_number"]

Severity = Literal["note", "warning", "error"]
"""``note`` is only recorded, ``warning`` is told, ``error`` is acted on."""

SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a rule saw in a series, with the numbers that show it.

    Args:
        step: Optimizer step (``TrainerState.global_step``) at which the rule was sure.
        onset_step: Estimated first step with a bad training loss, at most ``step``: the
            step after the last one known to be sound. A rollback has to go back to a
            checkpoint that is at least two steps older.
        kind: What was seen, in one word: ``"non_finite"``, ``"jump"``, ``"climb"``...
        severity: ``"note"``, ``"warning"`` or ``"error"``. Only an error is acted on.
        metric: Log key of the series (``"loss"``, ``"grad_norm"``, ``"eval_loss"``).
        value: The value that decided it. May be NaN or infinite.
        limit: The bound that ``value`` broke, in the units of ``value``; ``None`` where
            the finding has no bound (a non-finite value).
        message: One sentence for a person, made from the numbers above.
        evidence: Further numbers behind the decision, by name.

    Example:
        >>> finding = Finding(step=120, onset_step=118, kind="jump", severity="error",
        ...                   metric="loss", value=9.0, limit=2.4,
        ...                   message="`loss` = 9 at step 120 is above its limit 2.4.")
        >>> print(finding)
        `loss` = 9 at step 120 is above its limit 2.4.
        >>> finding.to_dict()["onset_step"]
        118
    """

    step: int
    onset_step: int
    kind: str
    severity: Severity
    metric: str
    value: float
    limit: float | None
    message: str
    evidence: Mapping[str, float | int | str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as strict JSON values: NaN and infinities become strings."""
        return {
            "step": self.step,
            "onset_step": self.onset_step,
            "kind": self.kind,
            "severity": self.severity,
            "metric": self.metric,
            "value": json_number(self.value),
            "limit": None if self.limit is None else json_number(self.limit),
            "message": self.message,
            "evidence": {
                key: json_number(entry) if isinstance(entry, float) else entry
                for key, entry in self.evidence.items()
            },
        }


def json_number(value: float) -> float | str:
    """Return ``value`` as strict JSON can hold it: ``"NaN"``, ``"Infinity"``, ``"-Infinity"`` as strings.

    Example:
        >>> json_number(1.5), json_number(float("-inf"))
        (1.5, '-Infinity')
    """
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
