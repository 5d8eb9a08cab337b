"""Reads this rank's part of a checkpoint of ``torch.distributed.checkpoint``, without waiting for other ranks."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hf_divguard.errors import CheckpointError
from hf_divguard.hf.engines.tensors import empty_on_cpu, local_part, named_shortly

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

    if not os.path.isfile(os.path.join(folder, ".metadata")):
        raise FileNotFoundError(f"{folder} has no `.metadata`, the list of the shards")
    _read(folder, FileSystemReader(folder), state)
    return state


def read_weights(model: torch.nn.Module, checkpoint: str) -> Callable[[], None]:
    """Read this rank's part of the weights from the safetensors files of ``checkpoint``, whole or in shards.

    Args:
        model: The model, with sharded or whole parameters.
        checkpoint: Folder of the checkpoint.

    Returns:
        What writes them into the model.

    Raises:
        OSError: If a file is missing or cannot be read.
        CheckpointError: If a parameter or a saved buffer is not there, or has another shape.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(checkpoint)
    there = reader.read_metadata().state_dict_metadata
    live: dict[str, torch.Tensor] = {}
    lacking = []
    for names, tensor in _with_all_names(model):
        name = next((each for each in names if each in there), None)
        if name is None:
            lacking.append(names[0])
        else:
            live[name] = tensor
    if lacking:
        raise CheckpointError(
            f"{checkpoint} does not give back {named_shortly(lacking)}, under these names. Keep states in memory with "
            "`divguard_snapshot_steps`, which hold all weights."
        )
    read = empty_on_cpu(live)
    _read(checkpoint, reader, read)

    def put() -> None:
        with torch.no_grad():
            for name, tensor in live.items():
                local_part(tensor).copy_(local_part(read[name]))

    return put


def _with_all_names(model: torch.nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """Return parameters and buffers that are saved, each with all of its names: tied weights have several."""
    saved = model.state_dict().keys()
    named = [
        *model.named_parameters(remove_duplicate=False),
        *((name, buffer) for name, buffer in model.named_buffers() if name in saved),
    ]
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
    return [(names[id(tensor)], tensor) for tensor in {id(each): each for _, each in named}.values()]


def _read(folder: str, reader: Any, state: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    with plain_errors(f"Reading {folder}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ranks do not talk to each other here is meant
        load(state, storage_reader=reader, no_dist=True)


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
