"""Judging a checkpoint by what stands in it, for those that have no manifest."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from hf_divguard.storage.archives import json_problem, safetensors_problem, zip_problem
from hf_divguard.storage.names import INCOMPLETE_NAME, MANIFEST_NAME, SIDECAR_NAME
from hf_divguard.storage.regular_files import list_files, named_file
from hf_divguard.storage.trainer_state import TRAINER_STATE_NAME

__all__ = ["Judgement", "foreign_layout", "has_training_state", "judge_contents", "weight_files"]

_MAX_ENTRIES = 200_000
_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_SHARD = re.compile(r"(?:model|pytorch_model)-[0-9]+-of-[0-9]+\.(?:safetensors|bin)")
_ARCHIVE = re.compile(
    r"(?:optimizer|scheduler|scaler)\.pt|rng_state(?:_[0-9]+)?\.pth|training_args\.bin|adapter_model\.bin|pytorch_model(?:-.*)?\.bin"
)
# JSON that the Trainer and the tokenizers write; what others put beside it may have its own form.
_JSON = re.compile(
    r"(?:.*_)?(?:config|tokenizer|vocab|added_tokens|special_tokens_map|modules)\.json|.*\.index\.json"
)
_MOST_MISSING_RANKS = 100
_RNG = re.compile(r"rng_state(?:_([0-9]{1,9}))?\.pth")
# What other ways of saving leave, told by names alone. Their parts are many files written by
# many processes, and whether all are there cannot be seen without reading them.
_FOREIGN = (
    (
        re.compile(r"global_step[0-9]+/.*|latest|zero_to_fp32\.py|(?:.*/)?[a-z0-9_]*zero_pp_rank_.*"),
        "DeepSpeed",
    ),
    (re.compile(r"pytorch_model_fsdp.*|optimizer_[0-9]+/.*|optimizer\.bin"), "FSDP"),
    (re.compile(r"(?:.*/)?\.metadata|.*\.distcp"), "torch.distributed.checkpoint"),
    (re.compile(r".*\.pt_[0-9_]+|user_content\.pt|smp_.*"), "SageMaker model parallel"),
    (
        re.compile(r"(?:.*/)?(?:model_)?mp_rank_[0-9]+.*|rank[0-9]+-of-[0-9]+.*|tf_model\.h5|.*\.msgpack"),
        "another",
    ),
)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the contents of a checkpoint folder say.

    Args:
        status: ``"unknown"`` for a way of saving that cannot be judged by its files.
        reason: One sentence.
        problems: What is wrong, in words.
        loadable: Whether the model's weights are there and whole.
        resumable: Whether training can go on from it.
    """

    status: Literal["complete", "incomplete", "unknown"]
    reason: str
    problems: tuple[str, ...] = ()
    loadable: bool = False
    resumable: bool = False


def foreign_layout(names: Iterable[str]) -> str | None:
    """Return the name of the other layout that the file ``names`` belong to, ``None`` for the Trainer's own.

    Example:
        >>> foreign_layout(["trainer_state.json", "global_step20/mp_rank_00_model_states.pt"])
        'DeepSpeed'
    """
    listed = list(names)
    return next((layout for pattern, layout in _FOREIGN if any(map(pattern.fullmatch, listed))), None)


def weight_files(names: Iterable[str]) -> list[str]:
    """Return those of the file ``names`` that hold model weights or their index.

    Files in a direct sub-folder count if they are adapters, or if ``modules.json`` says that
    the model consists of several.

    Example:
        >>> weight_files(["german/adapter_model.safetensors", "optimizer.pt", "config.json"])
        ['german/adapter_model.safetensors']
    """
    listed = list(names)
    several_modules = "modules.json" in listed
    found = []
    for name in listed:
        folder, _, base = name.rpartition("/")
        if "/" in folder or not (base in _WEIGHTS or _SHARD.fullmatch(base)):
            continue
        if not folder or base.startswith("adapter_model.") or several_modules:
            found.append(name)
    return found


def has_training_state(names: Iterable[str]) -> bool:
    """Return whether the file ``names`` hold all that the Trainer goes on from besides the weights."""
    listed = set(names)
    return {TRAINER_STATE_NAME, "optimizer.pt", "scheduler.pt"} <= listed and any(map(_RNG.fullmatch, listed))


def judge_contents(folder: str | os.PathLike[str], *, step: int | None, read_all: bool = False) -> Judgement:
    """Judge the checkpoint in ``folder`` by its files alone, as the Trainer would have left them.

    Args:
        folder: The checkpoint folder.
        step: The step that its name gives; ``None`` if its name gives none.
        read_all: Read the archives of ``torch.save`` whole and compare their checksums.

    Raises:
        OSError: If the folder cannot be listed.
    """
    folder = Path(folder)
    try:
        sizes, others = list_files(folder, limit=_MAX_ENTRIES)
    except ValueError as error:
        return Judgement("unknown", f"It cannot be judged: {error}")
    names = [name for name in sizes if name not in (SIDECAR_NAME, MANIFEST_NAME, INCOMPLETE_NAME)]
    weights, layout = weight_files(names), foreign_layout(names)
    if not names and not others:
        return Judgement("incomplete", "It is empty.", ("the folder is empty",))
    if not weights and layout is None and not any(map(_is_trainer_file, names)):
        return Judgement("unknown", "It holds none of the files that the Trainer writes into a checkpoint.")
    problems = _state_problems(folder, step)
    if layout is not None and not problems:
        return Judgement(
            "unknown",
            f"It was saved in the layout of {layout}, whose parts cannot be judged without a manifest.",
        )
    if layout is None:
        weight_problems = _weight_problems(folder, weights)
        problems |= weight_problems | _missing_companions(names, weights) | _training_problems(names)
        problems |= _damaged_files(folder, names, read_all)
        problems |= {name: f"is {kind} instead of a file" for name, kind in others.items()}
        needed = {*weights, *_missing_companions([], weights)} - {"training_args.bin"}
        loadable = not weight_problems and problems.keys().isdisjoint(needed)
    if problems:
        words = [f"{named_file(name)} {problem}" for name, problem in problems.items()]
        return Judgement("incomplete", problems_sentence(words), tuple(words), layout is None and loadable)
    if not has_training_state(names):
        reason = "The model is whole; the optimizer's state was not saved (`save_only_model`)."
        return Judgement("complete", reason, (), True, False)
    return Judgement("complete", "Every file that the Trainer writes is there and whole.", (), True, True)


