"""The detectors that need no threshold: the adaptive one, and the one for values that are not finite."""

from __future__ import annotations

from typing import Any

from hf_divguard.core.detection.adaptive import AdaptiveRule
from hf_divguard.core.detection.nonfinite import NonFiniteRule
from hf_divguard.hf.detectors import RawLossDetector

__all__ = ["AdaptiveDivergenceDetector", "NonFiniteDetector"]


class AdaptiveDivergenceDetector(RawLossDetector):
    """Acts when a run is losing what it has learnt, without a threshold to set.

    It learns the noise of the run, distinguishes a steep start from a divergence and a spike
    that recovers from a jump that lasts, and names what it sees; see
    :class:`~hf_divguard.core.detection.adaptive.AdaptiveRule` for the kinds and the formulas.
    Multiplying or shifting the loss changes nothing. Only findings of severity
    ``"error"`` are acted on; warnings are logged, notes are kept in ``findings``.

    Args:
        action: ``"warn"``, ``"stop"``, ``"abort"`` or ``"rollback"`` (needs
            ``DivGuardTrainer``).
        metric_key: Log key of the training loss.
        name: Name of the memory in checkpoints.
        **params: Settings of the rule; nobody needs them to begin with.

    Raises:
        ValueError: If ``action`` or a setting is out of range.
        TypeError: If the rule has no such setting.

    Example:
        >>> from transformers import TrainerControl
        >>> detector, control = AdaptiveDivergenceDetector(), TrainerControl()
        >>> for step in range(60):
        ...     detector.on_log(None, None, control, logs={"loss": 2.0 + 0.01 * (step % 3) + (step >= 40) * 4.0})
        >>> control.should_training_stop, detector.findings[-1].onset_step
        (True, 41)
    """

    def __init__(
        self, action: str = "stop", metric_key: str | None = None, name: str | None = None, **params: Any
    ) -> None:
        key = metric_key or "loss"
        super().__init__(AdaptiveRule(metric_key=key, **params), action=action, metric_key=key, name=name)


class NonFiniteDetector(RawLossDetector):
    """Acts on NaN and infinite losses and gradients, and on what the stock filter logs in their place.

    Args:
        action: ``"warn"``, ``"stop"``, ``"abort"`` or ``"rollback"`` (needs
            ``DivGuardTrainer``).
        metric_key: Log key of the training loss.
        name: Name of the memory in checkpoints.
        **params: Settings of :class:`~hf_divguard.core.detection.nonfinite.NonFiniteRule`.

    Example:
        >>> from transformers import TrainerControl
        >>> detector, control = NonFiniteDetector(action="abort"), TrainerControl()
        >>> detector.on_log(None, None, control, logs={"loss": 0.0, "grad_norm": float("nan")})
        >>> control.should_training_stop, detector.findings[0].kind
        (True, 'nan_filtered')
    """

    def __init__(
        self, action: str = "stop", metric_key: str | None = None, name: str | None = None, **params: Any
    ) -> None:
        key = metric_key or "loss"
        super().__init__(NonFiniteRule(metric_key=key, **params), action=action, metric_key=key, name=name)
