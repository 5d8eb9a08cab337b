"""The faults: 22 kinds, each at six times. They know nothing of the guard that is judged.

A fault acts through a callback at the beginning of a step, through hooks on the model and its parameters, or on the
batch in the data collator. It goes by the optimizer step of the run, which never goes backwards under a rollback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from benchmarks.recovery.data import IGNORED
from benchmarks.recovery.models import Task

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong for some steps.

    Args:
        name: Short name.
        title: What it is.
        half: Half of the benchmark.
        lasts: Steps that it lasts.
        place: Where it acts: on the learning rate, the loss, the gradients, the state (weights or optimizer), or
            the batch.
        cause: What a finding should name as the cause; ``None`` where no comparison is needed (non-finite values).
        plain: Whether nobody could doubt it: the aim for the steps lost is stricter.
        clips: Whether gradients are clipped, in all runs of this fault.
    """

    name: str
    title: str
    half: str
    lasts: int
    place: Literal["rate", "loss", "gradients", "state", "batch"]
    cause: Literal["weights", "data"] | None = "weights"
    plain: bool = False
    clips: bool = True


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("rate_x30", "learning rate x30", "design", 10, "rate", plain=True),
        Fault("rate_x10", "learning rate x10", "design", 20, "rate"),
        Fault("nan_loss", "NaN loss", "design", 1, "loss", None, plain=True),
        Fault(
            "weight_noise",
            "noise on all weights, 1.5 times as wide as they are",
            "design",
            1,
            "state",
            plain=True,
        ),
        Fault(
            "gradients_x1000",
            "gradients x1000 in one direction, no clipping",
            "design",
            5,
            "gradients",
            clips=False,
        ),
        Fault("sign_flip", "gradients with the wrong sign", "design", 20, "gradients"),
        Fault("random_labels", "random labels", "design", 20, "batch", "data"),
        Fault("duplicated_batch", "the same batch again and again", "design", 20, "batch", "data"),
        Fault("optimizer_wiped", "state of the optimizer set to zero", "design", 1, "state"),
        Fault("mixed_up_labels", "labels of other rows", "design", 15, "batch", "data"),
        Fault("blank_inputs", "inputs that are all the same", "design", 12, "batch", "data"),
        Fault("momentum_x50", "first moments x50", "design", 1, "state"),
        Fault("second_moments_lost", "second moments x1e-4", "design", 1, "state"),
        Fault("rate_x100", "learning rate x100", "judge", 5, "rate", plain=True),
        Fault("inf_gradient", "one infinite gradient", "judge", 1, "gradients", None, plain=True),
        Fault("nan_weight", "NaN in one weight", "judge", 1, "state", None, plain=True),
        Fault("weights_zeroed", "half of all weights set to zero", "judge", 1, "state", plain=True),
        Fault("bit_flip", "one weight of every matrix set to 100", "judge", 1, "state", plain=True),
        Fault("decay", "weights x0.7 in every step", "judge", 5, "state", plain=True),
        Fault("garbage", "batches of random inputs and labels", "judge", 10, "batch", "data"),
        Fault("shifted_labels", "every label replaced by the next one", "judge", 20, "batch", "data"),
        Fault("optimizer_corrupted", "random first, tiny second moments", "judge", 1, "state"),
    )
}

TIMES = ("early", "middle", "late", "early twice", "middle twice", "late twice")
SHARE_OF_RUN = {"early": 0.15, "middle": 0.5, "late": 0.85, "late twice": 0.68}
GAP = 25
"""Sound steps between a fault and its second occurrence."""


def bad_steps(fault: Fault, time: str, steps: int, jitter: int) -> list[int]:
    """Return the optimizer steps, counted from 1, in which a fault acts."""
    share = SHARE_OF_RUN.get(time, SHARE_OF_RUN[time.split()[0]])
    first = round(share * steps) + jitter
    found = list(range(first, first + fault.lasts))
    if time.endswith("twice"):
        second = found[-1] + 1 + GAP
        found += range(second, second + fault.lasts)
    return found


