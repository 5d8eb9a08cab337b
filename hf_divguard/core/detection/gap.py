"""What the rules with a short and a long average share: the gap between the averages, and the finding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from hf_divguard.core.detection.detector import check_setting
from hf_divguard.core.findings import Finding
from hf_divguard.core.state import Stateful

__all__ = ["GapRule"]


class GapRule(Stateful, ABC):
    """Base of rules that fire while a short average is at least ``threshold`` away from a long one.

    A rule of this kind is a dataclass with the settings below, calls ``_judge`` for each
    value, and says in ``_describe`` which averages it compares.
    """

    name: ClassVar[str]
    averages: ClassVar[tuple[str, str]]
    """Names of the short and of the long average in the evidence of a finding."""

    threshold: float
    metric_key: str
    greater_is_better: bool

    def __post_init__(self) -> None:
        self.pending_since: int | None = None
        check_setting(self.name, "threshold", self.threshold, above=0)

    def reset(self) -> None:
        """Forget everything that was observed."""
        super().reset()
        self.pending_since = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the memory exactly as it is.

        Raises:
            StateError: If a part is missing or of another type; nothing is changed then.
        """
        super().load_state_dict(state_dict)
        self.pending_since = None

    @abstractmethod
    def _describe(self, short: float, long: float, gap: float) -> str:
        """Return which averages are how far away from each other."""

    def _judge(self, step: int, value: float, short: float, long: float) -> Finding | None:
        """Return a finding if the gap between the averages is at or above the threshold."""
        gap = long - short if self.greater_is_better else short - long
        # A quarter of the gap is no finding, but reason enough not to delete what is from before it.
        is_pending = gap >= self.threshold / 4
        self.pending_since = (self.pending_since or step) if is_pending else None
        if gap < self.threshold:
            return None
        moved, sign = ("fallen", -1.0) if self.greater_is_better else ("risen", 1.0)
        return Finding(
            step=step,
            onset_step=step,
            kind="drop" if self.greater_is_better else "jump",
            severity="error",
            metric=self.metric_key,
            value=value,
            limit=long + sign * self.threshold,
            message=(
                f"`{self.metric_key}` = {value:.4g} at step {step} has {moved}: {self._describe(short, long, gap)} "
                f"(limit {self.threshold:.4g})."
            ),
            evidence=dict(zip((*self.averages, "gap"), (short, long, gap), strict=True)),
        )
