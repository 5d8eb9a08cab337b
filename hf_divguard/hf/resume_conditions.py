"""What a run trains under, and what of it has changed when the run is resumed."""

from __future__ import annotations

from typing import Any

__all__ = ["changed_conditions", "conditions_of"]

_CONDITIONS = (
    "world_size",
    "train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "fp16",
    "bf16",
    "seed",
    "data_seed",
)
_OF_A_SCHEDULE = ("max_steps", "num_train_epochs", "warmup_steps", "warmup_ratio")


def conditions_of(args: Any, *, on_logs: bool) -> dict[str, Any]:
    """Return the arguments on which the level of the training loss depends, as JSON values.

    Args:
        args: The ``TrainingArguments``.
        on_logs: Whether losses come from logs, whose noise depends on their spacing.
    """
    names = [*_CONDITIONS]
    schedule = getattr(args, "lr_scheduler_type", "linear")
    is_constant = str(getattr(schedule, "value", schedule)).startswith("constant")
    names += ("warmup_steps", "warmup_ratio") if is_constant else _OF_A_SCHEDULE
    if on_logs:
        names += ("logging_strategy", "logging_steps")
    conditions = {}
    for name in names:
        value = getattr(args, name, None)
        value = getattr(value, "value", value)
        conditions[name] = value if isinstance(value, (int, float, type(None))) else str(value)
    conditions["optimizer_saved"] = not getattr(args, "save_only_model", False)
    conditions["ignore_data_skip"] = bool(getattr(args, "ignore_data_skip", False))
    return conditions


def changed_conditions(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Return in words what differs so that the loss may be higher after a resume; empty if nothing does.

    Example:
        >>> changed_conditions({"learning_rate": 1e-3, "seed": 1}, {"learning_rate": 2e-3, "seed": 1})
        '`learning_rate` was 0.001 and is 0.002'
    """
    if not isinstance(before, dict) or now is None:
        return ""
    changes = [
        f"`{name}` was {before[name]} and is {value}"
        for name, value in now.items()
        if name in before and before[name] != value and name not in ("optimizer_saved", "ignore_data_skip")
    ]
    if before.get("optimizer_saved") is False:
        changes.append("the checkpoint holds no optimizer")
    if now.get("ignore_data_skip"):
        changes.append("`ignore_data_skip` starts the data from the beginning")
    return "; ".join(changes)
