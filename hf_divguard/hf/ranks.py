"""What the ranks of a run decide together. Every method is called by all ranks alike."""

from __future__ import annotations

import contextlib
import datetime
import pickle
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hf_divguard.errors import CheckpointError, CheckpointSaveError

__all__ = ["Ranks"]

T = TypeVar("T")

# How long one rank may wait for another. Writing a large checkpoint to a slow disk takes longer than the ten
# minutes that collectives on an accelerator are allowed, so decisions travel over a group of their own.
_PATIENCE = datetime.timedelta(hours=3)

_RANKS_FOLDER = "_divguard_ranks"


class Ranks:
    """The processes of one training run.

    Decisions are exchanged over a CPU group (gloo), so they neither synchronise an
    accelerator nor share its short timeout. With one process nothing is exchanged.

    Args:
        rank: Index of this process.
        world_size: Number of processes.
    """

    _group: Any = None
    _group_belongs_to: Any = None

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size if dist.is_available() and dist.is_initialized() else 1
        if self.world_size > 1 and Ranks._group_belongs_to is not dist.group.WORLD:
            Ranks._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            Ranks._group_belongs_to = dist.group.WORLD

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0 on every rank."""
        return self.gather(value if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def largest(self, number: int) -> int:
        """Return the largest of the numbers of all ranks. Cheap enough for every step."""
        if self.world_size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group)
        return int(value)

    def run_on_main(self, decide: Callable[[], T]) -> T:
        """Return what ``decide`` gives on rank 0, on every rank; an error of it is raised on every rank."""
        value: Any = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                value = decide()
            except Exception as caught:
                error = caught
        if self.world_size > 1:
            value, theirs = self.broadcast((value, _that_travels(error)))
            error = error or theirs
        if error is not None:
            raise error
        return value

    def raise_if_any_failed(self, error: BaseException | None, what: str, note: str = "") -> None:
        """Raise on every rank if there is an error on any of them; else return.

        Args:
            error: The error of this rank, if it has one.
            what: What was being done, for the sentence.
            note: What this rank has to add to its error.

        Raises:
            CheckpointSaveError: On every rank, naming the first rank that failed.
        """
        own = None if error is None else f"{type(error).__name__}: {str(error).rstrip('.')}.{note}"
        for rank, message in enumerate(self.gather(own)):
            if message is not None:
                where = f" on rank {rank}" if self.world_size > 1 else ""
                raise CheckpointSaveError(f"{what} failed{where}: {message}") from error

    def on_same_file_system(self, folder: Path) -> list[int]:
        """Return the ranks that see the same ``folder`` as this one, itself included, in order.

        The first of them moves and deletes checkpoints there: rank 0 on a shared disk,
        one rank of every node where the nodes have disks of their own.

        Raises:
            CheckpointSaveError: On every rank, if one cannot write to ``folder``.
        """
        if self.world_size == 1:
            return [self.rank]
        token = self.broadcast(uuid.uuid4().hex)
        meeting = folder / _RANKS_FOLDER
        marks = [meeting / f"{token}-{rank}" for rank in range(self.world_size)]
        error = None
        try:
            meeting.mkdir(parents=True, exist_ok=True)
            marks[self.rank].touch()
        except OSError as caught:
            error = caught
        self.raise_if_any_failed(error, f"Preparing {folder} for checkpoints")
        # Each mark is looked up by its name: network file systems may list a folder from memory, but ask the
        # server for a name they have not seen. One look is enough where all ranks see the mark of rank 0.
        if all(self.gather(marks[0].exists())):
            present = list(range(self.world_size))
        else:
            present = [rank for rank, mark in enumerate(marks) if mark.exists()]
        self.gather(None)
        with contextlib.suppress(OSError):
            marks[self.rank].unlink()
        self.gather(None)
        if self.rank == present[0]:
            with contextlib.suppress(OSError):
                meeting.rmdir()
        return present


def _that_travels(error: Exception | None) -> Exception | None:
    """Return ``error``, or one of the same words if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return CheckpointError(f"{type(error).__name__}: {error}")
    return error
