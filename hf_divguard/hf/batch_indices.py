"""Which rows of the dataset are in a micro-batch: the numbers that the sampler gave, in the order of the batches."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset

__all__ = ["BatchIndices", "batches_to_skip", "named_rows"]

logger = logging.getLogger(__name__)

# Batches that a loader may be ahead of training: workers fetch some each.
_MOST_AHEAD = 4096


def named_rows(events: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return the rows of the dataset that events name as suspect."""
    rows = [row for event in events if event.get("event") == "data" for row in event.get("rows") or ()]
    found = {row.get("dataset_index") for row in rows if isinstance(row, Mapping)}
    return sorted(index for index in found if isinstance(index, int) and not isinstance(index, bool))


def batches_to_skip(loader: Any, args: Any, step: int) -> int:
    """Return how many batches of its first epoch a run that goes on after ``step`` does not train on."""
    if args.ignore_data_skip:
        return 0
    accumulation = args.gradient_accumulation_steps
    return int(step % max(1, -(-len(loader) // accumulation)) * accumulation)


class BatchIndices:
    """Follows the batch sampler of the training data; nothing is followed where there is none (a stream)."""

    def __init__(self) -> None:
        self.left_out: frozenset[int] = frozenset()
        self._given: deque[list[int]] = deque(maxlen=_MOST_AHEAD)
        self._skips: Callable[[], int] | None = None
        self._to_skip = 0

    def leave_out(self, rows: Collection[int], *, is_main: bool) -> None:
        """Give some rows of the dataset to no batch. A batch of which nothing would be left stays as it is.

        Args:
            rows: The rows.
            is_main: Whether this process logs them.
        """
        self.left_out = frozenset(rows)
        if rows and is_main:
            logger.warning(
                "%d suspect rows of the dataset are left out (`divguard_skip_suspect_rows`): %s.",
                len(rows),
                ", ".join(map(str, sorted(rows)[:20])) + (", ..." if len(rows) > 20 else ""),
            )

    def follow(self, loader: Any, skips: Callable[[], int]) -> None:
        """Have the batch sampler of ``loader`` report what it gives.

        Args:
            loader: The data loader of training, as the host has prepared it.
            skips: Returns how many batches of the first epoch a resumed run does not train on.
        """
        base = getattr(loader, "base_dataloader", loader)
        sampler = getattr(base, "batch_sampler", None)
        is_stream = isinstance(
            getattr(base, "dataset", None), IterableDataset
        )  # its sampler gives no numbers
        if sampler is None or is_stream or isinstance(sampler, _Followed):
            return
        self._skips = skips
        # A loader refuses the assignment of another sampler; this one gives the same batches.
        object.__setattr__(base, "batch_sampler", _Followed(sampler, self))

    def note_epoch(self) -> None:
        """Note that the sampler begins from its start."""
        self._given.clear()
        skips, self._skips = self._skips, None
        self._to_skip = 0 if skips is None else skips()

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
    """A batch sampler that reports what it gives."""

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
