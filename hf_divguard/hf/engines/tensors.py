"""Copies of tensors in CPU memory, and the parts of sharded ones that a rank holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hf_divguard.hf.host import Host

__all__ = ["held_by_optimizer", "kept_tensors", "named_shortly", "to_cpu"]


def held_by_optimizer(host: Host) -> set[int]:
    """Return the identities of the parameters that the optimizer holds."""
    return {id(each) for group in host.optimizer.param_groups for each in group["params"]}


def kept_tensors(host: Host) -> dict[str, torch.Tensor]:
    """Return what training changes or may change: what takes a gradient, what the optimizer holds, every buffer."""
    held = held_by_optimizer(host)
    kept = {
        name: each for name, each in host.model.named_parameters() if each.requires_grad or id(each) in held
    }
    return {**kept, **dict(host.model.named_buffers())}


def to_cpu(value: Any) -> Any:
    """Return a copy of a nested state with every tensor copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_cpu(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu(entry) for entry in value)
    return value


def named_shortly(names: list[str]) -> str:
    """Return the first three names, for a sentence."""
    return ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if len(names) > 3 else "")
