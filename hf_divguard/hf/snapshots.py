"""Copies of the training state in CPU memory, to go back to without a checkpoint on disk."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from hf_divguard.core.rollback.thinning import next_to_drop
from hf_divguard.hf.engines import KeptState, engine_of
from hf_divguard.hf.host import Host

__all__ = ["Snapshot", "Snapshots", "restore_random_states"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """This rank's part of the training state of one step, in CPU memory."""

    step: int
    state: KeptState
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None
    rng: dict[str, Any]
    callbacks: dict[str, Any]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Trained parameters and buffers, by name."""
        return self.state.tensors


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
        self._delay = 1
        # Three are enough to reach back where they are far apart.
        self._keep = 3 if 2 * every >= self._reach else 4
        self._start: Snapshot | None = None
        self._recent: list[Snapshot] = []
        self.pinned: int | None = None
        """Step of a state that makes room for no other."""

    def is_due(self, step: int) -> bool:
        """Return whether ``step`` gets a snapshot."""
        return self._every > 0 and step % self._every == 0

    def note_saved(self, step: int) -> None:
        """Take note of a checkpoint; here it makes no difference."""

    def take(self, host: Host, step: int, callbacks: dict[str, Any]) -> None:
        """Copy the present state into CPU memory."""
        if self._every <= 0 or any(kept.step == step for kept in self.all()):
            return
        snapshot = self.copy_of_now(host, step, callbacks)
        if self._start is None:
            self._start = snapshot
        else:
            self._recent.append(snapshot)
        self._make_room(self._keep)

    def _make_room(self, keep: int) -> None:
        if len(self._recent) > keep:
            free = [kept.step for kept in self._recent if kept.step != self.pinned]
            dropped = next_to_drop(free, self._reach, self._delay)
            self._recent = [kept for kept in self._recent if kept.step != dropped]

    def copy_of_now(self, host: Host, step: int, callbacks: dict[str, Any]) -> Snapshot:
        """Return a copy of the present state."""
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
            engine_of(host).keep(with_optimizer=self.with_optimizer),
            copy.deepcopy(host.scheduler.state_dict()),
            copy.deepcopy(scaler.state_dict()) if scaler is not None else None,
            rng,
            copy.deepcopy(callbacks),
        )

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

    def clear(self) -> None:
        """Forget all snapshots."""
        self._start, self._recent = None, []

    def drop_after(self, step: int) -> None:
        """Forget the snapshots that are newer than ``step``."""
        self._recent = [kept for kept in self._recent if kept.step <= step]
        if self._start is not None and self._start.step > step:
            self._start = None


def restore_random_states(rng: dict[str, Any]) -> None:
    """Put back the states of the random number generators that a snapshot holds."""
    random.setstate(rng["python"])
    numpy.random.set_state(rng["numpy"])
    torch.random.set_rng_state(rng["cpu"])
    if "cuda" in rng:
        torch.cuda.set_rng_state_all(rng["cuda"])
