"""The rows of micro-batches in numbers, and whether those of two groups of steps are alike: without their labels."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch

__all__ = ["are_alike", "row_features", "some_rows"]

# Values of a row are counted in so many classes: token ids, their pairs, and those at the beginning.
_CLASSES, _CLASSES_AT_START = 256, 64
_START = 4
# A row of real numbers is averaged down to so many, and an image to as many on a side.
_MEANS, _SIDE, _CHANNELS = 64, 8, 4
# Waves along random directions of it, and their frequency.
_WAVES, _FREQUENCY = 64, 1.0
# Rows of each group that can tell a difference, and how far one is beyond those of groups drawn at random, in their
# standard deviations.
_FEWEST_ROWS = 64
_BEYOND = 4.0
_PERMUTATIONS = 400
# Rows of a micro-batch that are described.
_MOST_ROWS = 32
# What a model makes of the labels, such as the `decoder_input_ids` of some collators.
_MADE_OF_LABELS = "decoder_"


def row_features(inputs: Any, labels: Collection[str]) -> numpy.ndarray | None:
    """Return numbers that describe each row of a micro-batch, apart from its labels.

    Token ids are counted, alone, in pairs of neighbours and at the beginning of the row. Real numbers
    are averaged over parts of the row, and their mean, spread and roughness are taken.

    Args:
        inputs: The micro-batch, as the data loader gave it.
        labels: Names of the labels in it.

    Returns:
        An array of shape ``(rows, features)``, of at most 32 rows; ``None`` where the batch has no labels, or cannot be
        divided by rows.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7], [7, 8, 9]]), "labels": torch.tensor([0, 1])}
        >>> row_features(batch, ["labels"]).shape[0], row_features(batch, ["targets"])
        (2, None)
    """
    if not isinstance(inputs, Mapping) or not any(name in inputs for name in labels):
        return None
    parts = {name: value for name, value in inputs.items() if _is_input(name, value, labels)}
    if len({len(value) for value in parts.values()}) != 1:
        return None
    try:
        columns = [column for name in sorted(parts) for column in _columns(parts[name][:_MOST_ROWS])]
    except (RuntimeError, TypeError, ValueError):
        return None  # tensors of a kind that has no such numbers, such as nested ones
    return numpy.concatenate(columns, axis=1)


def some_rows(described: list[numpy.ndarray], most: int) -> list[numpy.ndarray]:
    """Return at most ``most`` rows, evenly spread over all micro-batches.

    Example:
        >>> [len(rows) for rows in some_rows([numpy.zeros((32, 3))] * 4, most=16)]
        [4, 4, 4, 4]
    """
    every = max(1, math.ceil(sum(map(len, described)) / most))
    return [rows[::every] for rows in described]


def _is_input(name: str, value: Any, labels: Collection[str]) -> bool:
    if name in labels or name.startswith(_MADE_OF_LABELS):
        return False
    has_rows = value.dim() > 0 if isinstance(value, torch.Tensor) else isinstance(value, list | tuple)
    return has_rows and len(value) > 0


def _columns(value: Any) -> Iterator[numpy.ndarray]:
    if not isinstance(value, torch.Tensor):
        codes = torch.tensor([[zlib.crc32(repr(each).encode()) % _CLASSES] for each in value])
        yield _shares(codes, _CLASSES)
    elif value.is_complex():
        raise TypeError("complex numbers are not described")
    elif value.is_floating_point():
        yield _means(value.detach().float().cpu())
    else:
        ids = value.detach().cpu().long().reshape(len(value), -1)
        yield _shares(ids % _CLASSES, _CLASSES)
        if ids.shape[1] > 1:
            yield _shares((ids[:, 1:] * 31 + ids[:, :-1]) % _CLASSES, _CLASSES)
        yield numpy.full((len(ids), 1), math.log(1 + ids.shape[1]))
        places = torch.arange(min(_START, ids.shape[1]))
        yield _shares((ids[:, : len(places)] * 7 + 17 * places) % _CLASSES_AT_START, _CLASSES_AT_START)


def _shares(codes: torch.Tensor, classes: int) -> numpy.ndarray:
    """Return which part of the values of each row is in each class."""
    counts = torch.zeros(len(codes), classes).scatter_add_(1, codes, torch.ones(codes.shape))
    return (counts / codes.shape[1]).numpy()


def _means(values: torch.Tensor) -> numpy.ndarray:
    rows = values.reshape(len(values), -1)
    rough = rows.diff().abs().mean(1) if rows.shape[1] > 1 else torch.zeros(len(rows))
    whole = torch.stack([rows.mean(1), rows.std(1, unbiased=False), rough], 1)
    if values.dim() == 4:
        image = torch.nn.functional.adaptive_avg_pool2d(values[:, :_CHANNELS], _SIDE)
        coarse = image.reshape(len(values), -1)
    else:
        coarse = torch.nn.functional.adaptive_avg_pool1d(rows[:, None], min(_MEANS, rows.shape[1]))[:, 0]
    return torch.nan_to_num(torch.cat([whole, coarse, _waves(coarse)], 1)).numpy()


def _waves(coarse: torch.Tensor) -> torch.Tensor:
    """Return waves along random directions: their means differ where those of the values themselves do not."""
    shape = coarse - coarse.mean(1, keepdim=True)
    shape = shape / shape.pow(2).sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    generator = torch.Generator().manual_seed(0)
    angles = _FREQUENCY * shape @ torch.randn(shape.shape[1], _WAVES, generator=generator)
    return torch.cat([angles.cos(), angles.sin()], 1)


def are_alike(first: Sequence[numpy.ndarray], second: Sequence[numpy.ndarray]) -> bool | None:
    """Return whether two groups of rows look as if they were drawn from the same data; ``None`` if one has too few.

    The groups are compared in every feature. The largest difference and the sum of all must not lie
    far beyond those of groups that are drawn from all rows at random (a permutation test). Groups with
    other features are not alike. A group needs 64 rows.

    Args:
        first: Features of the rows of each micro-batch of one group.
        second: The same of the other group.

    Example:
        >>> draw = numpy.random.default_rng(0).normal
        >>> are_alike([draw(size=(64, 6))], [draw(size=(64, 6))])
        True
        >>> are_alike([draw(size=(64, 6))], [draw(size=(64, 6), loc=1.0)])
        False
    """
    count, others = sum(map(len, first)), sum(map(len, second))
    if min(count, others) < _FEWEST_ROWS:
        return None
    if len({each.shape[1] for each in (*first, *second)}) != 1:
        return False
    rows = numpy.concatenate([*first, *second]).astype(numpy.float64)
    spread = rows.std(0)
    varies = spread > 1e-9 * (1.0 + numpy.abs(rows).max(0))
    rows = (rows[:, varies] - rows[:, varies].mean(0)) / spread[varies]
    if rows.shape[1] == 0:
        return True
    weights = numpy.concatenate([numpy.full(count, 1.0 / count), numpy.full(others, -1.0 / others)])
    draw = numpy.random.default_rng(0)
    drawn = numpy.stack([weights, *(draw.permutation(weights) for _ in range(_PERMUTATIONS))]) @ rows
    sizes = (numpy.abs(drawn).max(1), (drawn**2).sum(1))
    return all(size[0] <= size[1:].mean() + _BEYOND * size[1:].std() for size in sizes)
