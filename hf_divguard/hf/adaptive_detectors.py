"""The detectors that take raw losses and need no threshold: the adaptive one, and the one for non-finite values."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from hf_divguard.core.detection.adaptive import AdaptiveRule
from hf_divguard.core.detection.detector import StepValues
from hf_divguard.core.detection.nonfinite import NonFiniteRule
from hf_divguard.core.findings import Finding
from hf_divguard.core.metrics import evaluation_loss_key
from hf_divguard.core.rollback.skipping import SKIPPED, SkippedUpdates
from hf_divguard.hf.control import is_world_zero, outcome_of
from hf_divguard.hf.detectors import DivergenceDetector
from hf_divguard.hf.resume_conditions import changed_conditions, conditions_of
from hf_divguard.hf.skipping import NonFiniteUpdates

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
        self._skipping: NonFiniteUpdates | None = None
        self._skipped = SkippedUpdates()
        self._scaler_patience = rule.scaler_patience
        self._tells_sets_apart = "metric_key" in inspect.signature(rule.observe_eval).parameters
        self._conditions: dict[str, Any] | None = None
        super().__init__(rule, action=action, metric_key=metric_key, name=name)

    def use_raw_losses(self, *, has_loss_scaler: bool, skipping: NonFiniteUpdates | None = None) -> None:
        """Take losses from the trainer instead of from logs.

        Args:
            has_loss_scaler: Whether a scaler searches its scale by overflowing. Without one
                a single non-finite gradient has gone into the weights.
            skipping: What skips updates that are not finite, if anything does.
        """
        self._skipping = skipping
        if skipping is not None:
            self._skipped = SkippedUpdates(skipping.max_in_a_row, counts_gradients=not has_loss_scaler)
        self.takes_raw_losses = self.metric_key == "loss"
        self.rule.scaler_patience = self._scaler_patience if has_loss_scaler else 1

    def use_logs(self) -> None:
        """Take losses from logs again."""
        self.takes_raw_losses, self._skipping = False, None
        self.rule.scaler_patience = self._scaler_patience

    # ---- memory

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of the rule, and under which conditions the run trains."""
        own = {"conditions": self._conditions, "skipped": self._skipped.state_dict()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory; judge no rise for a while if the run goes on under other conditions.

        A run that resumes as it was gives the same losses as if it had never been cut, and is
        judged the same. After a change of the learning rate, the batch size or the number of
        ranks, or without the optimizer's state, a loss is often higher for a while.

        Raises:
            ValueError: If the memory does not fit the rule.
        """
        state_dict = dict(state_dict)
        before, skipped = state_dict.pop("conditions", None), state_dict.pop("skipped", None)
        super().load_state_dict(state_dict)
        if skipped is not None:
            self._skipped.load_state_dict(skipped)
        changes = changed_conditions(before, self._conditions)
        start_grace = getattr(self.rule, "start_grace", None)
        if changes and start_grace is not None:
            start_grace()
            logger.info(
                "%s judges no rise of the loss for a while after this resume: %s.", self._label, changes
            )

    def rewind(self, state_dict: dict[str, Any] | None) -> None:
        """After a rollback, take the memory of the restored step; without one, count skipped updates from 0."""
        self._skipped.reset()
        super().rewind(state_dict)

    # ---- the host's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start clean, and say what cannot be seen from logs alone."""
        self._conditions = (
            conditions_of(args, on_logs=not self.takes_raw_losses) if args is not None else None
        )
        super().on_train_begin(args, state, control, **kwargs)
        if self.metric_key != "loss" or self.takes_raw_losses or args is None or not is_world_zero(state):
            return
        unseen = []
        steps: Any = getattr(state, "logging_steps", None) or getattr(args, "logging_steps", 1)
        strategy = getattr(args.logging_strategy, "value", args.logging_strategy)
        if strategy == "no":
            unseen.append("any training loss (`logging_strategy` is 'no')")
        elif strategy != "steps" or steps > 1:
            span = "an epoch" if strategy == "epoch" else f"{steps:g} steps"
            unseen.append(f"single steps (a log is the mean of {span})")
        if strategy != "no" and getattr(args, "logging_nan_inf_filter", False):
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
        if self.takes_raw_losses:
            self._after_log(state, logs)
            return
        super().on_log(args, state, control, logs=logs, **kwargs)

    def _if_skipped(self, finding: Finding | None, entry: StepValues) -> Finding | None:
        if self._skipping is None:
            return finding
        judged = self._skipped.judge(entry.step, entry.loss, entry.grad_norm, finding)
        was_skipped = judged is not None and SKIPPED in judged.evidence
        return finding if was_skipped and not self._skipping.weights_are_finite() else judged

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Feed the evaluation loss, that of each evaluation set by itself."""
        if self.metric_key.startswith("eval_"):
            super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
            return
        key = evaluation_loss_key(metrics or {})
        value = (metrics or {}).get(key)
        step = self._step(state)
        if self._has_ended or not isinstance(value, (int, float)) or outcome_of(state).is_muted(step):
            return
        at = self._count if step is None else step
        if self._tells_sets_apart:
            finding = self.rule.observe_eval(at, float(value), metric_key=key)
        elif key == "eval_loss":
            finding = self.rule.observe_eval(at, float(value))
        else:
            return
        if finding is not None:
            self._handle(finding, args, state, control)

    def _observe(self, step: int, value: float, logs: dict[str, Any]) -> Finding | None:
        norm = logs.get("grad_norm") if self.metric_key == "loss" else None
        return self.rule.observe(step, value, float(norm) if isinstance(norm, (int, float)) else None)


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
