"""What is asked of the layout of a sharded checkpoint: its files, and which rank each belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

__all__ = ["Layout", "Parts", "ranks_of"]

_RNG = re.compile(r"rng_state_([0-9]{1,9})\.pth")


@dataclass(slots=True)
class Parts:
    """What of the weights and of the optimizer a folder holds, and what is wrong with it.

    Args:
        problems: What is wrong, in words, by file: ``"is missing, the part of rank 1 of the weights"``.
        weights: The files of the weights; empty if there are none.
        optimizer: The files of the optimizer; empty if it was not saved.
        holds_schedule: Whether the files of the optimizer hold the schedule too.
    """

    problems: dict[str, str] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)
    optimizer: set[str] = field(default_factory=set)
    holds_schedule: bool = False


class Layout(Protocol):
    """The files that one engine leaves in a checkpoint."""

    name: str
    """Name for messages."""

    def is_here(self, names: Iterable[str]) -> bool:
        """Return whether the file ``names`` of a folder are of this layout."""

    def parts(self, folder: Path, sizes: Mapping[str, int], ranks: Sequence[int] | None) -> Parts:
        """Judge the files of a folder. Nothing is unpickled.

        Args:
            folder: The folder, to read the files that list others.
            sizes: All of its files with their sizes, by POSIX path.
            ranks: The processes whose files stand here; ``None`` if it must be found out from the files.

        Raises:
            OSError: If a file that must be read cannot be.
        """


def ranks_of(names: Iterable[str]) -> list[int]:
    """Return the ranks that trained, as far as the files of their random states tell: from 0 to the highest.

    Example:
        >>> ranks_of(["rng_state_0.pth", "rng_state_2.pth", "trainer_state.json"])
        [0, 1, 2]
        >>> ranks_of(["rng_state.pth"])
        [0]
    """
    found = [int(match[1]) for name in names if (match := _RNG.fullmatch(name)) is not None]
    return list(range(max(found) + 1)) if found else [0]
