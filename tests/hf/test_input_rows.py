"""Rows are described by their inputs alone, and groups of rows differ where the data that they are drawn from do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from hf_divguard.hf.input_rows import are_alike, row_features

ROWS = 48  # of which 32 are described
Batch = dict[str, Any]


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(seed: int, step: int = 1, length: int = 12) -> Batch:
    first = torch.randint(0, 50, (ROWS, 1), generator=draw(seed))
    return {"input_ids": (first + step * torch.arange(length)) % 50}


def prompted(seed: int, task: int) -> Batch:
    batch = tokens(seed)
    batch["input_ids"][:, 1] = 60 + task
    return batch


def with_task(seed: int, task: int) -> Batch:
    return {**tokens(seed), "task": torch.full((ROWS,), task)}


def with_name(seed: int, task: str) -> Batch:
    return {**tokens(seed), "task": [task] * ROWS}


def pictures(seed: int, scale: float = 1.0, place: int = 0) -> Batch:
    noise = torch.randn(ROWS, 3, 16, 16, generator=draw(seed))
    noise[:, :, place : place + 4] += 1.0
    return {"pixel_values": scale * noise}


def sounds(seed: int, pitch: float = 0.1) -> Batch:
    phase = 6.3 * torch.rand(ROWS, 1, generator=draw(seed))
    return {"input_values": torch.sin(pitch * torch.arange(400) + phase)}


def features(batch: Batch) -> numpy.ndarray:
    labels = torch.zeros(ROWS, dtype=torch.long)
    found = row_features({**batch, "labels": labels}, ["labels"])
    assert found is not None
    return found


PAIRS: dict[str, tuple[Callable[[int], Batch], Callable[[int], Batch]]] = {
    "token ids": (tokens, lambda seed: tokens(seed, step=3)),
    "lengths": (tokens, lambda seed: tokens(seed, length=20)),
    "a prompt": (lambda seed: prompted(seed, 0), lambda seed: prompted(seed, 1)),
    "a number for the task": (lambda seed: with_task(seed, 0), lambda seed: with_task(seed, 1)),
    "a name for the task": (lambda seed: with_name(seed, "de"), lambda seed: with_name(seed, "fr")),
    "brightness": (pictures, lambda seed: pictures(seed, scale=1.5)),
    "what pictures show": (pictures, lambda seed: pictures(seed, place=8)),
    "sounds": (sounds, lambda seed: sounds(seed, pitch=0.3)),
    "another tensor": (tokens, lambda seed: {**tokens(seed), "weights": torch.ones(ROWS)}),
}


def many(make: Callable[[int], Batch], first: int) -> list[numpy.ndarray]:
    return [features(make(seed)) for seed in range(first, first + 4)]


@pytest.mark.parametrize("kind", PAIRS)
def test_rows_of_the_same_data_are_alike_and_others_are_not(kind: str) -> None:
    usual, other = PAIRS[kind]
    assert are_alike(many(usual, 0), many(usual, 100)) is True
    assert are_alike(many(usual, 0), many(other, 100)) is False


def test_chance_makes_a_difference_in_few_of_many_comparisons() -> None:
    alike = [are_alike(many(tokens, 10 * n), many(tokens, 10 * n + 5)) for n in range(100)]
    assert sum(each is True for each in alike) >= 96


def test_few_rows_say_nothing() -> None:
    assert are_alike(many(tokens, 0)[:1], many(tokens, 100)) is None
    assert are_alike([], many(tokens, 0)) is None


def test_labels_and_what_is_made_of_them_are_no_inputs() -> None:
    batch = tokens(0)
    plain = row_features({**batch, "labels": batch["input_ids"]}, ["labels"])
    shifted = {
        **batch,
        "labels": batch["input_ids"] + 1,
        "decoder_input_ids": batch["input_ids"].flip(1),
    }
    assert numpy.array_equal(plain, row_features(shifted, ["labels"]))


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.ones(4, 3, dtype=torch.long)},
        {"labels": torch.ones(4)},
        {"labels": torch.ones(4), "input_ids": torch.ones(4, 3), "pairs": torch.ones(8, 3)},
        {"labels": torch.ones(4), "values": torch.ones(4, 3, dtype=torch.complex64)},
        [torch.ones(4)],
    ],
    ids=["no labels", "no inputs", "no common rows", "complex numbers", "no mapping"],
)
def test_a_batch_that_cannot_be_described_has_no_features(batch: Any) -> None:
    assert row_features(batch, ["labels"]) is None


def test_values_that_are_not_finite_and_scalars_are_no_obstacle() -> None:
    batch = {"labels": torch.ones(4), "values": torch.full((4, 3), float("nan")), "scale": torch.tensor(2.0)}
    found = row_features(batch, ["labels"])
    assert found is not None
    assert numpy.isfinite(found).all()
