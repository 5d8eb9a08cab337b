"""The loss of every optimizer step as the model gave it, without waiting for the device at each."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hf_divguard.core.detection.detector import StepValues

__all__ = ["LossTap", "StepValues"]


class LossTap:
    """Collects losses on the device and brings them to the host a few steps at a time.

    The host already scales the loss of each micro-batch to its share of the step (by the
    number of items, or by the number of micro-batches), so the loss of a step is the sum
    over its micro-batches.

    Args:
        check_steps: Optimizer steps between two transfers, at least 1.
        world_size: Number of ranks; with more than one the values are averaged over them.

    Example:
        >>> tap = LossTap(check_steps=10, world_size=1)
        >>> for half in (1.0, 3.0):
        ...     tap.add_micro_batch(torch.tensor(half) / 2)
        >>> tap.end_step(1, grad_norm=torch.tensor(0.5))
        >>> tap.drain(1)
        [StepValues(step=1, loss=2.0, grad_norm=0.5)]
    """

    def __init__(self, check_steps: int, world_size: int) -> None:
        self._check_steps = check_steps
        self._world_size = world_size if dist.is_available() and dist.is_initialized() else 1
        self.start(0)

    def start(self, step: int) -> None:
        """Begin at ``step``, with nothing collected."""
        self._running: torch.Tensor | None = None
        self._parts = 1
        self._last_drain = step
        self._steps: list[int] = []
        self._losses: list[torch.Tensor] = []
        self._grad_norms: list[Any] = []

    def begin_epoch(self) -> None:
        """Note that micro-batches left over from the last epoch join the first step of this one.

        It happens with data sets that do not know their length, when they end within an
        accumulation. What is left over was scaled as a step of its own.
        """
        if self._running is not None:
            self._parts += 1

    def add_micro_batch(self, loss: torch.Tensor) -> None:
        """Take the loss that ``training_step`` returned for one micro-batch."""
        loss = loss.detach()
        if self._running is not None:
            self._running += loss
            return
        # A copy: a compiled model may reuse the memory of its output for the next batch. At least float32: the sum
        # over micro-batches must not lose what half precision cannot hold.
        dtype = torch.float32 if loss.dtype.itemsize < 4 else loss.dtype
        self._running = loss.to(dtype, copy=True)

    def end_step(self, step: int, grad_norm: Any) -> None:
        """Close the optimizer step that ``global_step`` now counts."""
        if self._running is None:
            return
        if self._parts > 1:
            self._running /= self._parts
            self._parts = 1
        self._steps.append(step)
        self._losses.append(self._running)
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
        first = self._losses[0]
        on_device = [_whole(norm).to(first) for norm in self._grad_norms if isinstance(norm, torch.Tensor)]
        values = torch.cat([value.reshape(1) for value in (*self._losses, *on_device)])
        if self._world_size > 1:
            dist.all_reduce(values)
            values /= self._world_size
        numbers = values.tolist()
        norms = iter(numbers[len(self._steps) :])
        drained = [
            StepValues(step, loss, next(norms) if isinstance(norm, torch.Tensor) else _number(norm))
            for step, loss, norm in zip(self._steps, numbers, self._grad_norms, strict=False)
        ]
        self._steps, self._losses, self._grad_norms = [], [], []
        return drained


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """Return a norm that is spread over ranks (FSDP) as an ordinary tensor."""
    full: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return full.detach()


def _number(norm: Any) -> float | None:
    return None if norm is None else float(norm)
