"""Puts weights, optimizer and scaler of an earlier step into a running loop; the schedule stays where it is."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Snapshot", "Snapshots", "restore_checkpoint", "scale_rates", "scheduled_rates"]


def restore_checkpoint(trainer: Any, checkpoint: str, *, with_rng: bool = False) -> None:
    """Load weights, optimizer and gradient scaler of ``checkpoint`` into the running ``trainer``.

    The parameter objects stay the same. The position of the learning-rate schedule, the
    data iterator and (unless asked for) the random number generators are left alone.

    Raises:
        FileNotFoundError: If the checkpoint has no optimizer.
    """
    optimizer_file = os.path.join(checkpoint, "optimizer.pt")
    if not os.path.isfile(optimizer_file):
        raise FileNotFoundError(
            f"{checkpoint} has no optimizer.pt, so training cannot go back to it. Keep `save_only_model=False`."
        )
    trainer._load_from_checkpoint(checkpoint)
    # To the CPU first: `load_state_dict` moves each tensor to the device of its parameter.
    state = torch.load(optimizer_file, map_location="cpu", weights_only=True)
    _load_optimizer(trainer, state)
    if getattr(trainer.accelerator, "scaler", None) is not None:
        trainer._load_scaler(checkpoint)
    if with_rng:
        trainer._load_rng_state(checkpoint)


def _load_optimizer(trainer: Any, state: dict[str, Any]) -> None:
    rates = scheduled_rates(trainer)
    trainer.optimizer.load_state_dict(state)
    _set_rates(trainer.optimizer, rates)


def scheduled_rates(trainer: Any) -> list[float]:
    """Return the learning rate that the schedule has for each parameter group now."""
    schedule = _inner(trainer.lr_scheduler)
    groups = trainer.optimizer.param_groups
    last = getattr(schedule, "_last_lr", None)
    rates = last if last is not None and len(last) == len(groups) else [group["lr"] for group in groups]
    return [float(rate) for rate in rates]


def _set_rates(optimizer: Any, rates: list[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def scale_rates(trainer: Any, factor: float) -> None:
    """Multiply the learning rate with ``factor`` for good, whatever the schedule does next.

    Schedules that compute the rate from a base get that base scaled; it is part of their
    state and so survives in checkpoints. Those that work on the rate itself keep it in the
    optimizer.
    """
    for schedule in _walk(_inner(trainer.lr_scheduler)):
        for name in ("base_lrs", "_last_lr", "max_lrs"):
            rates = getattr(schedule, name, None)
            if isinstance(rates, list):
                setattr(schedule, name, [rate * factor for rate in rates])
    for group in trainer.optimizer.param_groups:
        for name in ("initial_lr", "max_lr", "min_lr"):
            if name in group:
                group[name] = group[name] * factor
    _set_rates(trainer.optimizer, [float(group["lr"]) * factor for group in trainer.optimizer.param_groups])


def _inner(schedule: Any) -> Any:
    """Return the scheduler inside accelerate's wrapper."""
    return getattr(schedule, "scheduler", schedule)


def _walk(schedule: Any) -> list[Any]:
    found = [schedule]
    for inner in getattr(schedule, "_schedulers", []):
        found += _walk(inner)
    return found


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Trainable parameters, buffers, optimizer and scaler of one step, in CPU memory."""

    step: int
    tensors: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    callbacks: dict[str, Any]


class Snapshots:
    """The last few snapshots of a run, and the one of its start.

    Args:
        every: Optimizer steps between two snapshots; 0 takes none.
        keep: How many are kept beside the one of the start.
    """

    def __init__(self, every: int, keep: int = 3) -> None:
        self._every = every
        self._start: Snapshot | None = None
        self._recent: deque[Snapshot] = deque(maxlen=keep)

    def is_due(self, step: int) -> bool:
        """Return whether ``step`` gets a snapshot."""
        return self._every > 0 and step % self._every == 0

    def take(self, trainer: Any, step: int, callbacks: dict[str, Any]) -> None:
        """Copy the present state into CPU memory."""
        if self._every <= 0:
            return
        model = trainer.model
        tensors = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter)
        }
        scaler = getattr(trainer.accelerator, "scaler", None)
        snapshot = Snapshot(
            step,
            tensors,
            _to_cpu(trainer.optimizer.state_dict()),
            scaler.state_dict() if scaler else None,
            callbacks,
        )
        if self._start is None:
            self._start = snapshot
        else:
            self._recent.append(snapshot)

    def all(self) -> list[Snapshot]:
        """Return the snapshots, oldest first."""
        return ([self._start] if self._start is not None else []) + list(self._recent)

    def drop_after(self, step: int) -> None:
        """Forget the snapshots that are newer than ``step``."""
        self._recent = deque((kept for kept in self._recent if kept.step <= step), maxlen=self._recent.maxlen)

    @staticmethod
    def restore(trainer: Any, snapshot: Snapshot) -> None:
        """Put a snapshot into the running ``trainer``."""
        model = trainer.model
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name in snapshot.tensors:
                    tensor.copy_(snapshot.tensors[name])
        # The optimizer takes over tensors it is given as they are; the snapshot must stay as it was.
        _load_optimizer(trainer, _to_cpu(snapshot.optimizer))
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None and snapshot.scaler is not None:
            scaler.load_state_dict(snapshot.scaler)


def _to_cpu(value: Any) -> Any:
    """Return a copy of a nested state with every tensor copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_cpu(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_cpu(entry) for entry in value)
    return value
