"""Reads this rank's part of a checkpoint of ``torch.distributed.checkpoint``, without waiting for other ranks."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from hf_divguard.errors import CheckpointError

__all__ = ["plain_errors", "read_parts", "read_whole"]


@contextlib.contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """Raise a ``CheckpointError`` for an error of ``torch.distributed.checkpoint``, which is no ``Exception``.

    It is derived from ``BaseException``, and so passes by what handles errors. It holds the
    errors of the ranks that failed.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        failures = dict(getattr(error, "failures", {}))
        first = next((each[0] for each in failures.values() if isinstance(each, tuple)), error)
        words = str(first).strip().splitlines()
        raise CheckpointError(
            f"{what} failed: {type(first).__name__}: {words[0] if words else ''}"
        ) from error


def read_parts(folder: str, state: dict[str, Any]) -> dict[str, Any]:
    """Read a folder of shards into ``state``, which has the form and the memory for this rank's part.

    Every rank reads what it needs from the shards of all ranks: their number may be another one
    than at the save.

    Args:
        folder: Folder with ``.metadata`` and the shards.
        state: Nested; its tensors are overwritten.

    Returns:
        ``state``, with what is no tensor replaced too.

    Raises:
        OSError: If a file is missing or cannot be read.
        CheckpointError: If something that ``state`` has is not in there.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    if not os.path.isfile(os.path.join(folder, ".metadata")):
        raise FileNotFoundError(f"{folder} has no `.metadata`, the list of the shards")
    with plain_errors(f"Reading {folder}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ranks do not talk to each other here is meant
        load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def read_whole(path: str, state: dict[str, Any], prefix: str = "") -> Any:
    """Read a file with all of a state, and compare it with ``state``, which has names and shapes of the model.

    Raises:
        OSError: If the file is missing or cannot be read.
        CheckpointError: If something that ``state`` has is not in there in the same shape.
    """
    read = torch.load(path, map_location="cpu", weights_only=True)
    problem = _difference(state, read, prefix)
    if problem is not None:
        raise CheckpointError(f"{path} does not fit the model: {problem}")
    return read


def _difference(wanted: Any, read: Any, name: str) -> str | None:
    if isinstance(wanted, dict):
        if not isinstance(read, dict):
            return f"`{name}` is no mapping"
        for key, value in wanted.items():
            if key not in read:
                return f"it lacks `{name}{key}`"
            if (problem := _difference(value, read[key], f"{name}{key}.")) is not None:
                return problem
    elif isinstance(wanted, torch.Tensor) and tuple(wanted.shape) != tuple(getattr(read, "shape", (-1,))):
        return f"`{name.rstrip('.')}` has the shape {tuple(getattr(read, 'shape', ()))} instead of {tuple(wanted.shape)}"
    return None
