"""What the files of a checkpoint are, by their names: the Trainer's own layout and others."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hf_divguard.storage.trainer_state import TRAINER_STATE_NAME

__all__ = [
    "ARCHIVE",
    "RNG",
    "SHARD",
    "TRAINING_STATE",
    "foreign_layout",
    "has_training_state",
    "is_trainer_file",
    "missing_parts",
    "weight_files",
]

_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
SHARD = re.compile(r"(?:model|pytorch_model)-[0-9]+-of-[0-9]+\.(?:safetensors|bin)")
"""Name of one of several files of weights."""

_RESUME = r"(?:optimizer|scheduler|scaler)\.pt|rng_state(?:_[0-9]+)?\.pth"
_STATE = rf"{_RESUME}|training_args\.bin"
TRAINING_STATE = re.compile(_RESUME)
"""Name of a file that only a resume needs."""

ARCHIVE = re.compile(rf"{_STATE}|adapter_model\.bin|pytorch_model(?:-.*)?\.bin")
"""Name of a file that the Trainer writes with ``torch.save``."""

RNG = re.compile(r"rng_state(?:_([0-9]{1,9}))?\.pth")
"""Name of the file of random states of one process."""

# Models that save themselves choose names of their own.
_OWN_WEIGHTS = re.compile(r".*\.(?:safetensors|bin|pt|pth|ckpt|h5|msgpack|npz|npy|onnx|gguf|pkl|dat)")
# What other ways of saving leave, by names alone. Their parts are many files written by
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
        if "/" in folder or not (base in _WEIGHTS or SHARD.fullmatch(base)):
            continue
        if not folder or base.startswith("adapter_model.") or several_modules:
            found.append(name)
    return found


def is_trainer_file(name: str) -> bool:
    """Return whether the Trainer itself gives a file of its checkpoints this ``name``."""
    return name == TRAINER_STATE_NAME or ARCHIVE.fullmatch(name) is not None


def has_training_state(names: Iterable[str]) -> bool:
    """Return whether the file ``names`` hold all that the Trainer resumes from besides the weights."""
    return not _missing_state(set(names))


def _missing_state(names: set[str]) -> list[str]:
    missing = [
        f"`{name}`" for name in (TRAINER_STATE_NAME, "optimizer.pt", "scheduler.pt") if name not in names
    ]
    return missing if any(map(RNG.fullmatch, names)) else [*missing, "`rng_state.pth`"]


def missing_parts(names: Iterable[str], *, weights: bool, training_state: bool) -> list[str]:
    """Return what a save should have written and is not among the file ``names``, in words.

    A model that saves itself may use file names of its own: any file that can hold weights
    counts then. Of another layout (DeepSpeed, FSDP...) the trainer state and the random states
    are expected, and the rest is taken to be there.

    Args:
        names: The files of the folder.
        weights: Whether the weights of the model are expected.
        training_state: Whether optimizer, scheduler, random states and trainer state are expected.

    Example:
        >>> missing_parts(["trainer_state.json", "rng_state.pth"], weights=True, training_state=False)
        ['the weights of the model']
        >>> missing_parts(["model.safetensors", "trainer_state.json"], weights=True, training_state=True)
        ['`optimizer.pt`', '`scheduler.pt`', '`rng_state.pth`']
    """
    listed = set(names)
    layout = foreign_layout(listed)
    missing = []
    if weights and layout is None and not weight_files(listed):
        own = [name for name in listed if _OWN_WEIGHTS.fullmatch(name) and not re.fullmatch(_STATE, name)]
        missing += [] if own else ["the weights of the model"]
    if training_state:
        elsewhere = () if layout is None else ("`optimizer.pt`", "`scheduler.pt`")
        missing += [name for name in _missing_state(listed) if name not in elsewhere]
    return missing
