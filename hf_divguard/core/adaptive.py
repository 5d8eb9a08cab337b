"""The rule that needs no threshold: it learns what is ordinary for a run and reports what is lost."""

from __future__ import annotations

import math
from typing import Any

from hf_divguard.core.findings import Finding
from hf_divguard.core.nonfinite import NonFiniteRule
from hf_divguard.core.robust_level import RobustLevel, median

__all__ = ["AdaptiveRule"]


class _Excursion:
    """A rise above the ordinary that is being watched."""

    def __init__(self) -> None:
        self.score = 0.0
        self.onset_step = 0
        self.values: list[float] = []

    def add(self, step: int, value: float, share: float) -> None:
        if self.score == 0.0:
            self.onset_step = step
            self.values = []
        self.score = max(0.0, self.score + share)
        if self.score > 0.0:
            self.values.append(value)
            if len(self.values) > 400:
                del self.values[0]
        else:
            self.values = []

    def is_healing(self, base: float, cap: float) -> bool:
        count = len(self.values)
        width = max(1, min(9, count // 2))
        late = min(median(self.values[-width:]) - base, cap)
        half = count // 2
        early = min(median(self.values[max(0, half - width) : half] or self.values[:1]) - base, cap)
        return late <= 0.8 * early


class AdaptiveRule:
    """Report a run that is losing what it has learnt, without a threshold to set.

    Args:
        sensitivity: How readily the rule fires, above 0. 1.0 is the default; 2.0 asks for
            half the evidence, 0.5 for twice as much.
        scaler_patience: As in ``NonFiniteRule``.
        eval_severity: Severity of a rising evaluation loss: ``"warning"`` or ``"error"``.
        grace_values: Number of values after a resume or a rollback in which rises are not
            judged, at least 0.
        metric: Log key of the series, for messages.
    """

    def __init__(
        self,
        *,
        sensitivity: float = 1.0,
        scaler_patience: int = 17,
        eval_severity: str = "warning",
        grace_values: int = 10,
        metric: str = "loss",
    ) -> None:
        self.sensitivity = sensitivity
        self.eval_severity = eval_severity
        self.grace_values = grace_values
        self.metric = metric
        self._non_finite = NonFiniteRule(scaler_patience, metric=metric)
        self.reset()

    @property
    def scaler_patience(self) -> int:
        """Optimizer steps over which the gradient norm may stay non-finite beside a good loss."""
        return self._non_finite.scaler_patience

    @scaler_patience.setter
    def scaler_patience(self, n_steps: int) -> None:
        self._non_finite.scaler_patience = n_steps

    def reset(self) -> None:
        """Forget everything that was observed."""
        self._non_finite.reset()
        self._level = RobustLevel()
        self._jump = _Excursion()
        self._climb = _Excursion()
        self._step: int | None = None
        self._gap = 1
        self._peak = 0.0
        self._healed = 0.0
        self._open = False
        self._grace = 0

    def begin_grace(self, n_values: int | None = None) -> None:
        """Keep what is ordinary, drop what is suspected, and judge no rise for a while."""
        self._grace = self.grace_values if n_values is None else n_values
        self._jump, self._climb = _Excursion(), _Excursion()
        self._open = False

    def observe(self, step: int, value: float, grad_norm: float | None = None) -> Finding | None:
        """Feed one training loss; return the most severe finding if there is one."""
        finding = self._non_finite.observe(step, value, grad_norm)
        if not math.isfinite(value):
            return finding
        kind = self._observe_level(step, value)
        if kind is None or self._open:
            return finding
        self._open = True
        return Finding(
            step=step,
            onset_step=self._jump.onset_step if kind == "jump" else self._climb.onset_step,
            kind=kind,
            severity="error",
            metric=self.metric,
            value=value,
            limit=self._level.upper,
            message=f"`{self.metric}` = {value:.6g} at step {step}: {kind}.",
        )

    def observe_eval(self, step: int, value: float, *, metric: str = "eval_loss") -> Finding | None:
        """Feed one evaluation loss; ``metric`` tells evaluation sets apart."""
        return self._non_finite.observe_eval(step, value, metric=metric)

    def _observe_level(self, step: int, x: float) -> str | None:
        if self._step is not None and step > self._step:
            self._gap = step - self._step
        self._step = step
        level = self._level
        level.see(x)
        if level.count <= 5:
            level.accept(x)
            return None
        if self._grace:
            self._grace -= 1
            return None
        sig, prog, best = level.noise, level.progress, level.best if level.best is not None else x
        k = max(3.0, 8.0 - prog / sig) if sig > 0 else 3.0
        need_j = max(0.2 * prog, k * sig * 0.5, 1.5 * self._healed)
        need_c = max(0.45 * prog, k * sig, 1.5 * self._healed)
        scale = max(0.5 * prog, 1.5 * sig, self._healed)
        if scale <= 0:
            scale = need_j = need_c = max(1e-3 * abs(x), 1e-300)
        w = min(max(self._gap, 1), 3) * self.sensitivity
        ctr = level.center
        self._jump.add(step, x, w * (max(-1.0, min(1.0, (x - level.upper) / scale)) - 0.1))
        m_c = max(0.1 * prog, sig * 2) or scale
        self._climb.add(step, x, w * (max(-1.0, min(1.0, (x - best - need_c) / m_c)) - 0.1))
        cap_j, cap_c = 4.0 * max(prog, 2 * need_j), 4.0 * max(prog, 2 * need_c)
        if self._jump.score > 0:
            t = len(self._jump.values)
            E = median(self._jump.values[-max(1, min(9, t // 2)) :]) - ctr
            if t >= 3:
                self._peak = max(self._peak, E)
            if self._jump.score >= 9.0:
                if need_j <= E and not self._jump.is_healing(ctr, cap_j):
                    return "jump"
                self._jump.score = min(self._jump.score, 18.0)
            if t > 25 and self._peak < need_j:
                for v in self._jump.values[:-1]:
                    level.accept(v)
                self._jump = _Excursion()
        elif self._peak > 0:
            if self._peak >= need_j:
                self._healed = max(self._healed, min(self._peak, 1e300))
            self._peak = 0.0
        if self._climb.score >= 30.0 and not self._climb.is_healing(best, cap_c):
            return "climb"
        if self._jump.score <= 2:
            level.accept(x)
            self._open = False
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of the rule as JSON values."""
        return {
            "non_finite": self._non_finite.state_dict(),
            "level": self._level.state_dict(),
            "jump": dict(vars(self._jump)),
            "climb": dict(vars(self._climb)),
            "step": self._step,
            "gap": self._gap,
            "peak": self._peak,
            "healed": self._healed,
            "open": self._open,
            "grace": self._grace,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory that ``state_dict`` returned.

        Raises:
            ValueError: If the state does not fit; the rule is left as it was.
        """
        try:
            level = RobustLevel.from_state_dict(state_dict["level"])
            jump, climb = _Excursion(), _Excursion()
            vars(jump).update(state_dict["jump"])
            vars(climb).update(state_dict["climb"])
            values = {name: state_dict[name] for name in ("step", "gap", "peak", "healed", "open", "grace")}
            self._non_finite.load_state_dict(state_dict["non_finite"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"The state of the adaptive rule cannot be read: {error}.") from error
        self._level, self._jump, self._climb = level, jump, climb
        for name, value in values.items():
            setattr(self, f"_{name}", value)
