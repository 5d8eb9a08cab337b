"""Faults for runs of the tiny model, and what the tests of rollbacks compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_divguard import NonFiniteDetector
from hf_divguard.core.findings import Finding
from tests.tiny import TokenRows, tiny_model

QUICK = {
    "divguard_check_steps": 1,
    "divguard_cooldown_steps": 4,
    "divguard_compare": "off",
    "max_steps": 24,
    "save_steps": 4,
}
"""Options of a short run that looks at every step and does at once what its rule says."""


class HighRate(TrainerCallback):
    """A learning rate that is far too high in some steps."""

    def __init__(self, steps: range, factor: float = 300.0) -> None:
        self.steps, self.factor = steps, factor

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise what the schedule has set for this step."""
        if state.global_step + 1 in self.steps:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= self.factor


class NaNBatch(TrainerCallback):
    """A loss, and so a gradient, that is NaN in some steps."""

    def __init__(self, model: torch.nn.Module, steps: range) -> None:
        self.steps, self.is_on = steps, False
        first = next(module for module in model.modules() if module._parameters)
        first.register_forward_hook(
            lambda module, inputs, output: output * float("nan") if self.is_on and module.training else output
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the outputs of this step NaN, or leave them as they are."""
        self.is_on = state.global_step + 1 in self.steps


class LargeGradients(TrainerCallback):
    """Gradients that the backward pass makes a thousand times too large in some steps."""

    def __init__(self, model: torch.nn.Module, steps: range, factor: float = 1000.0) -> None:
        self.steps, self.is_on = steps, False
        for weight in model.parameters():
            weight.register_hook(lambda gradient: factor * gradient if self.is_on else gradient)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enlarge the gradients of this step, or leave them as they are."""
        self.is_on = state.global_step + 1 in self.steps


class ScriptedRule:
    """A rule that finds something at given steps, each with the onset that is given for it."""

    def __init__(self, onsets: dict[int, int]) -> None:
        self.onsets = onsets

    def observe(self, step: int, value: float) -> Finding | None:
        """Return the finding of ``step`` if there is one."""
        if step not in self.onsets:
            return None
        return Finding(
            step=step,
            onset_step=self.onsets[step],
            kind="jump",
            severity="error",
            metric="loss",
            value=value,
            limit=1.0,
            message=f"`loss` = {value:.3g} at step {step} is what the test says is too much.",
        )

    def reset(self) -> None:
        """Do nothing: there is no state."""

    def state_dict(self) -> dict[str, Any]:
        """Return no state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""


class AtRollback(TrainerCallback):
    """Copies what the loop holds at the moment a rollback is logged."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.optimizers: list[dict[str, Any]] = []
        self.identities: list[list[int]] = []
        self.gradients: list[int] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Copy it if this is the log of a rollback."""
        if "divguard/rollbacks" not in logs:
            return
        model = kwargs["model"]
        self.weights.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        self.optimizers.append(copy.deepcopy(kwargs["optimizer"].state_dict()))
        self.identities.append([id(weight) for weight in model.parameters()])
        self.gradients.append(sum(weight.grad is not None for weight in model.parameters()))


class RatesUsed(TrainerCallback):
    """Notes the learning rate that each update was made with."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the rate of the update that was just made."""
        self.rates[state.global_step + 1] = float(kwargs["optimizer"].param_groups[0]["lr"])


class Stream(IterableDataset):
    """Batches in a given order; remembers which were drawn.

    Args:
        order: Number of the batch for each step.
        batch: Rows per batch.
        wrong: Steps with random labels.
    """

    def __init__(self, order: list[int], batch: int = 4, wrong: range = range(0)) -> None:
        self.order, self.batch, self.wrong = order, batch, wrong
        self.rows = TokenRows(rows=64).rows
        self.drawn: list[int] = []

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        lot = torch.Generator().manual_seed(3)
        for step, number in enumerate(self.order, start=1):
            self.drawn.append(number)
            for place in range(self.batch):
                row = self.rows[(number * self.batch + place) % len(self.rows)]
                labels = torch.randint(0, 16, row.shape, generator=lot) if step in self.wrong else row
                yield {"input_ids": row, "labels": labels}


def saved_weights(checkpoint: Path | str) -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint."""
    return load_file(Path(checkpoint) / "model.safetensors")


def holds(weights: dict[str, torch.Tensor], checkpoint: Path | str) -> bool:
    """Return whether ``weights`` are those of a checkpoint, to the last bit."""
    saved = saved_weights(Path(checkpoint))
    return all(torch.equal(weights[name], tensor) for name, tensor in saved.items())


def same_state(first: Any, second: Any) -> bool:
    """Return whether two nested states are equal, tensors to the last bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_state(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_state, first, second))
    return bool(first == second)


def nan_run(
    make_trainer: Callable[..., Any],
    steps: range,
    *,
    detector: Any = None,
    callbacks: Any = (),
    model: Any = None,
    **options: Any,
) -> Any:
    """Return a quick trainer whose loss is NaN in ``steps`` and that rolls back, on NaN if no detector is given.

    The NaN reaches the weights, so there is something to roll back.
    """
    model = model if model is not None else tiny_model(dropout=options.pop("dropout", 0.0))
    detector = detector or NonFiniteDetector(action="rollback")
    callbacks = [NaNBatch(model, steps), detector, *callbacks]
    options = {**QUICK, "divguard_skip_nonfinite": False, **options}
    return make_trainer(model=model, callbacks=callbacks, **options)


def moves(trainer: Any) -> list[tuple[int, int]]:
    """Return the step and the target step of each rollback."""
    return [
        (event["step"], event["target_step"])
        for event in trainer.divguard_events
        if event["event"] == "rollback"
    ]
