"""A few batches of the evaluation set, apart from the evaluations of the host."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

__all__ = ["evaluation_batches"]


def evaluation_batches(trainer: Any, most: int) -> list[Any]:
    """Return at most ``most`` batches of this rank, evenly spread over all evaluation sets.

    They are those that an evaluation gives, collated alike. Nothing that the host counts about its
    own loaders changes. Of a set without a length the first ones are taken.

    Args:
        trainer: The trainer.
        most: How many batches.
    """
    sets = trainer.eval_dataset
    chosen = list(sets.values()) if isinstance(sets, Mapping) else [sets]
    share = max(1, most // max(1, len(chosen)))
    return [batch for each in chosen for batch in _some_of(trainer, each, share)][:most]


def _some_of(trainer: Any, dataset: Any, most: int) -> Iterable[Any]:
    # The accelerator lists what it has prepared, and a loader of its own that is left before its end counts as open.
    listed = getattr(trainer.accelerator, "_dataloaders", [])
    count = len(listed)
    loader = trainer.get_eval_dataloader(dataset)
    del listed[count:]
    rows = loader.dataset
    if isinstance(rows, IterableDataset) or loader.batch_sampler is None:
        plain: Any = DataLoader(rows, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
        return list(itertools.islice(plain, most))
    batches = list(loader.batch_sampler)
    if len(batches) > most:
        batches = [batches[place * len(batches) // most] for place in range(most)]
    return list(DataLoader(rows, batch_sampler=batches, collate_fn=loader.collate_fn))
