"""Rows that make the loss of a batch high are found with few probes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from hf_divguard.core.rollback.rows import MOST_PROBES, find_rows


def losses_of(rows: list[float], calls: list[int]) -> Callable[[Sequence[int]], float]:
    """Return what gives the mean loss of some rows, and counts the calls."""

    def loss(chosen: Sequence[int]) -> float:
        calls.append(len(chosen))
        return sum(rows[place] for place in chosen) / len(chosen)

    return loss


def healthy(count: int, seed: int) -> list[float]:
    """Return losses of rows of a batch in which nothing is wrong."""
    lot = random.Random(seed)
    return [max(0.1, lot.gauss(1.6, 0.25)) for _ in range(count)]


@pytest.mark.parametrize("count", [8, 16, 32, 64, 100])
def test_one_bad_row_is_found(count: int) -> None:
    right = 0
    for seed in range(50):
        rows, calls = healthy(count, seed), []
        bad = random.Random(1000 + seed).randrange(count)
        rows[bad] = 8.0
        right += find_rows(count, losses_of(rows, calls)) == [bad]
        assert len(calls) <= MOST_PROBES
    assert right >= (48 if count <= 64 else 40)


@pytest.mark.parametrize("count", [8, 16, 32, 64])
def test_no_row_is_named_where_the_batch_is_innocent(count: int) -> None:
    named = [find_rows(count, losses_of(healthy(count, seed), [])) for seed in range(100)]
    assert sum(map(bool, named)) <= 2


def test_no_row_is_named_where_all_of_them_are_new() -> None:
    rows = [loss + 4.0 for loss in healthy(64, 1)]
    assert find_rows(64, losses_of(rows, [])) == []


def test_a_row_whose_loss_is_not_a_number_is_found() -> None:
    rows = healthy(64, 1)
    rows[11] = float("nan")
    assert find_rows(64, losses_of(rows, [])) == [11]


@pytest.mark.parametrize("worst", [1e6, float("nan")])
def test_beside_a_far_worse_row_none_is_named_that_lies_somewhat_above_the_others(worst: float) -> None:
    rows = healthy(16, 1)
    rows[3], rows[9] = 8.0, worst
    assert find_rows(16, losses_of(rows, [])) == [9]
    rows[9] = 9.0
    assert find_rows(16, losses_of(rows, [])) == [3, 9]


@pytest.mark.parametrize("worst", [1e6, float("nan")])
def test_rows_that_differ_much_do_not_hide_one_that_is_far_worse(worst: float) -> None:
    """Squared errors: many of them are far above their middle."""
    for seed in range(30):
        lot = random.Random(seed)
        rows = [lot.gauss(0.0, 1.0) ** 2 for _ in range(16)]
        rows[9] = worst
        assert find_rows(16, losses_of(rows, [])) == [9]
