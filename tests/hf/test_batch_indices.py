"""Which rows of the dataset are in a micro-batch, as the batch sampler gives them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from hf_divguard.hf.batch_indices import BatchIndices, batches_to_skip, named_rows


def loader(**kwargs: object) -> object:
    rows = torch.arange(10)
    return prepare_data_loader(DataLoader(rows, batch_size=3, **kwargs))  # type: ignore[arg-type]


def followed(indices: BatchIndices, data: object) -> list[tuple[list[int], list[int] | None]]:
    """Return what each batch holds, and what is known of it."""
    found = []
    for batch in data:  # type: ignore[attr-defined]
        (known,) = indices.take([len(batch)])
        found.append((batch.tolist(), known))
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_the_rows_of_each_batch_are_known(workers: int) -> None:
    indices, data = BatchIndices(), loader(shuffle=True, num_workers=workers)
    indices.follow(data, lambda: 0)
    for _ in range(2):  # epochs
        found = followed(indices, data)
        assert len(found) == 4
        assert all(held == known for held, known in found)


def test_batches_that_a_resumed_run_skips_are_passed_over() -> None:
    indices, data = BatchIndices(), loader()
    indices.follow(data, lambda: 2)
    assert followed(indices, skip_first_batches(data, 2)) == [([6, 7, 8], [6, 7, 8]), ([9], [9])]


def test_rows_that_are_left_out_are_in_no_batch_and_no_batch_is_lost() -> None:
    indices, data = BatchIndices(), loader()
    indices.leave_out([1, 9], is_main=True)
    indices.follow(data, lambda: 0)
    # The last batch would be empty.
    assert [held for held, _ in followed(indices, data)] == [[0, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_where_the_count_disagrees_nothing_is_known() -> None:
    indices, data = BatchIndices(), loader()
    indices.follow(data, lambda: 0)
    next(iter(data))  # type: ignore[call-overload]
    assert indices.take([5]) == [None]


def test_the_batches_to_skip_are_those_of_the_steps_in_the_epoch() -> None:
    args = SimpleNamespace(ignore_data_skip=False, gradient_accumulation_steps=2)
    assert batches_to_skip(range(10), args, step=7) == 4
    args.ignore_data_skip = True
    assert batches_to_skip(range(10), args, step=7) == 0


def test_only_events_of_data_name_rows() -> None:
    row = {"step": 3, "rank": 0, "micro_batch": 0, "row": 1}
    events = [
        {"event": "data", "rows": [{**row, "dataset_index": 8}, row, "?"]},
        {"event": "rollback", "rows": [{**row, "dataset_index": 5}]},
        {"event": "data"},
    ]
    assert named_rows(events) == [8]
