"""The detector that the command-line flags ask for."""

from __future__ import annotations

import logging
from typing import Any

from hf_divguard.core.detection.registry import rule_parameters
from hf_divguard.hf.adaptive_detectors import AdaptiveDivergenceDetector, NonFiniteDetector
from hf_divguard.hf.detectors import DivergenceDetector
from hf_divguard.hf.dual_detectors import DualTimeScaleDivergenceDetector, DualWindowDivergenceDetector
from hf_divguard.hf.policy_gradients import policy_gradient_class

__all__ = ["DETECTORS", "make_detector"]

logger = logging.getLogger(__name__)

DETECTORS: dict[str, Any] = {
    "adaptive": AdaptiveDivergenceDetector,
    "ema": DualTimeScaleDivergenceDetector,
    "window": DualWindowDivergenceDetector,
    "nonfinite": NonFiniteDetector,
}
"""Detector classes by the names that ``divguard_detector`` takes."""


def make_detector(options: Any, trainer: Any = None) -> DivergenceDetector | None:
    """Return the detector that ``options.divguard_detector`` names, ``None`` for ``"none"``.

    With a trainer of policy gradients (GRPO, RLOO, PPO, ...) ``"adaptive"`` looks for values
    that are not finite only, unless ``divguard_metric_key`` names something else than the loss.

    Args:
        options: The options.
        trainer: The trainer that gets it.
    """
    name, settings = options.divguard_detector, dict(options.divguard_detector_kwargs or {})
    if name == "none":
        return None
    policy = policy_gradient_class(trainer)
    if name == "adaptive" and policy is not None and options.divguard_metric_key in (None, "loss"):
        name, known = "nonfinite", rule_parameters("nonfinite")
        unused = sorted(settings.keys() - known.keys())
        settings = {setting: value for setting, value in settings.items() if setting in known}
        logger.log(
            logging.WARNING if unused else logging.INFO,
            "The loss of %s does not measure progress, so `divguard_detector='adaptive'` looks for values that are not "
            "finite only, at every step%s. To watch the reward instead, set `divguard_metric_key='reward'`.",
            policy,
            f", without the settings {', '.join(unused)}" if unused else "",
        )
    detector: DivergenceDetector = DETECTORS[name](
        action=options.divguard_action, metric_key=options.divguard_metric_key, **settings
    )
    return detector
