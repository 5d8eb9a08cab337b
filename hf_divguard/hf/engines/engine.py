"""What the guards ask of an engine: whatever holds the weights and the optimizer of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hf_divguard.hf.host import Host

__all__ = ["SAFE_ADVICE", "Engine", "InExchange", "KeptState", "Unsupported"]

SAFE_ADVICE = (
    "Set the action to 'stop', and start the script again with resume_from_checkpoint='auto': it passes over "
    "checkpoints that were saved under the fault"
)
"""What to do where a run can be resumed, but not be rolled back inside of its loop."""


@dataclass(frozen=True, slots=True)
class KeptState:
    """What one rank keeps in CPU memory of weights, buffers and optimizer.

    Args:
        tensors: This rank's part of what training changes, by the names of the model.
        optimizer: State of the optimizer, in a form of the engine's own; empty if it is not kept.
    """

    tensors: dict[str, torch.Tensor]
    optimizer: dict[str, Any] = field(default_factory=dict)


class InExchange(Exception):
    """An error in a part of a read that other ranks may be waiting in; its cause is the error."""


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Why a state cannot be put back inside the running loop.

    Args:
        what: What the run trains with, as it stands after "does not work with".
        advice: What to do instead, without a full stop.
    """

    what: str
    advice: str = SAFE_ADVICE


class Engine:
    """Keeps states of a run and puts them back; one for each way of holding weights and optimizer.

    Every rank calls the methods alike and in the same order. A method that may make ranks
    wait for each other says so. Nothing is kept between two calls: parameters may be
    replaced when the host prepares the model.

    Args:
        host: The host.
    """

    name: str = ""
    """Name for messages."""
    forwards_together = False
    """Whether a forward pass takes all ranks, so that all have to take the same number of them."""
    updates_in_backward = False
    """Whether the backward pass of the last micro-batch of a step makes the update, too."""

    puts_together = False
    """Whether what :meth:`read` returns makes ranks wait for each other."""

    def __init__(self, host: Host) -> None:
        self.host = host

    @classmethod
    def is_at_work(cls, host: Host) -> bool:
        """Return whether the run of ``host`` trains with this engine."""
        raise NotImplementedError

    @property
    def skips_by_itself(self) -> bool:
        """Whether the engine leaves out an update by itself if a gradient is not finite."""
        return False

    # ---- what works

    def unsupported(self) -> Unsupported | None:
        """Return why no state can be put back inside the loop; ``None`` if it can."""
        return None

    def why_not_compared(self) -> str | None:
        """Return why kept and present weights cannot be compared; ``None`` if they can."""
        found = self.unsupported()
        return None if found is None else found.what

    def why_nothing_skipped(self) -> str | None:
        """Return why single updates cannot be left out; ``None`` if they can."""
        found = self.unsupported()
        return None if found is None else found.what

    # ---- in memory

    def weights_are_finite(self) -> bool:
        """Return whether this rank's part of the weights that are trained is finite. No rank waits for another."""
        buffers = dict(self.host.model.named_buffers())
        trained = [tensor for name, tensor in self.tensors().items() if name not in buffers]
        return all(bool(torch.isfinite(tensor).all()) for tensor in trained)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return this rank's live part of what training changes or may change: parameters and buffers, by name.

        Writing into a tensor changes the model.
        """
        raise NotImplementedError

    def keep(self, *, with_optimizer: bool = True) -> KeptState:
        """Return a copy of this rank's part in CPU memory."""
        raise NotImplementedError

    def check(self, kept: KeptState, step: int) -> None:
        """Raise if ``kept`` lacks something that training changes by now. No rank waits for another.

        Raises:
            CheckpointError: If it does; ``step`` is named in the sentence.
        """

    def put_back(self, kept: KeptState, *, weights_only: bool = False) -> None:
        """Put a kept state back. It stays as it is; the learning rates stay those of now."""
        raise NotImplementedError

    @contextlib.contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Put this rank's part of the weights back as it was if what is done in here fails."""
        yield

    @contextlib.contextmanager
    def swapped(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Let the model compute with kept ``tensors``; everything is as before at the end.

        An empty mapping stands for the present weights; buffers are put back all the same.
        """
        raise NotImplementedError
        yield

    # ---- on disk

    def read(self, checkpoint: str, *, weights_only: bool = False) -> Callable[[], None]:
        """Read this rank's part of a checkpoint, and return what puts it into the model and the optimizer.

        All errors of the disk are raised here, and nothing is changed yet: the ranks agree
        before they go on, so that none waits for one that has failed. What is returned may
        make ranks wait for each other. The learning rates stay those of now.

        Args:
            checkpoint: Folder of the checkpoint.
            weights_only: Leave the optimizer as it is.

        Raises:
            OSError: If a file is missing or cannot be read.
            CheckpointError: If the checkpoint lacks something that is needed.
        """
        raise NotImplementedError

    @property
    def loads_weights(self) -> bool:
        """Whether weights are loaded by :meth:`read` where the host loads them, to resume or at the end: it cannot."""
        return False

    def save_optimizer(self, folder: str) -> bool:
        """Save optimizer and schedule into ``folder`` in the place of the host; return whether that was done.

        Ranks may wait for each other.
        """
        return False

    def loads_optimizer(self, checkpoint: str) -> bool:
        """Return whether the optimizer of ``checkpoint`` has to be loaded in the place of the host, to resume."""
        return False

    def read_to_resume(self, checkpoint: str) -> Callable[[], None]:
        """Read optimizer and schedule to resume from, and return what loads them, as :meth:`read` does."""
        raise NotImplementedError

    # ---- gradients and optimizer

    def gradient_norm(self) -> torch.Tensor | None:
        """Return the norm of all gradients of the model, the same on every rank; ``None`` if there are none.

        Ranks may wait for each other.
        """
        raise NotImplementedError

    def reset_optimizer(self) -> None:
        """Forget what the optimizer has gathered."""
        self.host.optimizer.state.clear()
