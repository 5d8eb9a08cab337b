"""The metric that ranks checkpoints, taken out of the results of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_divguard.errors import MetricNotFoundError
from hf_divguard.hf.options.values import did_you_mean

__all__ = ["metric_not_found", "metric_value"]


def metric_not_found(asked: str, key: str, metrics: Mapping[str, Any]) -> MetricNotFoundError:
    """Return the error for an evaluation without the ranking metric.

    Args:
        asked: ``best_model_metric`` as it was given.
        key: Its key in the results.
        metrics: The results.
    """
    there = sorted(name for name in metrics if name.startswith("eval_"))
    return MetricNotFoundError(
        f"`best_model_metric={asked!r}` ranks checkpoints, but the evaluation produced no `{key}`. It produced "
        f"{there}.{did_you_mean(key, there)} Set `best_model_metric` to one of them, or let `compute_metrics` return it."
    )


def metric_value(key: str, metrics: Mapping[str, Any]) -> float:
    """Return the ranking metric of an evaluation.

    Raises:
        TypeError: If it is not a number.
    """
    try:
        return float(metrics[key])
    except (TypeError, ValueError):
        raise TypeError(
            f"The metric that ranks checkpoints must be a number, but `{key}` is {metrics[key]!r}. Let `compute_metrics` "
            "return a number, or set another `best_model_metric`."
        ) from None
