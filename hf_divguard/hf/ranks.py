"""What the ranks of a run decide together. Every method is called by all ranks alike."""

from __future__ import annotations

import contextlib
import datetime
import pickle
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hf_divguard.errors import CheckpointError, CheckpointSaveError
from hf_divguard.hf.alarm import Alarm

__all__ = ["Ranks"]

T = TypeVar("T")

# How long one rank may wait for another that lives. Writing a large checkpoint to a slow disk takes longer than
# the ten minutes that collectives on an accelerator are allowed, so decisions travel over a group of their own.
_PATIENCE = datetime.timedelta(hours=3)

# How long a rank with an error waits for the others, to end with them. They end as soon as they look; one that is
# held in an exchange of the host is freed when this process ends and its connections close.
_FAREWELL_SECONDS = 15.0

_LAST_WORDS_SECONDS = 2.0

_RANKS_FOLDER = "_divguard_ranks"


class _Failed:
    """What a rank with an error sends in an exchange, in the place of its value."""

    def __init__(self, message: str, kind: str) -> None:
        self.message = message
        self.kind = kind


class _Left:
    """What a rank sends that has reached the end of a block, in the place of its value."""


class Ranks:
    """The processes of one training run.

    Decisions are exchanged over a CPU group (gloo), so they neither synchronise an
    accelerator nor share its short timeout. A rank that waits learns at once if another has
    failed or died, and raises the same error. With one process nothing is exchanged.

    Args:
        rank: Index of this process.
        world_size: Number of processes.
    """

    _group: Any = None
    _group_belongs_to: Any = None
    _token = ""
    _count = 0

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size if dist.is_available() and dist.is_initialized() else 1
        self._exchanges = 0
        self._agreed: CheckpointSaveError | None = None
        self._is_together = False
        self._block = ""
        if self.world_size > 1:
            if Ranks._group_belongs_to is not dist.group.WORLD:
                Ranks._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
                Ranks._token = _agreed_token(Ranks._group)
                Ranks._group_belongs_to = dist.group.WORLD
            Ranks._count += 1
            self._alarm = Alarm(f"{Ranks._token}/{Ranks._count}")

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank.

        Raises:
            CheckpointSaveError: If another rank has failed or died.
        """
        if self.world_size == 1:
            return [value]
        self._arrive()
        return self._heard(self._exchange(value))

    def _heard(self, values: list[Any]) -> list[Any]:
        for each in values:
            if isinstance(each, _Failed):
                raise self._agree_on(each.message)
        left = [rank for rank, each in enumerate(values) if isinstance(each, _Left)]
        if left and len(left) < len(values):
            acting = ", ".join(str(rank) for rank in range(len(values)) if rank not in left)
            raise self._agree_on(
                f"{self._block} must be asked for on all ranks alike, but only rank {acting} of {len(values)} does so. "
                "Let the callback that sets `control.should_save` or `control.should_evaluate` set it on every rank."
            )
        return values

    def _arrive(self) -> None:
        self._exchanges += 1
        self._alarm.arrive(self._exchanges)

    def _exchange(self, value: Any, *, heeds_alarm: bool = True) -> list[Any]:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        work = dist.all_gather(sizes, torch.tensor([len(data)]), group=self._group, async_op=True)
        self._wait(work, heeds_alarm=heeds_alarm)
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        texts = [torch.empty_like(padded) for _ in range(self.world_size)]
        work = dist.all_gather(texts, padded, group=self._group, async_op=True)
        self._wait(work, heeds_alarm=heeds_alarm)
        if self.rank == 0:
            self._alarm.forget(self._exchanges - 1)  # all have left it
        return [
            pickle.loads(text.numpy().tobytes()[: int(size)]) for text, size in zip(texts, sizes, strict=True)
        ]

    def _wait(self, work: Any, *, heeds_alarm: bool = True) -> None:
        """Wait for an exchange, or raise the error of a rank that does not come to it."""
        began, pause = time.monotonic(), 5e-5
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
            message = self._alarm.look() if heeds_alarm else None
            if message is not None:
                raise self._agree_on(message)
            if not heeds_alarm and time.monotonic() - began > _LAST_WORDS_SECONDS:
                raise TimeoutError
        try:
            work.wait()
        except RuntimeError as error:
            # A rank that raised reports why before its process ends.
            message = self._alarm.message(patience=1.0)
            if message is None:
                words = str(error).split(". ")[0]
                message = (
                    f"A rank of the training has ended while rank {self.rank} waited for it ({words}). The log of "
                    "that rank says why."
                )
                self._alarm.ring(message)
            raise self._agree_on(message) from error

    def _agree_on(self, message: str) -> CheckpointSaveError:
        """Return the error that ends all ranks."""
        self._agreed = CheckpointSaveError(self._alarm.message() or message)
        return self._agreed

    @property
    def is_ending(self) -> bool:
        """Whether an error has ended all ranks: nothing is exchanged any more."""
        return self._agreed is not None

    def _fail(self, message: str, error: BaseException) -> bool:
        """Report an error of this rank to all, and wait until they end, too.

        Returns:
            Whether all ranks have an error of this kind. If not, ``is_ending`` is true from now on.
        """
        # After the error of another rank, which has waited by now, this one is perhaps only a consequence.
        patience = _FAREWELL_SECONDS if self._alarm.message() is None else _LAST_WORDS_SECONDS
        self._alarm.ring(message)
        self._arrive()
        kind = type(error).__name__
        if self._alarm.wait_for(self.world_size, self._exchanges, patience):
            with contextlib.suppress(RuntimeError, TimeoutError, CheckpointSaveError):
                values = self._exchange(_Failed(message, kind), heeds_alarm=False)
                return all(isinstance(each, _Failed) and each.kind == kind for each in values)
        return False

    @contextlib.contextmanager
    def together(self, what: str, is_joint: Callable[[], bool]) -> Iterator[None]:
        """Let an error on one rank inside of this block end all of them, with the same error.

        Args:
            what: What is done, for the sentence.
            is_joint: Returns whether the block had a part that all ranks take; if not, an error
                of this rank is its own.

        Raises:
            CheckpointSaveError: On every rank, if some of them failed. If all failed alike, each
                raises its own error.
        """
        if self.world_size == 1 or self._is_together:
            yield
            return
        self._is_together, self._block = True, what
        try:
            with self._alarm.listening():
                yield
                if is_joint():
                    self.gather(_Left())
        except Exception as error:
            if self.is_ending and isinstance(error, CheckpointSaveError):
                raise
            if not is_joint():
                raise
            message = f"{what} failed on rank {self.rank}: {_in_words(error)}."
            if self._fail(message, error):
                raise
            raise self._agree_on(message) from error
        finally:
            self._is_together = False

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0 on every rank."""
        return self.gather(value if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def largest(self, number: int) -> int:
        """Return the largest of the numbers of all ranks. Cheap enough for every step."""
        if self.world_size == 1:
            return number
        value = torch.tensor(number)
        self._wait(dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group, async_op=True))
        return int(value)

    def any_of(self, flags: list[bool]) -> list[bool]:
        """Return for each flag whether it is set on any rank. Cheap enough for every step."""
        if self.world_size == 1:
            return flags
        values = torch.tensor(flags, dtype=torch.uint8)
        self._wait(dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True))
        return [bool(value) for value in values.tolist()]

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

    def raise_if_any_failed(
        self,
        error: BaseException | None,
        what: str,
        note: str = "",
        *,
        ends_run: bool = False,
        may_be_held: bool = False,
    ) -> None:
        """Raise on every rank if there is an error on any of them; else return.

        Args:
            error: The error of this rank, if it has one.
            what: What was being done, for the sentence.
            note: What this rank has to add to its error.
            ends_run: Whether the run ends with the error. Then it reaches ranks that do not come
                here, too, because they are held in an exchange of the host.
            may_be_held: Whether others may be held in an exchange that this rank has left with its
                error. If they do not come within some seconds, the run ends with it.

        Raises:
            CheckpointSaveError: On every rank, naming the first rank that failed.
        """
        if error is not None and ends_run and self.world_size > 1:
            sentence = f"{what} failed on rank {self.rank}: {_in_words(error)}.{note}"
            self._fail(sentence, error)
            raise self._agree_on(sentence) from error
        own = None if error is None else f"{_in_words(error)}.{note}"
        waits = may_be_held and error is not None and self.world_size > 1
        messages = self._gather_from_those_held(own, what) if waits else self.gather(own)
        for rank, message in enumerate(messages):
            if message is not None:
                where = f" on rank {rank}" if self.world_size > 1 else ""
                raise CheckpointSaveError(f"{what} failed{where}: {message}") from error

    def _gather_from_those_held(self, own: str | None, what: str) -> list[str | None]:
        """Gather as usual if the others come; else end the run with this rank's error."""
        self._arrive()
        if self._alarm.wait_for(self.world_size, self._exchanges, _FAREWELL_SECONDS):
            return self._heard(self._exchange(own))
        sentence = f"{what} failed on rank {self.rank}: {own}"
        self._alarm.ring(sentence)
        raise self._agree_on(sentence)

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


def _agreed_token(group: Any) -> str:
    """Return a name for these processes, the same on all of them.

    A launcher that starts ranks again may keep the store of those before, with the error that has
    ended them.
    """
    token = torch.frombuffer(bytearray(uuid.uuid4().bytes), dtype=torch.uint8)
    dist.broadcast(token, src=0, group=group)
    return bytes(token.tolist()).hex()


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).rstrip('.')}"


def _that_travels(error: Exception | None) -> Exception | None:
    """Return ``error``, or one of the same words if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return CheckpointError(f"{type(error).__name__}: {error}")
    return error
