"""Folders of ``torch.distributed.checkpoint``: shards of each rank, and a list of what is in them."""

from __future__ import annotations

import pickletools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from hf_divguard.storage.layouts.layout import Parts
from hf_divguard.storage.regular_files import LimitExceeded, open_regular_file

__all__ = ["add_folder"]

_METADATA = ".metadata"
_SHARD = re.compile(r"__[0-9]{1,9}_[0-9]{1,9}\.distcp")
# Python reads so many in a few seconds. A model of 70 billion parameters on 1,000 ranks needs some ten megabytes.
_MAX_BYTES = 64 << 20
_PLACE = ("relative_path", "offset", "length")


def add_folder(
    found: Parts,
    folder: Path,
    name: str,
    sizes: Mapping[str, int],
    files: set[str],
) -> None:
    """Judge the shards in the sub-folder ``name`` of a checkpoint, and add what is wrong to ``found``.

    A folder that holds the shards of some ranks only is not complete: the list of all of them is written once, and
    every rank needs it to read its own.

    Args:
        found: Gets the problems.
        folder: The checkpoint.
        name: The sub-folder.
        sizes: All files of the checkpoint with their sizes.
        files: Gets the files that have to be there.
    """
    files |= {each for each in sizes if each.startswith(f"{name}/")}
    listed = f"{name}/{_METADATA}"
    files.add(listed)
    if listed not in sizes:
        found.problems[listed] = "is missing, the list of the shards that all ranks write into one folder"
        return
    try:
        needed = _needed(folder / listed)
    except LimitExceeded:
        return
    except ValueError as error:
        found.problems[listed] = str(error)
        return
    for base, size in needed.items():
        shard = f"{name}/{base}"
        if _SHARD.fullmatch(base) is None:
            continue
        files.add(shard)
        if shard not in sizes:
            found.problems[shard] = "is missing"
        elif sizes[shard] < size:
            words = "empty" if sizes[shard] == 0 else "too short"
            found.problems[shard] = f"is {words}: {sizes[shard]} bytes instead of at least {size}"


def _needed(path: Path) -> dict[str, int]:
    """Return the shards that the list at ``path`` names, each with the size that it has to have at least.

    The list is a pickle, of which only the constants are looked at: no object is made.

    Raises:
        ValueError: If it is no such list.
        LimitExceeded: If it is too large.
        OSError: If it cannot be read.
    """
    with open(open_regular_file(path), "rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise LimitExceeded("is larger than is read")
    needed: dict[str, int] = {}
    last: list[Any] = []
    try:
        for constant in _constants(data):
            last = [*last[-5:], constant]
            if tuple(last[:-1:2]) == _PLACE and isinstance(last[1], str):
                offset, length = last[3], last[5]
                if type(offset) is int and type(length) is int:
                    needed[last[1]] = max(needed.get(last[1], 0), offset + length)
    except Exception as error:
        raise ValueError(f"is not complete ({error})") from None
    if not needed:
        raise ValueError("names no shards")
    return needed


def _constants(data: bytes) -> Iterator[Any]:
    """Yield texts and numbers of a pickle in their order, also those that it takes from its memory."""
    memory: dict[int, Any] = {}
    last: Any = None
    for operation, given, _ in pickletools.genops(data):
        name, argument = operation.name, cast(Any, given)
        if name == "MEMOIZE":
            memory[len(memory)] = last
            continue
        if name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memory[int(argument)] = last
            continue
        if name in ("BINGET", "LONG_BINGET", "GET"):
            last = memory.get(int(argument))
        else:
            is_constant = isinstance(argument, (str, int)) and not name.startswith(("PROTO", "FRAME"))
            last = argument if is_constant else None
        if last is not None:
            yield last
