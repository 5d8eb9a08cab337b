"""What a rule returns: one finding, with its numbers and its sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["SEVERITIES", "Cause", "Finding", "Kind", "Severity", "json_number", "rise_in_words"]

Severity = Literal["note", "warning", "error"]
"""``note`` is only recorded, ``warning`` is logged, ``error`` is acted on."""

SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")

Kind = Literal[
    # of single values
    "non_finite",
    "nan_filtered",
    "scaler_skip",
    "spike",
    # of the level of a series
    "jump",
    "drop",
    "climb",
    "plateau",
    "eval_climb",
    "grad_explosion",
    # of weights that are worse than kept ones
    "damage",
    # of a run that can be rolled back
    "setback",
    "not_recovered",
    "rollback_repeated",
]
"""What a finding can be about. ``docs/detectors.md`` and ``docs/rollback.md`` describe each kind."""


Cause = Literal["weights", "data", "unknown"]
"""Where a high loss comes from: ``docs/comparison.md``."""


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """One thing a rule saw in a series, with the numbers that show it.

    Args:
        step: Optimizer step (``TrainerState.global_step``) at which the rule was sure.
        onset_step: Estimated first step with a bad training loss, at most ``step``: the
            step after the last one known to be good. A rollback needs a checkpoint that is
            at least two steps older.
        kind: What was seen, in one word: ``"non_finite"``, ``"jump"``, ``"climb"``...
        severity: ``"note"``, ``"warning"`` or ``"error"``. Only an error is acted on.
        metric: Log key of the series (``"loss"``, ``"grad_norm"``, ``"eval_loss"``).
        value: The value that decided it. May be NaN or infinite.
        limit: The bound that ``value`` broke, in the units of ``value``; ``None`` where
            the finding has no bound (a non-finite value).
        message: One sentence for a person, made from the numbers above.
        evidence: Further numbers behind the decision, by name.
        cause: Whether the weights are damaged or the data have changed; ``None`` where that
            was not looked into.

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
    kind: Kind
    severity: Severity
    metric: str
    value: float
    limit: float | None
    message: str
    evidence: Mapping[str, float | int | str] = field(default_factory=dict)
    cause: Cause | None = None

    def __str__(self) -> str:
        return self.message

    def __eq__(self, other: object) -> bool:
        # NaN equals NaN here, which the generated comparison of Python 3.13 denies.
        return self.to_dict() == other.to_dict() if isinstance(other, Finding) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.step, self.onset_step, self.kind, self.metric, self.message))

    @property
    def rests_on_finite_loss(self) -> bool:
        """Whether a comparison of losses can say anything about it."""
        is_finite = math.isfinite(self.value) and self.kind not in ("non_finite", "nan_filtered")
        return self.metric == "loss" and is_finite

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
            "cause": self.cause,
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


def rise_in_words(before: float, now: float, progress: float) -> str:
    """Return how much of the progress a rise has cost, or by what factor it exceeds all of it.

    Example:
        >>> rise_in_words(2.0, 3.0, 4.0), rise_in_words(0.2, 860.0, 4.0)
        ('25% of the progress lost', '4,300 times its earlier level')
    """
    if progress > 0.0 and now - before <= 10.0 * progress:
        return f"{(now - before) / progress:.0%} of the progress lost"
    if before > 0.0 and now >= 10.0 * before:
        return f"{_rounded(now / before)} times its earlier level"
    return f"{_rounded((now - before) / progress)} times the progress lost" if progress > 0.0 else ""


def _rounded(factor: float) -> str:
    return f"{float(f'{factor:.2g}'):,.0f}" if factor < 1e6 else f"{factor:.1e}"
