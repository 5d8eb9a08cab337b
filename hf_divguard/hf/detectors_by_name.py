"""The detector that the command-line flags ask for."""

from __future__ import annotations

from typing import Any

from hf_divguard.hf.adaptive_detectors import AdaptiveDivergenceDetector, NonFiniteDetector
from hf_divguard.hf.detectors import DivergenceDetector
from hf_divguard.hf.dual_detectors import DualTimeScaleDivergenceDetector, DualWindowDivergenceDetector

__all__ = ["DETECTORS", "make_detector"]

DETECTORS: dict[str, Any] = {
    "adaptive": AdaptiveDivergenceDetector,
    "ema": DualTimeScaleDivergenceDetector,
    "window": DualWindowDivergenceDetector,
    "nonfinite": NonFiniteDetector,
}
"""Detector classes by the names that ``divguard_detector`` takes."""


def make_detector(options: Any) -> DivergenceDetector | None:
    """Return the detector that ``options.divguard_detector`` names, ``None`` for ``"none"``."""
    if options.divguard_detector == "none":
        return None
    detector: DivergenceDetector = DETECTORS[options.divguard_detector](
        action=options.divguard_action,
        metric_key=options.divguard_metric_key,
        **options.divguard_detector_kwargs or {},
    )
    return detector
