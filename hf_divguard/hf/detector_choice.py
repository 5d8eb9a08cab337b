"""The detector that the command-line flags ask for."""

from __future__ import annotations

from typing import Any

from hf_divguard.hf.adaptive_detectors import AdaptiveDivergenceDetector, NonFiniteDetector
from hf_divguard.hf.detectors import (
    DivergenceDetector,
    DualTimeScaleDivergenceDetector,
    DualWindowDivergenceDetector,
)

__all__ = ["DETECTORS", "make_detector"]

DETECTORS: dict[str, Any] = {
    "adaptive": AdaptiveDivergenceDetector,
    "ema": DualTimeScaleDivergenceDetector,
    "window": DualWindowDivergenceDetector,
    "nonfinite": NonFiniteDetector,
}
"""Detector classes by the names that ``divguard_detector`` takes."""

_TAKE_TEXT = ("eval_severity", "name")


def make_detector(options: Any) -> DivergenceDetector | None:
    """Return the detector that ``options.divguard_detector`` names, ``None`` for ``"none"``.

    Raises:
        ValueError: If it refuses its settings.
        TypeError: If it has no such setting, or a setting is of the wrong type.
    """
    if options.divguard_detector == "none":
        return None
    params = options.divguard_detector_params or {}
    words = {
        name: value for name, value in params.items() if isinstance(value, str) and name not in _TAKE_TEXT
    }
    if words:
        name, value = next(iter(words.items()))
        raise TypeError(f"`{name}` in `divguard_detector_params` must not be a text, got {value!r}.")
    detector: DivergenceDetector = DETECTORS[options.divguard_detector](
        action=options.divguard_action, metric_key=options.divguard_metric, **params
    )
    return detector
