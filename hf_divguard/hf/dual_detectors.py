"""The two detectors that compare a fast average with a slow one."""

from __future__ import annotations

import logging
from typing import Any

from hf_divguard.core.detection.ema import DualTimeScaleRule
from hf_divguard.core.detection.window import DualWindowRule
from hf_divguard.core.metrics import greater_is_better as direction_of
from hf_divguard.hf.detectors import DivergenceDetector

__all__ = ["DualTimeScaleDivergenceDetector", "DualWindowDivergenceDetector"]

logger = logging.getLogger(__name__)


def _series(metric_key: str | None, use_eval_loss: bool, greater_is_better: bool | None) -> dict[str, Any]:
    """Return which series a rule watches, and which direction of it is good."""
    key = metric_key or ("eval_loss" if use_eval_loss else "loss")
    return {"metric_key": key, "greater_is_better": _direction(key, greater_is_better)}


def _direction(metric_key: str, greater_is_better: bool | None) -> bool:
    if greater_is_better is not None:
        return greater_is_better
    known = direction_of(metric_key)
    if known is None:
        logger.warning(
            "The direction of `%s` is not known; a rise is taken for the trouble. Set `greater_is_better` to say it.",
            metric_key,
        )
    return bool(known)


def _of_rule(name: str, doc: str) -> Any:
    """Return a property that shows, and sets, the attribute ``name`` of the detector's rule."""

    def get(self: DivergenceDetector) -> Any:
        return getattr(self.rule, name)

    def set_(self: DivergenceDetector, value: Any) -> None:
        setattr(self.rule, name, value)

    return property(get, set_, doc=doc)


class DualTimeScaleDivergenceDetector(DivergenceDetector):
    """Acts when a fast moving average runs away from a slow one.

    Both averages start at the first value and follow ``e = a * x + (1 - a) * e``; it
    fires when ``short_ema - long_ema >= threshold``. A NaN or infinite value never
    enters an average and is itself a finding. The threshold is in the units of the
    metric: at the defaults a lasting jump below 2.83 never fires. Settings and memory are
    attributes.

    Args:
        short_alpha: Weight of a new value in the fast average, in (0, 1]; larger reacts
            faster. Default as in forgather's detector of the same name.
        long_alpha: Weight of a new value in the slow average, in (0, 1].
        threshold: Smallest gap that fires, in the units of the metric; larger is quieter.
        action: ``"stop"``: the step's log, evaluation and a save take place, then
            training ends. ``"abort"``: training ends and nothing more is saved, not even
            a save that is due at that step. ``"warn"``: only a log line.
        use_eval_loss: Watch ``eval_loss``; else ``loss``.
        metric_key: Log key to watch instead, as the Trainer logs it.
        greater_is_better: Whether a drop is the trouble (accuracy). ``None`` takes it
            from the name of the metric.
        name: Name of the memory in checkpoints; needed where two detectors of a class are used.

    Raises:
        ValueError: If an alpha is outside (0, 1], ``threshold`` is not finite, or
            ``action`` is unknown.

    Example:
        >>> from transformers import TrainerControl
        >>> detector, control = DualTimeScaleDivergenceDetector(threshold=1.0, use_eval_loss=False), TrainerControl()
        >>> for loss in [2.0] * 20 + [6.0] * 5:
        ...     detector.on_log(None, None, control, logs={"loss": loss})
        >>> control.should_training_stop, detector.findings[0].step
        (True, 24)
        >>> detector.initialized, round(detector.short_ema, 2)
        (True, 3.64)
    """

    short_alpha = _of_rule("short_alpha", "Weight of a new value in the fast average.")
    long_alpha = _of_rule("long_alpha", "Weight of a new value in the slow average.")
    threshold = _of_rule("threshold", "Smallest gap that fires.")
    short_ema = _of_rule("short_ema", "The fast average; ``None`` before the first value.")
    long_ema = _of_rule("long_ema", "The slow average; ``None`` before the first value.")
    initialized = _of_rule("initialized", "Whether there was a value.")

    def __init__(
        self,
        short_alpha: float = 0.1,
        long_alpha: float = 0.01,
        threshold: float = 2.0,
        action: str = "stop",
        use_eval_loss: bool = True,
        metric_key: str | None = None,
        greater_is_better: bool | None = None,
        name: str | None = None,
    ) -> None:
        rule = DualTimeScaleRule(
            short_alpha, long_alpha, threshold, **_series(metric_key, use_eval_loss, greater_is_better)
        )
        super().__init__(rule, action=action, metric_key=rule.metric_key, name=name)
        self.use_eval_loss = use_eval_loss


class DualWindowDivergenceDetector(DivergenceDetector):
    """Acts when the mean of the last few values runs away from the mean of the last many.

    Silent until the long window is full; fires when
    ``mean(short) - mean(long) >= threshold``. A NaN or infinite value never enters a
    window and is itself a finding. Settings and memory are attributes.

    Args:
        short_window: Values in the short window, at least 1. Counted in log events (or
            evaluations), not in optimizer steps. Default as in forgather's detector.
        long_window: Values in the long window, at least 1.
        threshold: Smallest gap that fires, in the units of the metric; larger is quieter.
        action: ``"stop"``, ``"abort"`` or ``"warn"``, as for
            :class:`DualTimeScaleDivergenceDetector`.
        use_eval_loss: Watch ``eval_loss``; else ``loss``.
        metric_key: Log key to watch instead, as the Trainer logs it.
        greater_is_better: Whether a drop is the trouble (accuracy). ``None`` takes it
            from the name of the metric.
        name: Name of the memory in checkpoints; needed where two detectors of a class are used.

    Raises:
        ValueError: If a window is shorter than 1, ``threshold`` is not finite, or
            ``action`` is unknown.
        TypeError: If a window is not an integer.

    Example:
        >>> from transformers import TrainerControl
        >>> control = TrainerControl()
        >>> detector = DualWindowDivergenceDetector(2, 4, threshold=0.1, metric_key="eval_accuracy", action="abort")
        >>> for accuracy in [0.9, 0.9, 0.9, 0.9, 0.5]:
        ...     detector.on_evaluate(None, None, control, metrics={"eval_accuracy": accuracy})
        >>> control.should_training_stop, control.should_save
        (True, False)
        >>> detector.short_buffer
        [0.9, 0.5]
    """

    short_window = _of_rule("short_window", "Number of values in the short window.")
    long_window = _of_rule("long_window", "Number of values in the long window.")
    threshold = _of_rule("threshold", "Smallest gap that fires.")
    short_buffer = _of_rule(
        "short_buffer", "Values in the short window, oldest first; ``[]`` before the first."
    )
    long_buffer = _of_rule("long_buffer", "Values in the long window, oldest first; ``[]`` before the first.")

    def __init__(
        self,
        short_window: int = 10,
        long_window: int = 100,
        threshold: float = 2.0,
        action: str = "stop",
        use_eval_loss: bool = True,
        metric_key: str | None = None,
        greater_is_better: bool | None = None,
        name: str | None = None,
    ) -> None:
        rule = DualWindowRule(
            short_window, long_window, threshold, **_series(metric_key, use_eval_loss, greater_is_better)
        )
        super().__init__(rule, action=action, metric_key=rule.metric_key, name=name)
        self.use_eval_loss = use_eval_loss
