"""Checkpoints of a model that Transformers has sharded: whole weights, and the shards of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hf_divguard.storage.layout import weight_files
from hf_divguard.storage.layouts.dcp import add_folder
from hf_divguard.storage.layouts.layout import Parts

__all__ = ["OPTIMIZER_FOLDER", "DistributedConfigLayout"]

OPTIMIZER_FOLDER = "distributed_optimizer"
"""Folder of the optimizer, by the names of the parameters."""


class DistributedConfigLayout:
    """The weights as for one process, and an optimizer that any number of ranks can load."""

    name = "DistributedConfig"

    def is_here(self, names: Iterable[str]) -> bool:
        """Return whether one of the file ``names`` is part of such an optimizer."""
        return any(name.startswith(f"{OPTIMIZER_FOLDER}/") for name in names)

    def parts(self, folder: Path, sizes: Mapping[str, int], ranks: Sequence[int] | None) -> Parts:
        """Judge the files of the optimizer; the weights are judged as those of one process."""
        found = Parts(weights=set(weight_files(sizes)))
        add_folder(found, folder, OPTIMIZER_FOLDER, sizes, found.optimizer)
        return found
