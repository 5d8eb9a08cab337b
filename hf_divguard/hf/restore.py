"""Puts weights, optimizer and scaler of a checkpoint into a running loop; the schedule stays where it is."""

from __future__ import annotations

import os
from typing import Any

import torch

from hf_divguard.hf.rates import follows_metrics, load_schedule, replace_optimizer_state

__all__ = ["refuse_unsupported", "restore_checkpoint"]


def refuse_unsupported(trainer: Any) -> None:
    """Raise where weights and optimizer cannot be put back inside the running loop.

    Raises:
        ValueError: For engines that own or shard the optimizer, for sharded parameters and
            for optimizers that live in the backward pass; the sentence says what works.
    """
    engine = _engine_in_the_way(trainer)
    if engine is not None:
        raise ValueError(
            f"`rollback` does not work with {engine}: weights and optimizer cannot be put back there inside the running "
            "loop. Use the action 'stop' and restart with resume_from_checkpoint=True. Supported are one process and "
            "DistributedDataParallel."
        )
    if trainer.args.save_only_model and trainer._options.divguard_snapshot_steps == 0:
        raise ValueError(
            "`rollback` needs the optimizer of a checkpoint, but `save_only_model=True` saves none. Set it to false, "
            "or keep states in memory with `divguard_snapshot_steps`."
        )


def _engine_in_the_way(trainer: Any) -> str | None:
    if getattr(trainer, "is_deepspeed_enabled", False):
        return "DeepSpeed, whose engine owns the optimizer"
    if getattr(trainer, "is_fsdp_enabled", False):
        return "FSDP, which shards weights and optimizer over the ranks"
    kind = str(getattr(trainer.accelerator.distributed_type, "value", trainer.accelerator.distributed_type))
    if kind != "NO" and not kind.startswith("MULTI_"):
        return f"the distributed type {kind}"
    if any(hasattr(parameter, "device_mesh") for parameter in trainer.model.parameters()):
        return "tensor parallelism, which shards the weights over the ranks"
    if "layerwise" in str(getattr(trainer.args.optim, "value", trainer.args.optim)):
        return "a layerwise optimizer, which updates the weights during the backward pass"
    return None


def restore_checkpoint(trainer: Any, checkpoint: str, *, with_rng: bool, rate_factor: float) -> None:
    """Load weights, optimizer and gradient scaler of ``checkpoint`` into the running ``trainer``.

    The parameter objects stay the same. The place of the learning-rate schedule, the data
    iterator and (unless asked for) the random number generators are left alone. A schedule
    that goes by evaluations goes back too: it must not conclude anything from those of the
    diverged stretch.

    Args:
        trainer: The trainer.
        checkpoint: Folder of the checkpoint.
        with_rng: Also put back the random number generators.
        rate_factor: By how much the learning rate has been lowered for good since then.

    Raises:
        FileNotFoundError: If the checkpoint has no optimizer.
    """
    optimizer_file = os.path.join(checkpoint, "optimizer.pt")
    if not os.path.isfile(optimizer_file):
        raise FileNotFoundError(
            f"{checkpoint} has no optimizer.pt, so training cannot go back to it. Keep `save_only_model=False`."
        )
    # Everything is read before anything is changed. To the CPU: `load_state_dict` moves each tensor to the
    # device of its parameter.
    state = torch.load(optimizer_file, map_location="cpu", weights_only=True)
    schedule = None
    if follows_metrics(trainer):
        schedule_file = os.path.join(checkpoint, "scheduler.pt")
        schedule = torch.load(schedule_file, map_location="cpu", weights_only=True)
    trainer._load_from_checkpoint(checkpoint)
    replace_optimizer_state(trainer, state)
    if schedule is not None:
        load_schedule(trainer, schedule, rate_factor)
    if getattr(trainer.accelerator, "scaler", None) is not None:
        trainer._load_scaler(checkpoint)
    if with_rng:
        trainer._load_rng_state(checkpoint)
