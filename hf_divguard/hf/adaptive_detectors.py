"""Detectors that see the raw loss of every step under ``DivGuardTrainer``, and logs under the stock Trainer."""

from __future__ import annotations

import logging
from typing import Any

from hf_divguard.core.adaptive import AdaptiveRule
from hf_divguard.core.findings import Finding
from hf_divguard.core.nonfinite import NonFiniteRule
from hf_divguard.hf.actions import is_muted, is_world_zero
from hf_divguard.hf.detectors import DivergenceDetector
from hf_divguard.hf.loss_tap import StepValues

__all__ = ["AdaptiveDivergenceDetector", "NonFiniteDetector", "RawLossDetector"]

logger = logging.getLogger(__name__)


class RawLossDetector(DivergenceDetector):
    """A detector whose rule takes the training loss with the gradient norm, and evaluation losses.

    Under ``DivGuardTrainer`` it is fed the unfiltered loss of every optimizer step; under
    the stock Trainer what is logged, and it says at the start what it cannot see there.

    Args:
        rule: An ``AdaptiveRule`` or ``NonFiniteRule``.
        action: ``"warn"``, ``"stop"``, ``"abort"`` or ``"rollback"``.
        metric_key: Key of the training loss in logs.
        name: Name of the memory in checkpoints.
    """

    rule: AdaptiveRule | NonFiniteRule

    def __init__(
        self,
        rule: AdaptiveRule | NonFiniteRule,
        *,
        action: str = "stop",
        metric_key: str = "loss",
        name: str | None = None,
    ) -> None:
        self.takes_raw_losses = False
        self._scaler_patience = rule.scaler_patience
        super().__init__(rule, action=action, metric_key=metric_key, name=name)

    def use_raw_losses(self, *, has_loss_scaler: bool) -> None:
        """Take losses from the trainer instead of from logs.

        Args:
            has_loss_scaler: Whether a scaler searches its scale by overflowing. Without one
                a single non-finite gradient has gone into the weights.
        """
        self.takes_raw_losses = self.metric_key == "loss"
        self.rule.scaler_patience = self._scaler_patience if has_loss_scaler else 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start clean, and say what cannot be seen from logs alone."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.takes_raw_losses or args is None or not is_world_zero(state):
            return
        unseen = []
        steps = getattr(args, "logging_steps", 1)
        strategy = getattr(args.logging_strategy, "value", args.logging_strategy)
        if strategy != "steps" or steps > 1:
            unseen.append(
                f"single steps (a log is the mean of {'an epoch' if strategy == 'epoch' else steps})"
            )
        if getattr(args, "logging_nan_inf_filter", False):
            unseen.append("NaN losses that `logging_nan_inf_filter` hides, except by their gradient norm")
        if unseen:
            logger.warning(
                "%s works on logs here and cannot see: %s. `DivGuardTrainer` shows it every step.",
                self._label,
                "; ".join(unseen),
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Feed a log, unless the raw losses come from the trainer."""
        if self.takes_raw_losses and not self.metric_key.startswith("eval_"):
            self._after_log(state, logs)
            return
        super().on_log(args, state, control, logs=logs, **kwargs)

    def on_raw_losses(self, values: list[StepValues], args: Any, state: Any, control: Any) -> None:
        """Feed the raw losses of the last few steps."""
        for entry in values:
            self._seen = True
            if is_muted(state, entry.step):
                continue
            self._handle(self.rule.observe(entry.step, entry.loss, entry.grad_norm), args, state, control)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Feed the evaluation loss."""
        if self.metric_key.startswith("eval_"):
            super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
            return
        value = (metrics or {}).get("eval_loss")
        if isinstance(value, (int, float)):
            step = self._step(state)
            if is_muted(state, step):
                return
            self._handle(
                self.rule.observe_eval(self._count if step is None else step, float(value)),
                args,
                state,
                control,
            )

    def _observe(self, step: int, value: float, logs: dict[str, Any]) -> Finding | None:
        norm = logs.get("grad_norm")
        return self.rule.observe(step, value, float(norm) if isinstance(norm, (int, float)) else None)


class AdaptiveDivergenceDetector(RawLossDetector):
    """Acts when a run is losing what it has learnt, without a threshold to set.

    It learns the noise of the run, tells a steep start from a divergence and a spike that
    heals from a jump that lasts, and names what it sees; see
    :class:`~hf_divguard.core.adaptive.AdaptiveRule` for the kinds and the formulas.
    Multiplying or shifting the loss changes nothing. Only findings of severity
    ``"error"`` are acted on; warnings are told, notes are kept in ``findings``.

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
        super().__init__(AdaptiveRule(metric=key, **params), action=action, metric_key=key, name=name)


class NonFiniteDetector(RawLossDetector):
    """Acts on NaN and infinite losses and gradients, and on what the stock filter logs in their place.

    Args:
        action: ``"warn"``, ``"stop"``, ``"abort"`` or ``"rollback"`` (needs
            ``DivGuardTrainer``).
        metric_key: Log key of the training loss.
        name: Name of the memory in checkpoints.
        **params: Settings of :class:`~hf_divguard.core.nonfinite.NonFiniteRule`.

    Example:
        >>> from transformers import TrainerControl
        >>> detector, control = NonFiniteDetector(action="abort"), TrainerControl()
        >>> detector.on_log(None, None, control, logs={"loss": 0.0, "grad_norm": float("nan")})
        >>> control.should_training_stop, detector.findings[0].kind
        (True, 'masked')
    """

    def __init__(
        self, action: str = "stop", metric_key: str | None = None, name: str | None = None, **params: Any
    ) -> None:
        key = metric_key or "loss"
        super().__init__(NonFiniteRule(metric=key, **params), action=action, metric_key=key, name=name)
