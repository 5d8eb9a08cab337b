"""The rules by name, so that flags, replays and tests make them alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hf_divguard.core.detection.adaptive import AdaptiveRule
from hf_divguard.core.detection.detector import Rule
from hf_divguard.core.detection.ema import DualTimeScaleRule
from hf_divguard.core.detection.nonfinite import NonFiniteRule
from hf_divguard.core.detection.window import DualWindowRule

__all__ = ["RULES", "make_rule", "rule_parameters"]

RULES: dict[str, Callable[..., Rule]] = {
    rule.name: rule for rule in (AdaptiveRule, DualTimeScaleRule, DualWindowRule, NonFiniteRule)
}
"""Every rule, by the name that flags and replays use."""


def rule_parameters(name: str) -> dict[str, Any]:
    """Return the parameters of a rule with their defaults, without ``metric_key``.

    Raises:
        ValueError: If there is no such rule.

    Example:
        >>> rule_parameters("window")["long_window"]
        100
        >>> rule_parameters("emma")
        Traceback (most recent call last):
        ...
        ValueError: There is no detector 'emma'. There are: adaptive, ema, window, nonfinite.
    """
    if name not in RULES:
        raise ValueError(f"There is no detector {name!r}. There are: {', '.join(RULES)}.")
    parameters = inspect.signature(RULES[name]).parameters.values()
    return {entry.name: entry.default for entry in parameters if entry.name != "metric_key"}


def make_rule(name: str, *, metric_key: str = "loss", **kwargs: Any) -> Rule:
    """Make the rule called ``name``.

    Args:
        name: ``adaptive``, ``ema``, ``window`` or ``nonfinite``.
        metric_key: Log key of the series the rule will be fed.
        kwargs: Parameters of the rule; those not given keep their defaults.

    Raises:
        ValueError: If there is no such rule, or a parameter has a value the rule refuses.
        TypeError: If the rule has no such parameter, or one is of the wrong type.

    Example:
        >>> make_rule("ema", threshold=1.0).metric_key
        'loss'
        >>> make_rule("nonfinite", threshold=1.0)
        Traceback (most recent call last):
        ...
        TypeError: The detector 'nonfinite' has no parameter 'threshold'. It has: scaler_patience.
    """
    known = rule_parameters(name)
    unknown = sorted(kwargs.keys() - known.keys())
    if unknown:
        raise TypeError(
            f"The detector {name!r} has no parameter {', '.join(map(repr, unknown))}. It has: {', '.join(known)}."
        )
    return RULES[name](metric_key=metric_key, **kwargs)
