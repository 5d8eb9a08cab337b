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


def marked(seed: int, task: Any) -> Batch:
    return {**tokens(seed), "task": task}


def texts(seed: int, task: str) -> Batch:
    rows = tokens(seed)["input_ids"].tolist()
    return {"text": [f"{task}: " + " ".join(map(str, row)) for row in rows]}


def long_rows(seed: int, marker: int | None, place: int = 0) -> Batch:
    share = torch.rand(ROWS, 256, generator=draw(seed))
    ids = (30000 * share**4).long() + 10  # a few frequent tokens, and many rare ones
    if marker is not None:
        ids[:, place] = marker
    return {"input_ids": ids}


def left_padded(seed: int, marker: int) -> Batch:
    batch = long_rows(seed, None)
    for row, start in zip(
        batch["input_ids"], torch.randint(1, 60, (ROWS,), generator=draw(seed)), strict=True
    ):
        row[:start], row[start] = 0, marker
    return batch


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
    "a name for the task": (lambda seed: marked(seed, "de"), lambda seed: marked(seed, "fr")),
    "a name for each row": (
        lambda seed: marked(seed, ["de"] * ROWS),
        lambda seed: marked(seed, ["fr"] * ROWS),
    ),
    "a number for the batch": (lambda seed: marked(seed, 0), lambda seed: marked(seed, 1)),
    "a scalar": (lambda seed: marked(seed, torch.tensor(0)), lambda seed: marked(seed, torch.tensor(1))),
    "an array": (lambda seed: marked(seed, numpy.zeros(ROWS)), lambda seed: marked(seed, numpy.ones(ROWS))),
    "a nested number": (lambda seed: marked(seed, {"task": 0}), lambda seed: marked(seed, {"task": 1})),
    "texts": (lambda seed: texts(seed, "translate"), lambda seed: texts(seed, "summarize")),
    "lists of tensors": (
        lambda seed: {"rows": list(tokens(seed)["input_ids"])},
        lambda seed: {"rows": list(tokens(seed)["input_ids"] + 7)},
    ),
    "ids that differ by 1024": (lambda seed: long_rows(seed, 1), lambda seed: long_rows(seed, 1025)),
    "a token at the end": (lambda seed: long_rows(seed, 1, -1), lambda seed: long_rows(seed, 2, -1)),
    "a token in the middle": (lambda seed: long_rows(seed, 1, 99), lambda seed: long_rows(seed, 2, 99)),
    "a token after padding": (lambda seed: left_padded(seed, 1), lambda seed: left_padded(seed, 2)),
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
    batch, labels = tokens(0), tokens(1)["input_ids"]
    usual = {**batch, "labels": labels, "decoder_input_ids": labels.roll(1, 1)}
    shifted = {**batch, "labels": (labels + 1) % 50, "decoder_input_ids": (labels + 1).roll(1, 1)}
    assert numpy.array_equal(row_features(usual, ["labels"]), row_features(shifted, ["labels"]))


def test_a_task_that_all_labels_begin_with_is_an_input() -> None:
    batch, labels = tokens(0), tokens(1)["input_ids"]
    german, french = labels.clone(), labels.clone()
    german[:, 0], french[:, 0] = 60, 61
    first, second = ({**batch, "labels": each} for each in (german, french))
    assert not numpy.array_equal(row_features(first, ["labels"]), row_features(second, ["labels"]))


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.ones(4, 3, dtype=torch.long)},
        {"labels": torch.ones(4)},
        {"labels": torch.ones(4), "input_ids": torch.ones(4, 3), "pairs": torch.ones(8, 3)},
        {"labels": torch.ones(4), "values": torch.ones(4, 3, dtype=torch.complex64)},
        {"labels": torch.ones(4), "input_ids": torch.ones(4, 3), "what": object()},
        {"labels": torch.ones(4), "input_ids": torch.ones(4, 3), 7: torch.ones(4)},
        {"labels": torch.ones(4), "input_ids": torch.ones(4, 3), "rows": [torch.ones(2), torch.ones(3)] * 2},
        [torch.ones(4)],
    ],
    ids=[
        "no labels",
        "no inputs",
        "no common rows",
        "complex numbers",
        "an object",
        "a name that is a number",
        "rows of other lengths",
        "no mapping",
    ],
)
def test_a_batch_that_cannot_be_described_has_no_features(batch: Any) -> None:
    assert row_features(batch, ["labels"]) is None


def test_values_that_are_not_finite_and_scalars_are_no_obstacle() -> None:
    batch = {"labels": torch.ones(4), "values": torch.full((4, 3), float("nan")), "scale": torch.tensor(2.0)}
    found = row_features(batch, ["labels"])
    assert found is not None
    assert numpy.isfinite(found).all()
