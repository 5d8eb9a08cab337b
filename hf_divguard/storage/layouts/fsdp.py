"""Checkpoints of FSDP through accelerate: shards of each rank, or full state dicts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hf_divguard.storage.archives import check_zip
from hf_divguard.storage.layouts.dcp import add_folder
from hf_divguard.storage.layouts.layout import Parts
from hf_divguard.storage.regular_files import LimitExceeded

__all__ = ["FsdpLayout"]

_WEIGHTS = re.compile(r"(pytorch_model_fsdp_[0-9]{1,3})/.*|(pytorch_model_fsdp(?:_[0-9]{1,3})?\.bin)")
_OPTIMIZER = re.compile(r"(optimizer_[0-9]{1,3})/.*|(optimizer(?:_[0-9]{1,3})?\.bin)")


class FsdpLayout:
    """The files of accelerate's ``save_fsdp_model`` and ``save_fsdp_optimizer``."""

    name = "FSDP"

    def is_here(self, names: Iterable[str]) -> bool:
        """Return whether one of the file ``names`` is of FSDP."""
        return any(_WEIGHTS.fullmatch(name) or _OPTIMIZER.fullmatch(name) for name in names)

    def parts(self, folder: Path, sizes: Mapping[str, int], ranks: Sequence[int] | None) -> Parts:
        """Judge the files of a folder."""
        found = Parts()
        for pattern, files in ((_WEIGHTS, found.weights), (_OPTIMIZER, found.optimizer)):
            matches = [match for name in sizes if (match := pattern.fullmatch(name)) is not None]
            for sub_folder in sorted({match[1] for match in matches if match[1]}):
                add_folder(found, folder, sub_folder, sizes, files)
            for name in sorted(match[2] for match in matches if match[2]):
                files.add(name)
                try:
                    check_zip(folder / name)
                except LimitExceeded:
                    pass
                except ValueError as error:
                    found.problems[name] = str(error)
        for name, files in (("pytorch_model_fsdp", found.weights), ("optimizer", found.optimizer)):
            if not files:
                files.add(f"{name}_0/.metadata")
                if ranks is None or 0 in ranks:
                    found.problems[f"{name}_0/.metadata"] = f"is missing, and there is no `{name}.bin`"
        return found