class FaultCallback(TrainerCallback):
    """Brings about a fault in the steps it covers, except one in the batches.

    Args:
        fault: The fault.
        steps: The optimizer steps it covers.
        model: The model, whose forward and backward passes get hooks.
    """

    def __init__(self, fault: Fault, steps: list[int], model: Any) -> None:
        self.fault, self.steps = fault, frozenset(steps)
        self.generator = torch.Generator().manual_seed(5)
        self.is_on = False
        if fault.place == "loss":
            model.register_forward_hook(self._poison)
        if fault.place == "gradients":
            for weight in trained(model):
                direction = torch.randn(weight.shape, generator=self.generator)
                weight.register_hook(self._gradient_hook(direction))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do what the fault does before the forward pass."""
        self.is_on = state.global_step + 1 in self.steps
        if not self.is_on:
            return
        if self.fault.place == "rate":
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= float(self.fault.name.removeprefix("rate_x"))
        elif self.fault.place == "state":
            with torch.no_grad():
                STATE_FAULTS[self.fault.name](kwargs["model"], kwargs["optimizer"], self.generator)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the step."""
        self.is_on = False

    def _poison(self, model: Any, inputs: Any, output: Any) -> Any:
        if self.is_on and model.training:
            output["loss"] = output["loss"] * float("nan")
        return output

    def _gradient_hook(self, direction: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(gradient: torch.Tensor) -> torch.Tensor:
            if not self.is_on:
                return gradient
            return GRADIENT_FAULTS[self.fault.name](gradient, direction)

        return change


def trained(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters that are trained."""
    return [weight for weight in model.parameters() if weight.requires_grad]


# ---- gradients


def _x1000(gradient: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return 1000.0 * gradient.pow(2).mean().sqrt() * direction


def _with_infinity(gradient: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    changed = gradient.clone()
    changed.view(-1)[0] = float("inf")
    return changed


GRADIENT_FAULTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "gradients_x1000": _x1000,
    "sign_flip": lambda gradient, direction: -gradient,
    "inf_gradient": _with_infinity,
}


# ---- weights and optimizer


def _noise(model: Any, optimizer: Any, generator: torch.Generator) -> None:
    for weight in trained(model):
        spread = float(weight.std()) if weight.numel() > 1 else 0.0
        weight += 1.5 * spread * torch.randn(weight.shape, generator=generator)


def _zeros(model: Any, optimizer: Any, generator: torch.Generator) -> None:
    for weight in trained(model):
        weight *= (torch.rand(weight.shape, generator=generator) < 0.5).to(weight.dtype)


def _matrices(model: Any) -> list[torch.nn.Parameter]:
    return [weight for weight in trained(model) if weight.dim() >= 2]


def _bit_flip(model: Any, optimizer: Any, generator: torch.Generator) -> None:
    for weight in _matrices(model):
        place = int(torch.randint(0, weight.numel(), (1,), generator=generator))
        weight.view(-1)[place] = 100.0


def _nan(model: Any, optimizer: Any, generator: torch.Generator) -> None:
    _matrices(model)[-1].view(-1)[3] = float("nan")


def _decay(model: Any, optimizer: Any, generator: torch.Generator) -> None:
    for weight in trained(model):
        weight *= 0.7


def _moments(optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for memory in optimizer.state.values():
        for name, value in memory.items():
            if isinstance(value, torch.Tensor) and value.dim() >= 1:
                yield name, value


def _wiped(model: Any, optimizer: Any, generator: torch.Generator) -> None:
    for _, value in _moments(optimizer):
        value.zero_()


def _corrupted(model: Any, optimizer: Any, generator: torch.Generator) -> None:
    for name, value in _moments(optimizer):
        if "sq" in name:
            value *= 1e-4
        else:
            size = value.pow(2).mean().sqrt()
            value.copy_(5.0 * size * torch.randn(value.shape, generator=generator))


def _momentum(model: Any, optimizer: Any, generator: torch.Generator) -> None:
    for name, value in _moments(optimizer):
        if "sq" not in name:
            value *= 50.0


def _second_moments(model: Any, optimizer: Any, generator: torch.Generator) -> None:
    for name, value in _moments(optimizer):
        if "sq" in name:
            value *= 1e-4


STATE_FAULTS: dict[str, Callable[[Any, Any, torch.Generator], None]] = {
    "weight_noise": _noise,
    "weights_zeroed": _zeros,
    "bit_flip": _bit_flip,
    "nan_weight": _nan,
    "decay": _decay,
    "optimizer_wiped": _wiped,
    "optimizer_corrupted": _corrupted,
    "momentum_x50": _momentum,
    "second_moments_lost": _second_moments,
}


# ---- batches


class BatchFault:
    """Changes the batches of some steps; the data collator calls it.

    Args:
        fault: A fault whose place is the batch.
        steps: The optimizer steps it covers.
        task: Says how many labels there are.
    """

    def __init__(self, fault: Fault, steps: list[int], task: Task) -> None:
        self.fault, self.steps, self.labels = fault, frozenset(steps), task.labels
        self.generator = torch.Generator().manual_seed(9)
        self.first: Batch | None = None
        self.last_step = 0

    def __call__(self, batch: Batch, step: int) -> Batch:
        """Return the batch of a step, bad or as it is."""
        if step not in self.steps:
            self.first = None
            return batch
        if self.fault.name == "duplicated_batch":
            self.first = batch if self.first is None else self.first
            return {name: value.clone() for name, value in self.first.items()}
        labels = batch["labels"]
        if self.fault.name == "mixed_up_labels":
            return {**batch, "labels": _of_other_rows(labels)}
        if self.fault.name == "blank_inputs":
            return {
                **batch,
                **{name: _blank(batch[name]) for name in ("pixel_values", "input_ids") if name in batch},
            }
        if self.fault.name == "shifted_labels":
            wrong = (labels + 1) % self.labels
        else:
            wrong = torch.randint(0, self.labels, labels.shape, generator=self.generator)
        changed = {**batch, "labels": torch.where(labels == IGNORED, labels, wrong)}
        if self.fault.name == "garbage":
            changed.update(self._random_inputs(changed))
        return changed

    def _random_inputs(self, batch: Batch) -> Batch:
        if "pixel_values" in batch:
            return {"pixel_values": 3.0 * torch.randn(batch["pixel_values"].shape, generator=self.generator)}
        shape = batch["input_ids"].shape
        return {"input_ids": torch.randint(0, self.labels, shape, generator=self.generator)}


def _of_other_rows(labels: torch.Tensor) -> torch.Tensor:
    """Return the labels of the next row at the places of this one, so that each row keeps the labels it counts."""
    others = labels.roll(1, 0)
    fits = (labels != IGNORED) & (others != IGNORED)
    return torch.where(fits, others, labels)


def _blank(inputs: torch.Tensor) -> torch.Tensor:
    return torch.full_like(inputs, 3) if inputs.dtype == torch.long else torch.zeros_like(inputs)
