"""The raw loss of every optimizer step, delivered to subscribers without waiting for the device at each step."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist

from hf_divguard.core.detection.detector import StepValues
from hf_divguard.hf.host import Host

__all__ = ["LossListener", "StepLosses", "gradient_norm"]


class LossListener(Protocol):
    """Takes the raw losses of the last few steps. Detectors and the rollback do."""

    def on_raw_losses(self, values: list[StepValues], args: Any, state: Any, control: Any) -> None:
        """Take what the steps since the last delivery showed, oldest first."""


class StepLosses:
    """Collects losses on the device and delivers them a few steps at a time.

    The host scales the loss of each micro-batch to its share of the step (by the number of
    items, or by the number of micro-batches), so the loss of a step is the sum over its
    micro-batches. With several ranks it is the mean over them.

    Losses are delivered every ``check_steps`` steps, and before the host logs, evaluates,
    saves or stops. Without a subscriber nothing is collected.

    Args:
        check_steps: Optimizer steps between two deliveries, at least 1.
        world_size: Number of ranks.

    Example:
        >>> losses = StepLosses(check_steps=10, world_size=1)
        >>> losses.is_collecting = True
        >>> losses.micro_batch(torch.tensor(1.0) / 2)
        >>> losses.micro_batch(torch.tensor(3.0) / 2)
        >>> losses.close_step(1, grad_norm=torch.tensor(0.5))
        >>> losses.drain(1)
        [StepValues(step=1, loss=2.0, grad_norm=0.5)]
    """

    def __init__(self, check_steps: int, world_size: int) -> None:
        self._check_steps = check_steps
        self._world_size = world_size if dist.is_available() and dist.is_initialized() else 1
        self._listeners: list[LossListener] = []
        self.is_collecting = False
        self.start(0)

    def start(self, step: int) -> None:
        """Begin at ``step``, with nothing collected."""
        self.micro_batches: list[torch.Tensor] = []
        """Losses of the micro-batches of the present step."""
        self._parts = 1
        self._last_step = self._last_drain = step
        self._steps: list[int] = []
        self._losses: list[torch.Tensor] = []
        self._grad_norms: list[Any] = []

    def subscribe(self, listener: LossListener) -> None:
        """Deliver losses to ``listener`` from now on, after the listeners before it."""
        self._listeners.append(listener)
        self.is_collecting = True

    def close(self) -> None:
        """Deliver nothing more."""
        self._listeners.clear()
        self.is_collecting = False

    # ---- one step

    def micro_batch(self, loss: torch.Tensor) -> None:
        """After the backward pass of a micro-batch: keep its loss."""
        if self.is_collecting:
            # A copy: a compiled model may reuse the memory of its output for the next batch.
            self.micro_batches.append(loss.detach().clone())

    def begin_epoch(self) -> None:
        """Note that micro-batches left over from the last epoch join the first step of this one.

        It happens with data sets of unknown length, when they end within an accumulation.
        What is left over was scaled as a step of its own.
        """
        if self.micro_batches:
            self._parts += 1

    def end_step(self, host: Host, grad_norm: Any) -> bool:
        """Close the present step; deliver where that is due.

        Returns:
            Whether losses were delivered. The same on every rank.
        """
        if not self.is_collecting:
            return False
        step, control = host.state.global_step, host.control
        if step > self._last_step:  # at the end of an epoch the host comes here twice in one step
            self.close_step(step, grad_norm)
            self._last_step = step
        acts = control.should_log or control.should_evaluate or control.should_save
        if not (acts or control.should_training_stop or step - self._last_drain >= self._check_steps):
            return False
        self.deliver(host)
        return True

    def deliver(self, host: Host) -> None:
        """Deliver what was collected so far. All ranks call it at the same step.

        A save outside of the end of a step, as on SIGTERM, closes the step that was just taken.
        """
        if not self.is_collecting:
            return
        if host.state.global_step > self._last_step:
            self.close_step(host.state.global_step, None)
            self._last_step = host.state.global_step
        values = self.drain(host.state.global_step)
        if values:
            for listener in self._listeners:
                listener.on_raw_losses(values, host.args, host.state, host.control)

    def close_step(self, step: int, grad_norm: Any) -> None:
        """Close the optimizer step that ``global_step`` now counts."""
        if not self.micro_batches:
            return
        # At least float32: the sum over micro-batches must not lose what half precision cannot hold.
        first = self.micro_batches[0]
        loss = first.float() if first.dtype.itemsize < 4 else first
        for other in self.micro_batches[1:]:
            loss = loss + other
        self._steps.append(step)
        self._losses.append(loss / self._parts)
        self._grad_norms.append(grad_norm)
        self.micro_batches, self._parts = [], 1

    def drain(self, step: int) -> list[StepValues]:
        """Return what was collected, in one transfer. Every rank has to call it at the same step."""
        self._last_drain = step
        if not self._steps:
            return []
        first = self._losses[0]
        on_device = [_full(norm).to(first) for norm in self._grad_norms if isinstance(norm, torch.Tensor)]
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


def _full(norm: torch.Tensor) -> torch.Tensor:
    """Return a norm that is sharded over ranks (FSDP) as a plain tensor."""
    full: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return full.detach()


def _number(norm: Any) -> float | None:
    return None if norm is None else float(norm)


def gradient_norm(model: torch.nn.Module) -> torch.Tensor | None:
    """Return the norm of all gradients of ``model`` together; ``None`` if it has none.

    For hosts that do not measure it: Transformers 4 does so only to clip.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> layer.weight.grad, layer.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
        >>> gradient_norm(layer)
        tensor(5.)
    """
    norms = [_norm(weight.grad.detach()) for weight in model.parameters() if weight.grad is not None]
    if not norms:
        return None
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    is_half = values.dtype in (torch.float16, torch.bfloat16)
    return torch.linalg.vector_norm(values, dtype=torch.float32 if is_half else None).float()
