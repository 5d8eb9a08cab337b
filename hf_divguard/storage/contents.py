"""Judging a checkpoint by what stands in it, for those that have no manifest."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_divguard.storage.archives import json_problem, safetensors_problem, zip_problem
from hf_divguard.storage.layout import INCOMPLETE_NAME, MANIFEST_NAME, SIDECAR_NAME
from hf_divguard.storage.regular_files import list_files
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
    if not weights and layout is None and not any(_is_trainer_file(name) for name in names):
        return Judgement("unknown", "It holds none of the files that the Trainer writes into a checkpoint.")
    state_problems = _state_problems(folder, step)
    if layout is not None:
        if state_problems:
            return _incomplete(state_problems, loadable=False)
        return Judgement(
            "unknown",
            f"It has {layout if layout != 'another' else 'another'} layout, whose parts cannot be judged "
            "without a manifest.".replace("has another layout", "has a layout of another way of saving"),
        )
    weight_problems = _weight_problems(folder, weights)
    problems = (
        state_problems + weight_problems + _missing_companions(names, weights) + _training_problems(sizes)
    )
    for name in names:
        problems += _whole_file_problems(folder, name, read_all)
    problems += [f"{name!r} is {kind} instead of a file" for name, kind in others.items()]
    problems = list(dict.fromkeys(problems))
    loadable = not weight_problems and not any(
        problem.startswith(f"`{name}` ")
        for problem in problems
        for name in (*weights, "config.json", "adapter_config.json")
    )
    if problems:
        return _incomplete(problems, loadable=loadable)
    if not has_training_state(names):
        return Judgement(
            "complete",
            "The model is whole; the optimizer's state was not saved (`save_only_model`).",
            (),
            True,
            False,
        )
    return Judgement("complete", "Every file that the Trainer writes is there and whole.", (), True, True)


def _incomplete(problems: list[str], *, loadable: bool) -> Judgement:
    return Judgement("incomplete", problems_sentence(problems), tuple(problems), loadable)


def problems_sentence(problems: list[str]) -> str:
    """Return the problems as one sentence that names the first three."""
    shown = "; ".join(problems[:3])
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"{shown}{more}."


def _is_trainer_file(name: str) -> bool:
    return name == TRAINER_STATE_NAME or _ARCHIVE.fullmatch(name) is not None


def _state_problems(folder: Path, step: int | None) -> list[str]:
    state, problem = json_problem(folder / TRAINER_STATE_NAME)
    if problem is not None:
        return [f"`{TRAINER_STATE_NAME}` {problem}"]
    found = state.get("global_step") if isinstance(state, dict) else None
    if type(found) is not int:
        return [f"`{TRAINER_STATE_NAME}` holds no `global_step`"]
    if step is not None and found != step:
        return [f"`{TRAINER_STATE_NAME}` is of step {found}, not of checkpoint-{step}"]
    return []


def _weight_problems(folder: Path, weights: list[str]) -> list[str]:
    if not weights:
        return [
            "the model's weights are missing: no `model.safetensors`, `pytorch_model.bin`, index of shards, "
            "`adapter_model.safetensors` or `adapter_model.bin`"
        ]
    problems: list[str] = []
    for index in (name for name in weights if name.endswith(".index.json")):
        parent = index.rpartition("/")[0]
        prefix = f"{parent}/" if parent else ""
        content, problem = json_problem(folder / index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if problem is not None:
            problems.append(f"`{index}` {problem}")
        elif (
            not isinstance(shards, dict)
            or not shards
            or not all(isinstance(name, str) for name in shards.values())
        ):
            problems.append(f"`{index}` holds no `weight_map`")
        else:
            for shard in sorted(set(shards.values())):
                if "/" in shard or "\\" in shard or "\0" in shard or shard in ("", ".", ".."):
                    problems.append(f"`{index}` names a shard outside its folder, {shard[:80]!a}")
                elif prefix + shard not in weights:
                    problems.append(f"`{prefix}{shard}` is missing, a shard that `{index}` names")
    for name in weights:
        parent, slash, base = name.rpartition("/")
        if _SHARD.fullmatch(base) is not None:
            whole = f"{parent}{slash}{base.partition('-')[0]}{os.path.splitext(base)[1]}"
            if not {whole, f"{whole}.index.json"} & set(weights):
                return [f"`{whole}.index.json` is missing, the index of the model's shards"]
    return problems


def _missing_companions(names: list[str], weights: list[str]) -> list[str]:
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
    return [f"`{name}` is missing" for name in sorted(expected.difference(names))]


def _training_problems(sizes: dict[str, int]) -> list[str]:
    """Return what is missing of optimizer, schedule and random states, none if no part was saved."""
    ranks = [match[1] for name in sizes if (match := _RNG.fullmatch(name)) is not None]
    parts = {name: name in sizes for name in ("optimizer.pt", "scheduler.pt")}
    if not ranks and not any(parts.values()):
        return []
    problems = [f"`{name}` is missing" for name, there in parts.items() if not there]
    if not ranks:
        problems.append("`rng_state.pth` is missing")
    elif None not in ranks:
        numbers = {int(rank) for rank in ranks if rank is not None}
        # One process alone writes `rng_state.pth`, so a numbered file means two or more.
        expected = range(min(max(2, max(numbers) + 1), 100_000))
        problems += [
            f"`rng_state_{rank}.pth` (random state of rank {rank}) is missing"
            for rank in expected
            if rank not in numbers
        ]
    return problems


def _whole_file_problems(folder: Path, name: str, read_all: bool) -> list[str]:
    base = name.rpartition("/")[2]
    problem: str | None = None
    if base.endswith(".safetensors"):
        problem = safetensors_problem(folder / name)
    elif _ARCHIVE.fullmatch(base):
        problem = zip_problem(folder / name, read_all=read_all)
    elif base.endswith(".json"):
        problem = json_problem(folder / name)[1]
    return [] if problem is None else [f"`{name}` {problem}"]
