"""Checkpoints of DeepSpeed: one folder with the weights and, for each rank, its part of the optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hf_divguard.storage.archives import check_zip
from hf_divguard.storage.layouts.layout import Parts, ranks_of
from hf_divguard.storage.regular_files import LimitExceeded, open_regular_file

__all__ = ["LATEST", "DeepSpeedLayout", "files_of_rank", "folder_of_state"]

LATEST = "latest"
"""Name of the file that holds the name of the folder of the state."""

_LONGEST_NAME = 200
_STATE = re.compile(r"(?P<folder>[^/]+)/(?P<kind>.*(?:model|optim)_states\.pt)")
_FOLDER = re.compile(r"global_step[0-9]+")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_([0-9]{1,9})_mp_rank_([0-9]{1,9})_optim_states\.pt")
_SHARD = re.compile(r"zero_pp_rank_([0-9]{1,9})_mp_rank_([0-9]{1,9})_model_states\.pt")
_MODEL = re.compile(r"mp_rank_([0-9]{1,9})_model_states\.pt")
_EXPERTS = re.compile(r"(?:layer_|expert_|expp_rank_).*_states\.pt")


def folder_of_state(folder: Path) -> str | None:
    """Return the name of the folder with the state in the checkpoint ``folder``; ``None`` if nothing names it.

    Raises:
        OSError: If the file that names it cannot be read.
    """
    try:
        with open(open_regular_file(folder / LATEST), "rb") as file:
            name = file.read(_LONGEST_NAME + 1).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    is_plain = 0 < len(name) <= _LONGEST_NAME and name.isprintable() and not re.search(r"[/\\]|^\.+$", name)
    return name if is_plain else None


def files_of_rank(names: Iterable[str], state: str, rank: int) -> list[str]:
    """Return the files that ``rank`` reads, whether they are there or not.

    Args:
        names: The files of the checkpoint, by POSIX path: they show which form it has.
        state: Name of the folder with the state.
        rank: The rank, counted among those that share the work on different data.

    Example:
        >>> files_of_rank(["global_step4/mp_rank_00_model_states.pt"], "global_step4", 1)
        ['global_step4/mp_rank_00_model_states.pt', 'global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt']
    """
    inside = [name[len(state) + 1 :] for name in names if name.startswith(f"{state}/")]
    prefix = "bf16_" if any(each.startswith("bf16_zero_") for each in inside) else ""
    sharded = any(map(_SHARD.fullmatch, inside))
    model = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if sharded else "mp_rank_00_model_states.pt"
    return [f"{state}/{model}", f"{state}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"]


class DeepSpeedLayout:
    """The files of DeepSpeed's ``save_checkpoint`` with ZeRO 1, 2 or 3."""

    name = "DeepSpeed"

    def is_here(self, names: Iterable[str]) -> bool:
        """Return whether one of the file ``names`` is a state of DeepSpeed, or points to one."""
        for name in names:
            match = _STATE.fullmatch(name)
            if name in (LATEST, "zero_to_fp32.py") or (match and (_FOLDER.fullmatch(match["folder"]))):
                return True
        return False

    def parts(self, folder: Path, sizes: Mapping[str, int], ranks: Sequence[int] | None) -> Parts:
        """Judge the files of a folder: every rank needs the weights, and its own part of the optimizer."""
        found = Parts(holds_schedule=True)
        state = folder_of_state(folder)
        if state is None:
            found.problems[LATEST] = "is missing or names no folder; it says which one holds the state"
            found.weights.add(LATEST)
            return found
        inside = [name for name in sizes if name.startswith(f"{state}/")]
        bases = [name[len(state) + 1 :] for name in inside]
        if not any(map(_EXPERTS.fullmatch, bases)) and not _model_parallel(bases):
            for rank in _ranks_here(bases, sizes, ranks):
                weights, optimizer = files_of_rank(inside, state, rank)
                found.weights.add(weights)
                found.optimizer.add(optimizer)
                _need(found, sizes, weights, "the weights", rank if "zero_pp" in weights else None)
                _need(found, sizes, optimizer, "the optimizer", rank)
        for name, base in zip(inside, bases, strict=True):
            (found.optimizer if _OPTIMIZER.fullmatch(base) else found.weights).add(name)
            _check(found, folder, name)
        return found


def _model_parallel(bases: Iterable[str]) -> bool:
    """Return whether single layers are divided: then the ranks are counted in another way."""
    matches = [_OPTIMIZER.fullmatch(base) or _SHARD.fullmatch(base) for base in bases]
    columns = {int(match[2]) for match in matches if match is not None}
    columns |= {int(match[1]) for base in bases if (match := _MODEL.fullmatch(base)) is not None}
    return columns > {0}


def _ranks_here(bases: Iterable[str], sizes: Mapping[str, int], ranks: Sequence[int] | None) -> Sequence[int]:
    if ranks is not None:
        return ranks
    matches = [_OPTIMIZER.fullmatch(base) or _SHARD.fullmatch(base) for base in bases]
    highest = max((int(match[1]) for match in matches if match is not None), default=0)
    return range(max(highest, *ranks_of(sizes)) + 1)


def _need(found: Parts, sizes: Mapping[str, int], name: str, what: str, rank: int | None) -> None:
    if name not in sizes:
        of_rank = "" if rank is None else f"the part of rank {rank} of "
        found.problems[name] = f"is missing, {of_rank}{what}"


def _check(found: Parts, folder: Path, name: str) -> None:
    if not name.endswith(".pt"):
        return
    try:
        check_zip(folder / name)
    except LimitExceeded:
        return
    except ValueError as error:
        found.problems[name] = str(error)
