"""NaN, infinity, and the plausible numbers that a Trainer logs in their place."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

from hf_divguard.core.detection.baseline import PATIENCE
from hf_divguard.core.detection.detector import check_setting, non_finite_finding
from hf_divguard.core.detection.sorted_window import median
from hf_divguard.core.findings import Finding, Kind, Severity
from hf_divguard.core.metrics import greater_is_better as direction_of
from hf_divguard.core.state import Stateful, memory

__all__ = ["NonFiniteRule"]

_HARMLESS_IN_A_ROW = 2
_SAME_IN_A_ROW = 3
# Single steps; entries that are the means of many steps. Together with the values before them there are ``PATIENCE``.
_ZEROS_IN_A_ROW = 3
_ZERO_MEANS_IN_A_ROW = 2
_ABRUPT_SHARE = 0.01
_STEADY_SHARE = 0.1


@dataclass
class NonFiniteRule(Stateful):
    """Report a loss that is not a number, or that has been replaced because it was not one.

    Four observations are errors:

    - the value itself is NaN or infinite (kind ``"non_finite"``);
    - the value is exactly 0.0 and the gradient norm is not finite (``"nan_filtered"``): this is
      what ``logging_nan_inf_filter=True``, the Trainer's default, makes of a NaN loss;
    - the same value is logged 3 times running while the gradient norm is not finite, or
      the value falls from a steady level to exactly 0.0 and stays there for 3 values (2
      where there are nine steps or more between them),
      whatever the gradient norm (``"nan_filtered"``);
    - the gradient norm stays non-finite over ``scaler_patience`` optimizer steps
      (``"non_finite"`` of ``grad_norm``).

    A single non-finite gradient norm beside a good loss is only a ``note``
    (``"scaler_skip"``): the loss scaler of fp16 training finds its scale by overflowing
    and skips those steps. A NaN loss together with a gradient norm of exactly 0 is a
    batch without labels; it changes no weight and is an error only from the third in a row.

    One incident gives one finding; the next comes after a good value.

    Args:
        scaler_patience: Number of optimizer steps over which the gradient norm may stay
            non-finite while the loss is fine, at least 1. The default 17 is one more than
            a scaler needs to halve its default first scale of 2**16 down to 1; a gradient
            that overflows without any scaling is broken. Give 1 where no scaler is used
            (bf16, fp32): there a non-finite gradient has gone into the weights.
        metric_key: Log key of the series, for messages.

    Raises:
        ValueError: If ``scaler_patience`` is below 1.
        TypeError: If ``scaler_patience`` is not a whole number.

    Example:
        >>> rule = NonFiniteRule()
        >>> rule.observe(1, 2.31, grad_norm=1.2)
        >>> print(rule.observe(2, 0.0, grad_norm=float("nan")))
        `loss` = 0 at step 2 is a mask: the gradient norm is nan, so the loss was not finite and was filtered out.
        >>> rule.observe(3, 0.0, grad_norm=float("nan"))
    """

    name: ClassVar[str] = "nonfinite"

    scaler_patience: int = 17
    _: KW_ONLY
    metric_key: str = "loss"

    _open: str = memory("")
    _eval_open: list[str] = memory(list)
    _harmless: int = memory(0)
    _bad_gradients: int = memory(0)
    _bad_since: int | None = memory(None)
    _good_before: int | None = memory(None)
    _previous: float | None = memory(None)
    _same: int = memory(0)
    _zeros: int = memory(0)
    _zeros_since: int | None = memory(None)
    _before_zero: deque[float] = memory(lambda: deque(maxlen=PATIENCE))
    _largest: float = memory(0.0)
    _reaches_zero: bool = memory(False)
    _step: int | None = memory(None)
    _gap: int = memory(1)

    def __post_init__(self) -> None:
        check_setting(self.name, "scaler_patience", self.scaler_patience, at_least=1, unit="step")

    @property
    def is_masking(self) -> bool:
        """Whether the last value stood in for a loss that was not finite."""
        return self._open == "error"

    @property
    def is_open(self) -> bool:
        """Whether the last loss, or the last one of an evaluation set, was not finite."""
        return self.is_masking or bool(self._eval_open)

    def end_incident(self) -> None:
        """Report a loss that is still not finite once more."""
        self._open, self._eval_open = "", []

    def observe(self, step: int, value: float, grad_norm: float | None = None) -> Finding | None:
        """Feed one loss, with the gradient norm of the same step where it is known.

        Args:
            step: Optimizer step the value belongs to.
            value: The loss; NaN and infinities are what this rule waits for.
            grad_norm: Gradient norm before clipping, or ``None`` if it is not known.
        """
        if self._step is not None and step > self._step:
            self._gap = step - self._step
        self._step = step
        if value and math.isfinite(value) and (grad_norm is None or math.isfinite(grad_norm)):
            self._take_good(step, value, grad_norm)
            return None
        finding = self._judge(step, value, grad_norm)
        if finding is None:
            self._good_before = step if grad_norm is None else step + 1
            self._open = ""
            return None
        if finding.severity == "note":
            seen_before, self._open = self._open != "", self._open or "note"
            return None if seen_before else finding
        seen_before, self._open = self._open == "error", "error"
        return None if seen_before else finding

    def _take_good(self, step: int, value: float, grad_norm: float | None) -> None:
        """Do what the judgement comes to of a finite loss other than zero whose gradient is not known to be bad."""
        self._same = self._same + 1 if value == self._previous else 1
        self._previous = value
        self._harmless = self._bad_gradients = 0
        if self._zeros:
            # A loss that is zero now and then reaches zero by itself.
            self._reaches_zero, self._zeros = True, 0
        self._before_zero.append(value)
        if abs(value) > self._largest:
            self._largest = abs(value)
        # Up to here the loss was good; so was the update of this step, if its gradient is known to be.
        self._good_before = step if grad_norm is None else step + 1
        self._open = ""

    def observe_eval(self, step: int, value: float, *, metric_key: str = "eval_loss") -> Finding | None:
        """Feed one evaluation loss; a non-finite one is an error, once per incident and ``metric_key``."""
        is_open = metric_key in self._eval_open
        if math.isfinite(value):
            self._eval_open = [name for name in self._eval_open if name != metric_key]
            return None
        if is_open:
            return None
        self._eval_open = [*self._eval_open, metric_key]
        return non_finite_finding(metric_key, step, value)

    def _judge(self, step: int, value: float, grad_norm: float | None) -> Finding | None:
        if not math.isfinite(value):
            return self._judge_non_finite_value(step, value, grad_norm)
        self._harmless = 0
        self._same = self._same + 1 if value == self._previous else 1
        self._previous = value
        if grad_norm is not None and not math.isfinite(grad_norm):
            return self._judge_bad_gradient(step, value, grad_norm)
        self._bad_gradients = 0
        return self._judge_zeros(step, value)

    def _judge_non_finite_value(self, step: int, value: float, grad_norm: float | None) -> Finding | None:
        self._previous, self._same = None, 0
        if grad_norm == 0.0:
            self._harmless += 1
            if self._harmless <= _HARMLESS_IN_A_ROW:
                message = (
                    f"`{self.metric_key}` = {value} at step {step} changed no weight: the gradient norm there is 0, as "
                    "for a batch without labels."
                )
                return self._finding(step, step, "non_finite", value, message, severity="note")
        return replace(non_finite_finding(self.metric_key, step, value), onset_step=self._onset(step))

    def _onset(self, step: int) -> int:
        """Return the first step that may be bad: the one after the last good one."""
        since = [
            s for s in (self._bad_since if self._bad_gradients else None, self._good_before) if s is not None
        ]
        return min([step, *since])

    def _judge_bad_gradient(self, step: int, value: float, grad_norm: float) -> Finding:
        self._bad_gradients += 1
        if self._bad_gradients == 1 or self._bad_since is None:
            self._bad_since = min(step, step if self._good_before is None else self._good_before)
        evidence: dict[str, float | int | str] = {"grad_norm": grad_norm, "in_a_row": self._bad_gradients}
        if value == 0.0:
            message = (
                f"`{self.metric_key}` = 0 at step {step} is a mask: the gradient norm is {grad_norm}, so the loss was "
                "not finite and was filtered out."
            )
            return self._finding(step, self._bad_since, "nan_filtered", value, message, evidence)
        if min(self._same, self._bad_gradients) >= _SAME_IN_A_ROW:
            message = (
                f"`{self.metric_key}` has been frozen at {value:.6g} for {self._same} values up to step {step} while the "
                f"gradient norm is {grad_norm}: the value is left over from before the loss stopped being finite."
            )
            return self._finding(step, self._bad_since, "nan_filtered", value, message, evidence)
        span = step - self._bad_since + 1
        if span >= self.scaler_patience and (self._bad_gradients >= 3 or self.scaler_patience == 1):
            message = (
                f"`grad_norm` = {grad_norm} at step {step} has not been finite since step {self._bad_since} "
                f"({span} steps, limit {self.scaler_patience}): this is not a loss scaler looking for its scale."
            )
            return self._finding(
                step, self._bad_since, "non_finite", grad_norm, message, evidence, metric="grad_norm"
            )
        message = (
            f"`grad_norm` = {grad_norm} at step {step} beside a good `{self.metric_key}` = {value:.6g}: an fp16 loss "
            "scaler skips such a step."
        )
        return self._finding(
            step,
            self._bad_since,
            "scaler_skip",
            grad_norm,
            message,
            evidence,
            severity="note",
            metric="grad_norm",
        )

    def _judge_zeros(self, step: int, value: float) -> Finding | None:
        self._zeros += 1
        if self._zeros == 1 or self._zeros_since is None:
            self._zeros_since = min(step, step if self._good_before is None else self._good_before)
        if not self._is_abrupt() or direction_of(self.metric_key):
            return None
        last = self._before_zero[-1]
        message = (
            f"`{self.metric_key}` fell from {last:.6g} to exactly 0 at step {self._zeros_since} and stayed there for "
            f"{self._zeros} values: this is what a loss that is filtered because it is not finite, a broken kernel or "
            "batches without labels look like."
        )
        evidence: dict[str, float | int | str] = {"last_nonzero": last, "in_a_row": self._zeros}
        return self._finding(step, self._zeros_since, "nan_filtered", value, message, evidence)

    def _is_abrupt(self) -> bool:
        """Return whether the values before the zeros were far from zero, and zero was never reached before."""
        before = self._before_zero
        in_a_row = _ZEROS_IN_A_ROW if self._gap < PATIENCE else _ZERO_MEANS_IN_A_ROW
        if self._reaches_zero or not before or self._zeros < max(in_a_row, PATIENCE - len(before)):
            return False
        smallest = min(map(abs, before))
        is_steady = min(before) * max(before) > 0.0 and smallest >= _STEADY_SHARE * median(map(abs, before))
        return is_steady and abs(before[-1]) > _ABRUPT_SHARE * self._largest

    def _finding(
        self,
        step: int,
        onset_step: int,
        kind: Kind,
        value: float,
        message: str,
        evidence: dict[str, float | int | str] | None = None,
        *,
        severity: Severity = "error",
        metric: str | None = None,
    ) -> Finding:
        return Finding(
            step=step,
            onset_step=onset_step,
            kind=kind,
            severity=severity,
            metric=metric or self.metric_key,
            value=value,
            limit=None,
            message=message,
            evidence=evidence or {},
        )
