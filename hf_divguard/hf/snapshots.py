"""Copies of the training state in CPU memory, to go back to without a checkpoint on disk."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from hf_divguard.core.rollback.thinning import next_to_drop
from hf_divguard.errors import CheckpointError
from hf_divguard.hf.host import Host
from hf_divguard.hf.rates import follows_metrics, load_schedule, replace_optimizer_state

__all__ = ["Snapshot", "Snapshots", "restore_snapshot"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Trainable parameters, buffers, optimizer and scaler of one step, in CPU memory."""

    step: int
    tensors: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None
    rng: dict[str, Any]
    callbacks: dict[str, Any]


# From the onset of a fault to the look that shows it, beside the steps between two looks.
_STEPS_UNTIL_FOUND = 30


class Snapshots:
    """A few snapshots of a run: of its start, the newest ones, and some that are older than detection takes.

    Args:
        every: Optimizer steps between two snapshots; 0 takes none.
        check_steps: Steps between two looks at the losses.
        margin_steps: How much older than needed a state has to be.
        with_optimizer: Whether the optimizer is kept too; without it only the weights can be compared.
    """

    def __init__(
        self, every: int, *, check_steps: int, margin_steps: int, with_optimizer: bool = True
    ) -> None:
        self._every = every
        self.with_optimizer = with_optimizer
        self._reach = check_steps + margin_steps + _STEPS_UNTIL_FOUND
        # Three are enough to reach back where they are far apart.
        self._keep = 3 if 2 * every >= self._reach else 4
        self._start: Snapshot | None = None
        self._recent: list[Snapshot] = []

    def is_due(self, step: int) -> bool:
        """Return whether ``step`` gets a snapshot."""
        return self._every > 0 and step % self._every == 0

    def take(self, host: Host, step: int, callbacks: dict[str, Any]) -> None:
        """Copy the present state into CPU memory."""
        if self._every <= 0 or any(kept.step == step for kept in self.all()):
            return
        snapshot = self.copy_of_now(host, step, callbacks)
        if self._start is None:
            self._start = snapshot
        else:
            self._recent.append(snapshot)
        if len(self._recent) > self._keep:
            dropped = next_to_drop([kept.step for kept in self._recent], self._reach)
            self._recent = [kept for kept in self._recent if kept.step != dropped]

    def copy_of_now(self, host: Host, step: int, callbacks: dict[str, Any]) -> Snapshot:
        """Return a copy of the present state."""
        return _copy_of_now(host, step, callbacks, self.with_optimizer)

    @property
    def is_on(self) -> bool:
        """Whether states are kept that a rollback can restore."""
        return self._every > 0 and self.with_optimizer

    def all(self) -> list[Snapshot]:
        """Return the snapshots, oldest first."""
        return ([self._start] if self._start is not None else []) + self._recent

    def of(self, step: int) -> Snapshot:
        """Return the snapshot of ``step``, which is there."""
        return next(kept for kept in self.all() if kept.step == step)

    def drop_after(self, step: int) -> None:
        """Forget the snapshots that are newer than ``step``."""
        self._recent = [kept for kept in self._recent if kept.step <= step]
        if self._start is not None and self._start.step > step:
            self._start = None


def _copy_of_now(host: Host, step: int, callbacks: dict[str, Any], with_optimizer: bool) -> Snapshot:
    scaler = host.scaler
    rng: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state_all()
    return Snapshot(
        step,
        {name: tensor.detach().to("cpu", copy=True) for name, tensor in _kept_tensors(host)},
        _to_cpu(host.optimizer.state_dict()) if with_optimizer else {},
        copy.deepcopy(host.scheduler.state_dict()),
        copy.deepcopy(scaler.state_dict()) if scaler is not None else None,
        rng,
        copy.deepcopy(callbacks),
    )


def _kept_tensors(host: Host) -> list[tuple[str, torch.Tensor]]:
    """Return what training changes or may change: what takes a gradient, what the optimizer holds, every buffer."""
    held = _held_by_optimizer(host)
    kept = [
        (name, each) for name, each in host.model.named_parameters() if each.requires_grad or id(each) in held
    ]
    return [*kept, *host.model.named_buffers()]


def _held_by_optimizer(host: Host) -> set[int]:
    return {id(each) for group in host.optimizer.param_groups for each in group["params"]}


def restore_snapshot(
    host: Host, snapshot: Snapshot, *, with_rng: bool, rate_factor: float, weights_only: bool = False
) -> None:
    """Put a snapshot into the running trainer, as ``restore_checkpoint`` does with a checkpoint.

    Args:
        host: The host.
        snapshot: The snapshot; it stays as it is.
        with_rng: Also restore the random number generators.
        rate_factor: By how much the learning rate has been lowered for good since then.
        weights_only: Put back the weights, and nothing else.

    Raises:
        CheckpointError: If the optimizer holds a parameter that the snapshot lacks: one that
            was frozen, and in no optimizer, when it was taken. Nothing is changed then.
    """
    held, parameters = _held_by_optimizer(host), dict(host.model.named_parameters())
    lacking = [name for name, each in parameters.items() if id(each) in held and name not in snapshot.tensors]
    if lacking:
        named = ", ".join(f"`{name}`" for name in lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise CheckpointError(
            f"The snapshot of step {snapshot.step} lacks {named}, which the optimizer was given only after it was taken."
        )
    present = parameters | dict(host.model.named_buffers())
    with torch.no_grad():
        for name, tensor in snapshot.tensors.items():
            if name in present:
                present[name].copy_(tensor)
    if weights_only:
        return
    # The optimizer takes over tensors it is given as they are; the snapshot must stay as it was.
    replace_optimizer_state(host, _to_cpu(snapshot.optimizer))
    if follows_metrics(host):
        load_schedule(host, copy.deepcopy(snapshot.schedule), rate_factor)
    scaler = host.scaler
    if scaler is not None and snapshot.scaler is not None:
        scaler.load_state_dict(snapshot.scaler)
    if with_rng:
        random.setstate(snapshot.rng["python"])
        numpy.random.set_state(snapshot.rng["numpy"])
        torch.random.set_rng_state(snapshot.rng["cpu"])
        if "cuda" in snapshot.rng:
            torch.cuda.set_rng_state_all(snapshot.rng["cuda"])


def _to_cpu(value: Any) -> Any:
    """Return a copy of a nested state with every tensor copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_cpu(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_cpu(entry) for entry in value)
    return value