def problems_sentence(problems: Sequence[str]) -> str:
    """Return the problems as one sentence that names the first three."""
    shown = "; ".join(problems[:3])
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"{shown}{more}."


def _is_trainer_file(name: str) -> bool:
    return name == TRAINER_STATE_NAME or _ARCHIVE.fullmatch(name) is not None


def _state_problems(folder: Path, step: int | None) -> dict[str, str]:
    state, problem = json_problem(folder / TRAINER_STATE_NAME)
    found = state.get("global_step") if isinstance(state, dict) else None
    if problem is None and type(found) is not int:
        problem = "holds no `global_step`"
    elif problem is None and step is not None and found != step:
        problem = f"is of step {found}, not of checkpoint-{step}"
    return {} if problem is None else {TRAINER_STATE_NAME: problem}


def _weight_problems(folder: Path, weights: list[str]) -> dict[str, str]:
    if not weights:
        others = "`pytorch_model.bin`, index of shards, `adapter_model.safetensors` or `adapter_model.bin`"
        return {"model.safetensors": f"is missing, and there is no {others} either: the model has no weights"}
    problems: dict[str, str] = {}
    for name in weights:
        parent, slash, base = name.rpartition("/")
        if base.endswith(".index.json"):
            problems |= _shard_problems(folder, name, weights)
        elif _SHARD.fullmatch(base) is not None:
            whole = f"{parent}{slash}{base.partition('-')[0]}{os.path.splitext(base)[1]}"
            if not {whole, f"{whole}.index.json"} & set(weights):
                problems[f"{whole}.index.json"] = "is missing, the index of the model's shards"
    return problems


def _shard_problems(folder: Path, index: str, weights: list[str]) -> dict[str, str]:
    content, problem = json_problem(folder / index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if problem is not None:
        return {index: problem}
    if not isinstance(shards, dict) or not shards:
        return {index: "holds no `weight_map`"}
    problems: dict[str, str] = {}
    parent, slash, _ = index.rpartition("/")
    for shard in shards.values():
        if not isinstance(shard, str) or not shard.isprintable() or re.search(r"[/\\]|^\.*$", shard):
            problems[index] = f"names a shard that is no file beside it: {str(shard)[:80]!a}"
        elif f"{parent}{slash}{shard}" not in weights:
            problems[f"{parent}{slash}{shard}"] = f"is missing, a shard that `{index}` names"
    return problems


def _missing_companions(names: list[str], weights: list[str]) -> dict[str, str]:
    """Return the files that the Trainer always writes beside the weights and that are not there.

    A model that is no ``PreTrainedModel`` has no configuration; one with an index of shards or
    settings for generation is one.
    """
    expected = {"training_args.bin"} if weights else set()
    for name in weights:
        folder, slash, base = name.rpartition("/")
        if base.startswith("adapter_model."):
            expected.add(f"{folder}{slash}adapter_config.json")
        elif base.endswith(".index.json") or f"{folder}{slash}generation_config.json" in names:
            expected.add(f"{folder}{slash}config.json")
    return dict.fromkeys(sorted(expected.difference(names)), "is missing")


def _training_problems(names: list[str]) -> dict[str, str]:
    """Return what is missing of optimizer, schedule and random states, none if no part was saved."""
    ranks = [match[1] for name in names if (match := _RNG.fullmatch(name)) is not None]
    missing = [name for name in ("optimizer.pt", "scheduler.pt") if name not in names]
    if not ranks and len(missing) == 2:
        return {}
    if not ranks:
        missing.append("rng_state.pth")
    elif None not in ranks:
        numbers = {int(rank) for rank in ranks if rank is not None}
        # One process alone writes `rng_state.pth`, so a numbered file means two or more.
        gaps = (rank for rank in range(max(2, max(numbers) + 1)) if rank not in numbers)
        missing += [f"rng_state_{rank}.pth" for rank in islice(gaps, _MOST_MISSING_RANKS)]
    return dict.fromkeys(missing, "is missing")


def _damaged_files(folder: Path, names: list[str], read_all: bool) -> dict[str, str]:
    problems: dict[str, str] = {}
    for name in names:
        base = name.rpartition("/")[2]
        problem: str | None = None
        if base.endswith(".safetensors"):
            problem = safetensors_problem(folder / name)
        elif _ARCHIVE.fullmatch(base):
            problem = zip_problem(folder / name, read_all=read_all)
        elif _JSON.fullmatch(base) and name != TRAINER_STATE_NAME:
            problem = json_problem(folder / name)[1]
        if problem is not None:
            problems[name] = problem
    return problems
