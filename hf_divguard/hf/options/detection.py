"""The options of the detector that the flags ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hf_divguard.core.detection.registry import make_rule
from hf_divguard.core.outcome import Action
from hf_divguard.hf.options.values import json_object, require_choice, require_whole

__all__ = ["DetectionOptions", "DetectorName"]

DetectorName = Literal["adaptive", "ema", "window", "nonfinite", "none"]


@dataclass(repr=False, eq=False)
class DetectionOptions:
    """Which detector watches the run, and what it does."""

    divguard_detector: DetectorName = field(
        default="none",
        metadata={
            "help": "Watch the training for divergence. adaptive: needs no tuning, sees the raw loss of every step; "
            "ema: two moving averages; window: two windows; nonfinite: NaN and infinity only; none: do not watch."
        },
    )
    divguard_action: Action = field(
        default="stop",
        metadata={
            "help": "What divguard_detector does when it finds a divergence. warn: a line in the log; stop: after the "
            "step's log, evaluation and save; abort: at once, saving nothing more; rollback: go back to a "
            "checkpoint from before it and go on."
        },
    )
    divguard_metric_key: str | None = field(
        default=None,
        metadata={
            "help": "Log key that divguard_detector watches. Default: loss for adaptive and nonfinite, eval_loss for "
            "ema and window."
        },
    )
    divguard_detector_kwargs: dict | str | None = field(  # type: ignore[type-arg]
        default=None,
        metadata={
            "help": "Settings of divguard_detector's rule as JSON, for example '{\"threshold\": 1.0}' for ema. An "
            "unknown setting is an error that lists the known ones."
        },
    )
    divguard_check_steps: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps between two looks at the raw losses, which stay on the device until then. They "
            "are also looked at before every log, evaluation and save. At least 1."
        },
    )

    def _check_values(self) -> None:
        require_choice("divguard_detector", self.divguard_detector, DetectorName)
        require_choice("divguard_action", self.divguard_action, Action)
        require_whole("divguard_check_steps", self.divguard_check_steps, "optimizer steps", at_least=1)
        self.divguard_detector_kwargs = json_object("divguard_detector_kwargs", self.divguard_detector_kwargs)
        if self.divguard_detector != "none":
            make_rule(
                self.divguard_detector,
                metric_key=self.divguard_metric_key or "loss",
                **self.divguard_detector_kwargs or {},
            )
        elif self.divguard_detector_kwargs or self.divguard_metric_key:
            raise ValueError(
                "`divguard_detector_kwargs` and `divguard_metric_key` are settings of a detector, but "
                "`divguard_detector` is 'none'. Set it to one of adaptive, ema, window, nonfinite."
            )
