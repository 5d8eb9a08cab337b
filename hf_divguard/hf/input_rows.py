"""The rows of micro-batches in numbers, and whether those of two groups of steps are alike: without their labels."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch

__all__ = ["are_alike", "row_features", "some_rows"]

# Values of a row are counted in so many classes: token ids or words and their pairs, and those at both ends.
_CLASSES, _CLASSES_AT_ENDS = 1024, 64
_ENDS = 4
# Tensors of few different values, which are no text, and in how many classes those are counted.
_FEW_VALUES = ("mask", "type_ids")
_CLASSES_OF_FEW = 16
# A row of real numbers is averaged down to so many, and an image to as many on a side, from so many at most.
_MEANS, _SIDE, _CHANNELS = 64, 8, 4
_MOST_VALUES, _MOST_ON_SIDE = 16384, 64
# Waves along random directions of it, and their frequency.
_WAVES, _FREQUENCY = 64, 1.0
# Rows of each group that show a difference, and how far one is beyond those of groups drawn at random, in their
# standard deviations.
_FEWEST_ROWS = 64
_BEYOND = 4.0
_PERMUTATIONS = 400
# Rows of a micro-batch that are described.
_MOST_ROWS = 32
# What a collator makes of the labels, such as `decoder_input_ids`.
_MADE_OF_LABELS = "decoder_"


def row_features(inputs: Any, labels: Collection[str]) -> numpy.ndarray | None:
    """Return numbers that describe each row of a micro-batch, apart from its labels.

    Token ids and words are counted, alone, in pairs of neighbours and at both ends of the row. Real
    numbers are averaged over parts of the row, and their mean, spread and roughness are taken. What
    belongs to all rows of a batch, such as the name of a task, counts for each row. Of the labels
    only a beginning that all rows have in common is described: it says which task is meant.

    Args:
        inputs: The micro-batch, as the data loader gave it.
        labels: Names of the labels in it.

    Returns:
        An array of shape ``(rows, features)``, of at most 32 rows; ``None`` where the batch has no labels, cannot be
        divided by rows, or has a part that cannot be described.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7], [7, 8, 9]]), "labels": torch.tensor([0, 1])}
        >>> row_features(batch, ["labels"]).shape[0], row_features(batch, ["targets"])
        (2, None)
    """
    try:
        rows = len(next(inputs[name] for name in labels if name in inputs))
        parts = [_parts(value, name in labels, name, rows) for name, value in sorted(inputs.items())]
        columns = [column for each in parts for column in each]
        return numpy.concatenate(columns, axis=1).astype(numpy.float32) if columns else None
    except Exception:  # whatever a batch may hold: nothing is said of its rows then
        return None


def _parts(value: Any, is_label: bool, name: str, rows: int) -> list[numpy.ndarray]:
    """Return the columns that describe one entry of a batch.

    Raises:
        TypeError: If it cannot be described.
    """
    if isinstance(value, Mapping):
        nested = [_parts(each, is_label, str(key), rows) for key, each in sorted(value.items())]
        return [column for each in nested for column in each]
    count = min(rows, _MOST_ROWS)
    if value is None or isinstance(value, bool | int | float | str):
        return [numpy.repeat(_one_hot(repr(value)), count, axis=0)]
    if isinstance(value, numpy.ndarray | numpy.generic):
        value = torch.as_tensor(value)
    if isinstance(value, list | tuple):
        value = _of_list(value, rows)
    if not isinstance(value, torch.Tensor) or value.is_complex() or value.is_sparse or value.is_nested:
        raise TypeError(f"a {type(value).__name__} cannot be described")
    if value.dim() == 0:
        return [numpy.repeat(_one_hot(repr(value.item())), count, axis=0)]
    if len(value) != rows:
        raise TypeError("the rows of a batch cannot be distinguished")
    value = value[:_MOST_ROWS].detach()
    if is_label or name.startswith(_MADE_OF_LABELS):
        return list(_beginning(value))
    is_number = value.is_floating_point() or value.dim() > 2
    if is_number:
        return [_means(value)]
    is_text = value.dtype != torch.bool and not any(part in name for part in _FEW_VALUES)
    return list(_counts(value.reshape(len(value), -1).cpu().long(), is_text))


def _one_hot(word: str) -> numpy.ndarray:
    found = numpy.zeros((1, _CLASSES_AT_ENDS))
    found[0, zlib.crc32(word.encode()) % _CLASSES_AT_ENDS] = 1.0
    return found


def _of_list(values: Sequence[Any], rows: int) -> torch.Tensor:
    """Return a list with an entry for each row as a tensor: numbers as they are, texts as ids of their words."""
    if len(values) != rows:
        raise TypeError("the rows of a batch cannot be distinguished")
    if not all(isinstance(each, str) for each in values):
        return torch.stack([torch.as_tensor(each) for each in values])
    words = [[zlib.crc32(word.encode()) for word in each.split()] for each in values]
    longest = max(1, *map(len, words))
    # Texts of different lengths: both ends stay at the ends.
    filled = [each[: len(each) // 2] + [0] * (longest - len(each)) + each[len(each) // 2 :] for each in words]
    return torch.tensor(filled)


def _beginning(labels: torch.Tensor) -> Iterator[numpy.ndarray]:
    """Describe the places at the beginning at which all rows have the same label."""
    if labels.dim() == 2 and not labels.is_floating_point() and len(labels) > 1:
        for place in range(min(_ENDS, labels.shape[1])):
            values = labels[:, place].tolist()
            word = repr(values[0]) if len(set(values)) == 1 else "different"
            yield numpy.repeat(_one_hot(word), len(values), axis=0)


def _counts(ids: torch.Tensor, is_text: bool) -> Iterator[numpy.ndarray]:
    yield numpy.full((len(ids), 1), math.log(1 + ids.shape[1]))
    if ids.shape[1] == 0:
        return
    if not is_text:
        yield _shares(ids.clamp(0, _CLASSES_OF_FEW - 1), _CLASSES_OF_FEW)
    else:
        yield _shares(_mixed(ids, 1) % _CLASSES, _CLASSES)
        if ids.shape[1] > 1:
            yield _shares(_mixed(ids[:, 1:] + _mixed(ids[:, :-1], 2), 3) % _CLASSES, _CLASSES)
    for ends in (ids[:, :_ENDS], _after_padding(ids), ids.flip(1)[:, :_ENDS], _after_padding(ids.flip(1))):
        places = torch.arange(ends.shape[1])
        yield _shares(_mixed(ends + 1000003 * places, 4) % _CLASSES_AT_ENDS, _CLASSES_AT_ENDS)


def _after_padding(ids: torch.Tensor) -> torch.Tensor:
    """Return the values at the beginning of each row without a repeated first value, which is padding."""
    starts = (ids != ids[:, :1]).int().argmax(1, keepdim=True)
    places = starts + torch.arange(min(_ENDS, ids.shape[1]))
    return ids.gather(1, places.clamp(max=ids.shape[1] - 1))


def _mixed(values: torch.Tensor, salt: int) -> torch.Tensor:
    """Return numbers that are evenly spread, the same for the same values."""
    return ((values * 0x9E3779B1 + salt * 0x85EBCA77) & 0xFFFFFFFF) * 0xC2B2AE35 >> 16 & 0xFFFF


def _shares(codes: torch.Tensor, classes: int) -> numpy.ndarray:
    """Return which part of the values of each row is in each class."""
    counts = torch.zeros(len(codes), classes).scatter_add_(1, codes, torch.ones(codes.shape))
    return (counts / codes.shape[1]).numpy()


def _means(values: torch.Tensor) -> numpy.ndarray:
    if values.dim() == 4:
        high, wide = (max(1, side // _MOST_ON_SIDE) for side in values.shape[2:])
        values = values[:, :_CHANNELS, ::high, ::wide].float().cpu()
        coarse = torch.nn.functional.adaptive_avg_pool2d(values, _SIDE).reshape(len(values), -1)
        rows = values.reshape(len(values), -1)
    else:
        rows = values.reshape(len(values), -1)
        rows = rows[:, :: max(1, rows.shape[1] // _MOST_VALUES)].float().cpu()
        coarse = torch.nn.functional.adaptive_avg_pool1d(rows[:, None], min(_MEANS, rows.shape[1]))[:, 0]
    rough = rows.diff().abs().mean(1) if rows.shape[1] > 1 else torch.zeros(len(rows))
    overall = torch.stack([rows.mean(1), rows.std(1, unbiased=False), rough], 1)
    return torch.nan_to_num(torch.cat([overall, coarse, _waves(coarse)], 1)).numpy()


def _waves(coarse: torch.Tensor) -> torch.Tensor:
    """Return waves along random directions: their means differ where those of the values themselves do not."""
    shape = coarse - coarse.mean(1, keepdim=True)
    shape = shape / shape.pow(2).sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    generator = torch.Generator().manual_seed(0)
    angles = _FREQUENCY * shape @ torch.randn(shape.shape[1], _WAVES, generator=generator)
    return torch.cat([angles.cos(), angles.sin()], 1)


def some_rows(described: list[numpy.ndarray], most: int) -> list[numpy.ndarray]:
    """Return at most about ``most`` rows, evenly spread over all micro-batches.

    Example:
        >>> [len(rows) for rows in some_rows([numpy.zeros((32, 3))] * 4, most=16)]
        [4, 4, 4, 4]
    """
    every = max(1, math.ceil(sum(map(len, described)) / most))
    return [rows[::every] for rows in described]


def are_alike(first: Sequence[numpy.ndarray], second: Sequence[numpy.ndarray]) -> bool | None:
    """Return whether two groups of rows look as if they were drawn from the same data; ``None`` if one has too few.

    The groups are compared in every feature, and in whether it is there at all. The largest
    difference and the sum of all must not lie far beyond those of groups that are drawn from all
    rows at random (a permutation test). Groups with other features are not alike. A group needs 64 rows.

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
    shares = numpy.concatenate([*first, *second]).astype(numpy.float64)
    rows = numpy.concatenate([shares, shares > 0.0], axis=1)
    spread = rows.std(0)
    varies = spread > 1e-6 * (1e-6 + numpy.abs(rows).max(0))
    rows = (rows[:, varies] - rows[:, varies].mean(0)) / spread[varies]
    if rows.shape[1] == 0:
        return True
    weights = numpy.concatenate([numpy.full(count, 1.0 / count), numpy.full(others, -1.0 / others)])
    draw = numpy.random.default_rng(0)
    drawn = numpy.stack([weights, *(draw.permutation(weights) for _ in range(_PERMUTATIONS))]) @ rows
    sizes = (numpy.abs(drawn).max(1), (drawn**2).sum(1))
    return all(size[0] <= size[1:].mean() + _BEYOND * size[1:].std() for size in sizes)
