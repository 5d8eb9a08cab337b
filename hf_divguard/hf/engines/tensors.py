"""The parts of weights and of optimizer states that a rank holds, and copies of them in CPU memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hf_divguard.hf.host import Host

__all__ = [
    "bytes_of",
    "empty_on_cpu",
    "held_by_optimizer",
    "is_adapted",
    "kept_parts",
    "live_parts",
    "local_part",
    "named_shortly",
    "to_cpu",
]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor: of a sharded one (DTensor) its shard, of any other all of it."""
    if not hasattr(tensor, "placements"):
        return tensor.detach()
    with torch.no_grad():
        part: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def live_parts(host: Host) -> dict[str, torch.Tensor]:
    """Return this rank's part of all parameters and buffers, by name. Writing into it changes the model."""
    named = {**dict(host.model.named_parameters()), **dict(host.model.named_buffers())}
    return {name: local_part(tensor) for name, tensor in named.items()}


def held_by_optimizer(host: Host) -> set[int]:
    """Return the identities of the parameters that the optimizer holds; of none before there is one."""
    if host.optimizer is None:
        return set()
    return {id(each) for group in host.optimizer.param_groups for each in group["params"]}


def kept_parts(host: Host) -> dict[str, torch.Tensor]:
    """Return this rank's part of what training may change: what takes a gradient or is in the optimizer, and buffers."""
    held = held_by_optimizer(host)
    kept = {
        name: each for name, each in host.model.named_parameters() if each.requires_grad or id(each) in held
    }
    kept.update(host.model.named_buffers())
    return {name: local_part(tensor) for name, tensor in kept.items()}


def to_cpu(value: Any) -> Any:
    """Return a copy of a nested state in CPU memory; sharded tensors stay sharded, and the copy shares nothing."""
    if isinstance(value, torch.Tensor):
        return _with_part(value, local_part(value).to("cpu", copy=True))
    if isinstance(value, dict):
        return {key: to_cpu(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu(entry) for entry in value)
    return copy.deepcopy(value)


def empty_on_cpu(value: Any) -> Any:
    """Return a nested state of the same form with memory of its own on the CPU in the place of every tensor."""
    if isinstance(value, torch.Tensor):
        return _with_part(value, torch.empty_like(local_part(value), device="cpu"))
    if isinstance(value, dict):
        return {key: empty_on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(empty_on_cpu(entry) for entry in value)
    return value


def _with_part(tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return ``part``, sharded as ``tensor`` is."""
    if not hasattr(tensor, "placements"):
        return part
    how = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
    sharded: torch.Tensor = type(tensor).from_local(part, tensor.device_mesh, tensor.placements, **how)  # type: ignore[attr-defined]
    return sharded


def bytes_of(state: Any) -> int:
    """Return the bytes that this rank holds of a nested state."""
    if isinstance(state, torch.Tensor):
        return local_part(state).nbytes
    if isinstance(state, Mapping):
        return sum(map(bytes_of, state.values()))
    return sum(map(bytes_of, state)) if isinstance(state, (list, tuple)) else 0


def named_shortly(names: list[str]) -> str:
    """Return the first three names, for a sentence."""
    return ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if len(names) > 3 else "")


def is_adapted(model: Any) -> bool:
    """Return whether checkpoints of ``model`` hold adapters (PEFT), not the model."""
    # A model of Transformers has them too, but there `active_adapters` is a method.
    return (
        hasattr(model, "peft_config")
        and hasattr(model, "load_adapter")
        and not callable(getattr(model, "active_adapters", None))
    )
