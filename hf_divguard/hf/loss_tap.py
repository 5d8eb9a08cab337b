"""The loss of every optimizer step as the model gave it, without waiting for the device at each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["LossTap", "StepValues"]


@dataclass(frozen=True, slots=True)
class StepValues:
    """What one optimizer step showed.

    Args:
        step: The step, counted as ``TrainerState.global_step`` after it.
        loss: Its training loss: the micro-batches of the step together, the mean over all
            ranks. Not filtered; NaN on any rank makes it NaN.
        grad_norm: Norm of the gradient before clipping; ``None`` where the host has none.
    """

    step: int
    loss: float
    grad_norm: float | None


class LossTap:
    """Collects losses on the device and brings them to the host a few steps at a time.

    The host already scales the loss of each micro-batch to its share of the step (by the
    number of items, or by the number of micro-batches), so the loss of a step is the sum
    over its micro-batches.

    Args:
        check_steps: Optimizer steps between two transfers, at least 1.
        world_size: Number of ranks; with more than one the values are averaged over them.
    """

    def __init__(self, check_steps: int, world_size: int) -> None:
        self._check_steps = check_steps
        self._world_size = world_size if dist.is_available() and dist.is_initialized() else 1
        self._running: torch.Tensor | None = None
        self._steps: list[int] = []
        self._losses: list[torch.Tensor] = []
        self._grad_norms: list[Any] = []
        self._last_drain = 0

    def start(self, step: int) -> None:
        """Begin at ``step``, with nothing collected."""
        self._running = None
        self._last_drain = step
        self._steps, self._losses, self._grad_norms = [], [], []

    def add_micro_batch(self, loss: torch.Tensor) -> None:
        """Take the loss that ``training_step`` returned for one micro-batch."""
        loss = loss.detach()
        if self._running is None:
            # A copy: a compiled model may reuse the memory of its output for the next batch. At least float32:
            # the sum over micro-batches must not lose what half precision cannot hold.
            self._running = loss.to(torch.promote_types(loss.dtype, torch.float32), copy=True)
        else:
            self._running += loss

    def end_step(self, step: int, grad_norm: Any) -> None:
        """Close the optimizer step that ``global_step`` now counts."""
        if self._running is None or (self._steps and self._steps[-1] == step):
            return
        self._steps.append(step)
        self._losses.append(self._running.reshape(()))
        self._grad_norms.append(grad_norm)
        self._running = None

    def is_due(self, step: int) -> bool:
        """Return whether ``check_steps`` have gone by since the last transfer."""
        return step - self._last_drain >= self._check_steps

    def drain(self, step: int) -> list[StepValues]:
        """Return what was collected, in one transfer. Every rank has to call it at the same step."""
        self._last_drain = step
        if not self._steps:
            return []
        steps, losses = self._steps, torch.stack(self._losses)
        if self._world_size > 1:
            dist.all_reduce(losses)
            losses /= self._world_size
        on_device = [norm for norm in self._grad_norms if isinstance(norm, torch.Tensor)]
        columns = [losses, *(norm.detach().to(losses).reshape(1) for norm in on_device)]
        numbers = torch.cat(columns).tolist()
        brought = iter(numbers[len(steps) :])
        norms = [
            next(brought) if isinstance(norm, torch.Tensor) else (None if norm is None else float(norm))
            for norm in self._grad_norms
        ]
        self._steps, self._losses, self._grad_norms = [], [], []
        return [StepValues(*values) for values in zip(steps, numbers, norms, strict=False)]
