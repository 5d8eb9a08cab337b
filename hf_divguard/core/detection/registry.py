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

__all__ = ["RULES", "make_rule", "rule_name", "rule_parameters"]

RULES: dict[str, Callable[..., Rule]] = {
    "adaptive": AdaptiveRule,
    "ema": DualTimeScaleRule,
    "window": DualWindowRule,
    "nonfinite": NonFiniteRule,
}
"""Every rule, by the name that flags and replays use."""

_DETECTOR_NAMES = {
    "AdaptiveDivergenceDetector": "adaptive",
    "DualTimeScaleDivergenceDetector": "ema",
    "DualWindowDivergenceDetector": "window",
    "NonFiniteDetector": "nonfinite",
}


def rule_name(name: str) -> str:
    """Return the short name for a rule or for the detector class built on it.

    Raises:
        ValueError: If there is no such rule.

    Example:
        >>> rule_name("ema"), rule_name("DualTimeScaleDivergenceDetector")
        ('ema', 'ema')
        >>> rule_name("emma")
        Traceback (most recent call last):
        ...
        ValueError: There is no detector 'emma'. There are: adaptive, ema, window, nonfinite.
    """
    short = _DETECTOR_NAMES.get(name, name)
    if short not in RULES:
        raise ValueError(f"There is no detector {name!r}. There are: {', '.join(RULES)}.")
    return short


def rule_parameters(name: str) -> dict[str, Any]:
    """Return the parameters of a rule with their defaults, ``metric`` left out.

    Example:
        >>> rule_parameters("window")["long_window"]
        100
    """
    parameters = inspect.signature(RULES[rule_name(name)]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "metric"}


def make_rule(name: str, *, metric: str = "loss", **params: Any) -> Rule:
    """Make the rule called ``name``.

    Args:
        name: ``adaptive``, ``ema``, ``window``, ``nonfinite``, or the name of a detector class.
        metric: Log key of the series the rule will be fed.
        params: Parameters of the rule; those not given keep their defaults.

    Raises:
        ValueError: If there is no such rule, or a parameter has a value the rule refuses.
        TypeError: If the rule has no such parameter, or it is a number there and a text here.

    Example:
        >>> make_rule("ema", threshold=1.0).metric
        'loss'
        >>> make_rule("nonfinite", threshold=1.0)
        Traceback (most recent call last):
        ...
        TypeError: The detector 'nonfinite' has no parameter 'threshold'. It has: scaler_patience.
    """
    known = rule_parameters(name)
    unknown = sorted(params.keys() - known.keys())
    if unknown:
        raise TypeError(
            f"The detector {name!r} has no parameter {', '.join(map(repr, unknown))}. It has: {', '.join(known)}."
        )
    for parameter, value in params.items():
        if isinstance(known[parameter], (int, float)) and isinstance(value, str):
            raise TypeError(f"`{parameter}` of the detector {name!r} must be a number, got {value!r}.")
    return RULES[rule_name(name)](metric=metric, **params)
