"""DeepSpeed on CPU: its configuration, and what a rank holds under it."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from tests.processes import ROOT

CONFIGS = ROOT / "examples" / "configs"
STATES = "*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
"""Name of the part of a rank in a checkpoint."""


def prepare_zero_on_cpu() -> None:
    """Let DeepSpeed train on CPU in this process."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with it accelerate would not use DeepSpeed
    import deepspeed

    # Without an exchange in shared memory, which DeepSpeed would compile first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero_options(stage: int, **more: Any) -> dict[str, Any]:
    """Return the arguments of a run under ZeRO; this process is made ready for it."""
    prepare_zero_on_cpu()
    from accelerate.state import AcceleratorState

    # A process has one plugin of DeepSpeed for all of its trainers.
    AcceleratorState._reset_state(reset_partial_state=False)
    # Stage 1 has the settings of stage 2.
    config = json.loads((CONFIGS / f"deepspeed_zero{max(stage, 2)}.json").read_text())
    config["zero_optimization"]["stage"] = stage
    if stage == 3:
        # Some parameters stay whole on every rank, most do not.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 10
    config |= {"zero_force_ds_cpu_optimizer": False, **more}
    return {"deepspeed": config}


def is_zero(trainer: Any) -> bool:
    """Return whether a trainer has trained with DeepSpeed."""
    return hasattr(trainer.model_wrapped, "load_checkpoint")


def float32_parts(trainer: Any) -> list[torch.Tensor]:
    """Return this rank's live parts of the weights that the optimizer updates."""
    zero = trainer.model_wrapped.optimizer
    parts = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    return [part.data for part in parts]


def held_by_zero(trainer: Any) -> dict[str, Any]:
    """Return what this rank holds: its parts of the float32 weights and of the moments, and all weights."""
    import deepspeed

    zero = trainer.model_wrapped.optimizer
    parts = {f"part {index}": part.clone() for index, part in enumerate(float32_parts(trainer))}
    with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
        whole = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    moments = [
        {key: entry.clone() for key, entry in state.items() if isinstance(entry, torch.Tensor)}
        for state in zero.optimizer.state.values()
    ]
    return {"weights": {**parts, **whole}, "optimizer": moments}
