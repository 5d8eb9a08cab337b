"""The options of ranking: which checkpoints are kept, and what they are ranked by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_divguard.core.metrics import (
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    greater_is_better,
    with_eval_prefix,
)
from hf_divguard.hf.options.values import did_you_mean, optional_bool, require_bool, require_whole

__all__ = ["BestCheckpointOptions"]


@dataclass(repr=False, eq=False)
class BestCheckpointOptions:
    """Which checkpoints are kept, and by which metric they are ranked."""

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

    def _check_values(self) -> None:
        for name in ("preserve_best_model", "eval_on_save"):
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
            likely = did_you_mean(
                self.best_model_metric.removeprefix("eval_"), HIGHER_IS_BETTER | LOWER_IS_BETTER
            )
            raise ValueError(
                f"The direction of `best_model_metric={self.best_model_metric!r}` is not known.{likely} Set "
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
