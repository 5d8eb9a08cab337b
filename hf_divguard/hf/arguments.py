"""The options of hf_divguard as fields of ``TrainingArguments``."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainingArguments

from hf_divguard.core.detection.registry import make_rule
from hf_divguard.core.metrics import greater_is_better, with_eval_prefix
from hf_divguard.core.outcome import Action
from hf_divguard.hf.argument_checks import (
    check_ranking_has_evaluations,
    check_signals,
    check_something_is_saved,
    json_object,
    optional_bool,
    require_bool,
    require_choice,
    require_whole,
)

__all__ = [
    "DetectorName",
    "DivGuardArgumentsMixin",
    "DivGuardTrainingArguments",
    "SaveMode",
    "options_of",
]

logger = logging.getLogger(__name__)

DetectorName = Literal["adaptive", "ema", "window", "nonfinite", "none"]
SaveMode = Literal["auto", "staged", "in_place", "off"]


# To a type checker the mixin is the class of arguments it will be mixed into.
if TYPE_CHECKING:
    _Host = TrainingArguments
else:
    _Host = object


@dataclass
class DivGuardArgumentsMixin(_Host):
    """Adds the options of hf_divguard to any ``TrainingArguments`` dataclass.

    Put it left of the class it extends. Each field says what it does in its help text
    (``--help`` on a command line). With every field at its default the training is the
    stock one.

    Raises:
        ValueError: At construction, for values out of range and for options that
            contradict each other; the sentence says what to change.

    Example:
        >>> from dataclasses import dataclass
        >>> from transformers import Seq2SeqTrainingArguments
        >>> @dataclass
        ... class MyArguments(DivGuardArgumentsMixin, Seq2SeqTrainingArguments):
        ...     pass
        >>> args = MyArguments("out", save_steps=7, eval_on_save=True, load_best_model_at_end=True, use_cpu=True)
        >>> args.save_steps, str(args.eval_strategy.value), args.load_best_model_at_end
        (7, 'no', True)
    """

    preserve_best_model: bool = field(
        default=False,
        metadata={
            "help": "Keep the best checkpoints out of reach of save_total_limit: after every save the last "
            "save_total_limit and the best preserve_n_best stay on disk. Needs evaluations (eval_on_save, or an "
            "eval_strategy whose steps meet the save steps)."
        },
    )
    best_model_metric: str = field(
        default="loss",
        metadata={"help": "The evaluation metric that ranks checkpoints, with or without the prefix eval_."},
    )
    best_model_greater_is_better: str | None = field(
        default=None,
        metadata={
            "help": "Whether a greater best_model_metric is better: true, false or none. none takes the direction "
            "from a table of known metric names (loss, perplexity, wer, ... lower; accuracy, f1, bleu, ... higher)."
        },
    )
    preserve_n_best: int = field(
        default=1,
        metadata={"help": "How many of the best checkpoints preserve_best_model keeps, at least 1."},
    )
    eval_on_save: bool = field(
        default=False,
        metadata={
            "help": "Evaluate before every save, so that each checkpoint has metrics of its own step. save_steps need "
            "not be a multiple of eval_steps then, also with load_best_model_at_end; eval_strategy may be no."
        },
    )
    divguard_save_mode: SaveMode = field(
        default="auto",
        metadata={
            "help": "How a checkpoint becomes complete. staged: written in a folder of another name and renamed when "
            "complete; in_place: written under its name, complete when its manifest is there; off: as the stock Trainer "
            "writes it; auto: staged where the file system renames folders, else in_place, and off as long as no "
            "other option or callback of hf_divguard is in use."
        },
    )
    divguard_checksums: bool = field(
        default=False,
        metadata={
            "help": "Put a SHA-256 of every file into the manifest, and check it on resume. Finds flipped bits; costs "
            "one more read of each checkpoint."
        },
    )
    divguard_fsync: bool = field(
        default=False,
        metadata={
            "help": "Flush every file of a checkpoint to the disk (fsync) before it counts as complete. Protects "
            "against power loss, not needed against killed processes; makes saving slower."
        },
    )
    divguard_on_save_error: Literal["raise", "continue"] = field(
        default="raise",
        metadata={
            "help": "What follows when a checkpoint cannot be written (disk full, input/output error). raise: training "
            "ends with the error, the older checkpoints stay; continue: a warning, and training goes on without it."
        },
    )
    divguard_save_on_signal: str = field(
        default="none",
        metadata={
            "help": "Signals, with commas between them (SIGTERM,SIGUSR1), after which the present step is saved and the "
            "process ends with exit code 75, on all ranks, so that a scheduler starts it again; none for no signal."
        },
    )

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

    divguard_max_rollbacks: int = field(
        default=3,
        metadata={
            "help": "Rollbacks allowed for one incident, at least 1; then training ends with an error. An incident is "
            "over when nothing was found for ten times divguard_cooldown_steps."
        },
    )
    divguard_cooldown_steps: int = field(
        default=20,
        metadata={
            "help": "Optimizer steps after a rollback in which findings are ignored, so that the fault can pass. Doubled "
            "with each further rollback of an incident."
        },
    )
    divguard_rollback_margin_steps: int = field(
        default=0,
        metadata={"help": "How many steps further before the onset of the fault a rollback has to go."},
    )
    divguard_rollback_lr_factor: float = field(
        default=1.0,
        metadata={
            "help": "What each rollback multiplies the learning rate with, above 0 and at most 1. The last rollback "
            "that is allowed uses 0.5 or less."
        },
    )
    divguard_rewarm_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps over which the learning rate rises again after a rollback; 0 for none."
        },
    )
    divguard_restore_rng: bool = field(
        default=False,
        metadata={
            "help": "Also put the random number generators back at a rollback. Off, so that dropout and augmentation "
            "do not repeat what went wrong."
        },
    )
    divguard_snapshot_steps: int = field(
        default=0,
        metadata={
            "help": "Keep trainable parameters and optimizer in CPU memory every so many steps (the last three, or "
            "four that are spread out if they are close together, and those of the start), so that a rollback needs "
            "no checkpoint. 0 keeps none."
        },
    )

    def __post_init__(self) -> None:
        self._check_divguard_fields()
        if self.preserve_best_model:
            self._take_ranking_metric()
        # The parent couples load_best_model_at_end to aligned save and eval steps. An evaluation before every
        # save makes that needless, so the parent checks everything else with it switched off.
        lift_alignment = self.eval_on_save and bool(getattr(self, "load_best_model_at_end", False))
        if lift_alignment:
            self._fill_metric_for_best_model("loss")
            self.load_best_model_at_end = False
        try:
            super().__post_init__()
        finally:
            if lift_alignment:
                self.load_best_model_at_end = True
        if self.eval_on_save:
            check_something_is_saved(self)
        if self.preserve_best_model:
            check_ranking_has_evaluations(self)

    @property
    def divguard_greater_is_better(self) -> bool | None:
        """Direction of the ranking metric as it will be used; ``None`` for an unknown name."""
        if self.best_model_greater_is_better is not None:
            return bool(self.best_model_greater_is_better)
        host_metric, host_direction = (
            getattr(self, "metric_for_best_model", None),
            getattr(self, "greater_is_better", None),
        )
        is_same = host_metric is None or with_eval_prefix(host_metric) == self.divguard_ranking_key
        if is_same and host_direction is not None:
            return bool(host_direction)
        return greater_is_better(self.divguard_ranking_key)

    @property
    def divguard_ranking_key(self) -> str:
        """Key of the ranking metric in the evaluation's results, with ``eval_``.

        It is ``best_model_metric``. Where that was left alone and no best checkpoints are
        preserved, it is the metric that the stock Trainer tracks, if it tracks one.
        """
        host_metric = getattr(self, "metric_for_best_model", None)
        if host_metric is not None and not self.preserve_best_model and self.best_model_metric == "loss":
            return with_eval_prefix(host_metric)
        return with_eval_prefix(self.best_model_metric)

    def _check_divguard_fields(self) -> None:
        for name in (
            "preserve_best_model",
            "eval_on_save",
            "divguard_checksums",
            "divguard_fsync",
            "divguard_restore_rng",
        ):
            require_bool(name, getattr(self, name))
        self.best_model_greater_is_better = optional_bool(  # type: ignore[assignment]
            "best_model_greater_is_better", self.best_model_greater_is_better
        )
        if not isinstance(self.best_model_metric, str) or not self.best_model_metric.strip():
            raise ValueError(
                f"`best_model_metric` must be the name of an evaluation metric, got {self.best_model_metric!r}."
            )
        require_whole(
            "preserve_n_best",
            self.preserve_n_best,
            "checkpoints",
            at_least=1,
            instead=" To keep no best checkpoint, set `preserve_best_model=False`.",
        )
        require_choice("divguard_save_mode", self.divguard_save_mode, SaveMode)
        require_choice("divguard_on_save_error", self.divguard_on_save_error, Literal["raise", "continue"])
        check_signals(self, "divguard_save_on_signal")
        require_choice("divguard_detector", self.divguard_detector, DetectorName)
        require_choice("divguard_action", self.divguard_action, Action)
        require_whole("divguard_check_steps", self.divguard_check_steps, "optimizer steps", at_least=1)
        require_whole("divguard_max_rollbacks", self.divguard_max_rollbacks, "rollbacks", at_least=1)
        for name in ("cooldown_steps", "rollback_margin_steps", "rewarm_steps", "snapshot_steps"):
            require_whole(
                f"divguard_{name}", getattr(self, f"divguard_{name}"), "optimizer steps", at_least=0
            )
        factor = self.divguard_rollback_lr_factor
        if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0.0 < factor <= 1.0:
            raise ValueError(f"`divguard_rollback_lr_factor` must be above 0 and at most 1, got {factor!r}.")
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
                "`divguard_detector` "
                "is 'none'. Set it to one of adaptive, ema, window, nonfinite."
            )

    def _take_ranking_metric(self) -> None:
        """Let the parent's own best-model bookkeeping use the same metric and direction."""
        host_metric = getattr(self, "metric_for_best_model", None)
        if host_metric is not None and with_eval_prefix(host_metric) != self.divguard_ranking_key:
            raise ValueError(
                f"`metric_for_best_model={host_metric!r}` and `best_model_metric={self.best_model_metric!r}` name two "
                "metrics, and there can be one best checkpoint only. Set both to the same metric, or leave "
                "`metric_for_best_model` out."
            )
        host_direction = getattr(self, "greater_is_better", None)
        own_direction: Any = self.best_model_greater_is_better  # a truth value or None by now
        if own_direction is not None and host_direction is not None and bool(host_direction) != own_direction:
            raise ValueError(
                f"`greater_is_better={host_direction}` and `best_model_greater_is_better={own_direction}` contradict "
                "each other. Set one of them, or both to the same value."
            )
        if self.divguard_greater_is_better is None:
            raise ValueError(
                f"The direction of `best_model_metric={self.best_model_metric!r}` is not known. Set "
                "`best_model_greater_is_better` to true if a greater value is better, else to false."
            )
        self._fill_metric_for_best_model(self.best_model_metric)

    def _fill_metric_for_best_model(self, metric: str) -> None:
        host: Any = self  # fields of the class that is extended
        if host.metric_for_best_model is None:
            host.metric_for_best_model = metric
        if host.greater_is_better is None:
            if self.preserve_best_model:
                host.greater_is_better = self.divguard_greater_is_better
            else:
                host.greater_is_better = not host.metric_for_best_model.endswith("loss")


def options_of(args: Any) -> Any:
    """Return what holds the options: ``args`` itself, or all defaults for a stock ``TrainingArguments``."""
    if isinstance(args, DivGuardArgumentsMixin):
        return args
    defaults = {option.name: option.default for option in fields(DivGuardArgumentsMixin)}
    return SimpleNamespace(**defaults, divguard_greater_is_better=False, divguard_ranking_key="eval_loss")


@dataclass
class DivGuardTrainingArguments(DivGuardArgumentsMixin, TrainingArguments):
    """``transformers.TrainingArguments`` with the options of hf_divguard.

    See :class:`DivGuardArgumentsMixin` for the fields that are added.

    Example:
        >>> args = DivGuardTrainingArguments(
        ...     "out", save_steps=7, save_total_limit=2, eval_on_save=True,
        ...     preserve_best_model=True, best_model_metric="accuracy", use_cpu=True)
        >>> args.divguard_ranking_key, args.divguard_greater_is_better
        ('eval_accuracy', True)
    """
