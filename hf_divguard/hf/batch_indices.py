"""Which rows of the dataset are in a micro-batch: the numbers that the sampler gave, in the order of the batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

__all__ = ["BatchIndices"]

# Batches that a loader may be ahead of training: workers fetch some each.
_MOST_AHEAD = 4096


class BatchIndices:
    """Follows the batch sampler of the training data; nothing is followed where there is none (a stream).

    Args:
        left_out: Rows of the dataset that no batch gets. A batch of which nothing would be left stays as it is.
    """

    def __init__(self, left_out: Collection[int] = ()) -> None:
        self.left_out = frozenset(left_out)
        self._given: deque[list[int]] = deque(maxlen=_MOST_AHEAD)
        self._to_skip = 0

    def follow(self, loader: Any, *, skips: int = 0) -> None:
        """Have the batch sampler of ``loader`` tell what it gives.

        Args:
            loader: The data loader of training, as the host has prepared it.
            skips: Batches at its start that a resumed run does not train on.
        """
        base = getattr(loader, "base_dataloader", loader)
        sampler = getattr(base, "batch_sampler", None)
        if sampler is None or isinstance(sampler, _Followed):
            return
        self._to_skip = skips
        # A loader refuses the assignment of another sampler; this one gives the same batches.
        object.__setattr__(base, "batch_sampler", _Followed(sampler, self))

    def note_epoch(self) -> None:
        """Note that the sampler begins from its start."""
        self._given.clear()

    def note(self, indices: list[int]) -> None:
        """Note the batch that the sampler gives next."""
        if self._to_skip > 0:
            self._to_skip -= 1
        else:
            self._given.append(indices)

    def take(self, sizes: list[int | None]) -> list[list[int] | None]:
        """Return the dataset rows of the next micro-batches, ``None`` for one whose rows are not known.

        Args:
            sizes: How many rows each has, ``None`` where it cannot be divided by rows.
        """
        taken = [self._given.popleft() if self._given else None for _ in sizes]
        return [
            rows if rows is not None and len(rows) == size else None
            for rows, size in zip(taken, sizes, strict=True)
        ]


class _Followed:
    """A batch sampler that tells what it gives."""

    def __init__(self, sampler: Any, follower: BatchIndices) -> None:
        self._sampler, self._follower = sampler, follower

    def __iter__(self) -> Iterator[Any]:
        self._follower.note_epoch()
        left_out = self._follower.left_out
        for batch in self._sampler:
            indices = list(batch)
            if left_out and all(isinstance(index, int) for index in indices):
                indices = [index for index in indices if index not in left_out] or indices
            self._follower.note(indices)
            yield indices if left_out else batch

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name in ("_sampler", "_follower"):
            raise AttributeError(name)
        return getattr(self._sampler, name)
