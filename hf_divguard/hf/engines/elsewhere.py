"""Ways of distributing a model that no state is put back under: refused at the start, by their right names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed

from hf_divguard.hf.engines.engine import SAFE_ADVICE, Engine, Unsupported

if TYPE_CHECKING:
    from hf_divguard.hf.host import Host

__all__ = ["NO_RESUME", "Elsewhere", "parallelism"]

NO_RESUME = (
    "Set the action to 'stop'. Transformers cannot resume such a run, so start a new one from the weights of the "
    "checkpoint that the last line of the stopped run names as the last good one"
)
"""What to do where a run can neither be rolled back nor resumed."""
_BY_TYPE = {
    "DEEPSPEED": "DeepSpeed, whose engine owns the optimizer",
    "MEGATRON_LM": "Megatron-LM, which shards weights and optimizer over the ranks",
    "XLA": "XLA, where weights and optimizer live on devices of its own",
}


class Elsewhere(Engine):
    """Tensor, context, sequence and pipeline parallelism, Megatron-LM, XLA, SageMaker."""

    @classmethod
    def is_at_work(cls, host: Host) -> bool:
        """Return whether the model or the optimizer is distributed in a way that is not known here."""
        return _found(host) is not None

    def unsupported(self) -> Unsupported | None:
        """Return what the run is distributed by."""
        return _found(self.host)


def _found(host: Host) -> Unsupported | None:
    parallel = parallelism(host)
    if parallel is not None:
        return parallel
    if getattr(host.trainer, "is_fsdp_enabled", False):
        return None
    kind = "DEEPSPEED" if getattr(host.trainer, "is_deepspeed_enabled", False) else host.distributed_type
    if kind != "NO" and not kind.startswith("MULTI_"):
        return Unsupported(_BY_TYPE.get(kind, f"the distributed type {kind}"))
    # Each save asks: parameters are looked at only where they can be sharded at all.
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_distributed and any(hasattr(parameter, "device_mesh") for parameter in host.model.parameters()):
        return Unsupported("parameters that are sharded over the ranks (DTensor)", NO_RESUME)
    return None


def parallelism(host: Host) -> Unsupported | None:
    """Return the parallelism that divides layers, sequences or experts, not only whole parameters."""
    trainer: Any = host.trainer
    loaded_in_parts = getattr(trainer, "is_distributed_loading_by_transformers", False)
    advice = NO_RESUME if loaded_in_parts else SAFE_ADVICE
    config = getattr(getattr(trainer, "accelerator", None), "parallelism_config", None)
    for name, words in {
        "tp_size": "tensor parallelism",
        "cp_size": "context parallelism",
        "sp_size": "sequence parallelism",
    }.items():
        if (getattr(config, name, 1) or 1) > 1:
            return Unsupported(f"{words} (`{name}={getattr(config, name)}`)", advice)
    if (getattr(host.model, "tp_size", None) or 1) > 1:
        return Unsupported(f"tensor parallelism (`tp_size={host.model.tp_size}`)", advice)
    return None
