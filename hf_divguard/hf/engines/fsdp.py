"""FSDP through accelerate: weights and optimizer are sharded over the ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hf_divguard.hf.engines.elsewhere import parallelism
from hf_divguard.hf.engines.engine import InExchange, KeptState, Unsupported
from hf_divguard.hf.engines.sharded_files import read_parts, read_whole
from hf_divguard.hf.engines.tensors import empty_on_cpu, kept_parts, live_parts, local_part, to_cpu
from hf_divguard.hf.engines.whole import Whole
from hf_divguard.hf.rates import rates_kept

if TYPE_CHECKING:
    from hf_divguard.hf.host import Host

__all__ = ["Fsdp1", "Fsdp2", "Sharded", "reshard"]

_FSDP2 = "Set `version` to 2 in `fsdp_config`"
_MODEL, _OPTIMIZER = "pytorch_model_fsdp", "optimizer"


class Sharded(Whole):
    """Every rank holds a part of each tensor, and writes into it where it lies. Forward passes take all ranks."""

    forwards_together = True

    def settle(self) -> None:
        """Bring the parameters into the form in which the optimizer holds them. No rank waits for another."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return this rank's part of what training changes or may change."""
        self.settle()
        return kept_parts(self.host)

    def check(self, kept: KeptState, step: int) -> None:
        """Raise if the optimizer was given a parameter only after the state was kept."""
        self.settle()
        super().check(kept, step)

    def put_back(self, kept: KeptState, *, weights_only: bool = False) -> None:
        """Write a kept state over this rank's part, and give the optimizer a copy of its own."""
        self.settle()
        super().put_back(kept, weights_only=weights_only)

    @contextlib.contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Put this rank's part of the weights back as it was on an error."""
        copies = to_cpu(self.tensors())
        try:
            yield
        except BaseException:
            self._write(copies)
            raise

    @contextlib.contextmanager
    def swapped(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Write kept parts over the present ones, which are put back at the end."""
        self.settle()
        buffers, parts = dict(self.host.model.named_buffers()), live_parts(self.host)
        own = {name: part.clone() for name, part in parts.items() if name in tensors or name in buffers}
        try:
            self._write(tensors)
            yield
        finally:
            self.settle()
            self._write(own)

    def _write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        parts = live_parts(self.host)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in parts:
                    parts[name].copy_(tensor)

    def gradient_norm(self) -> torch.Tensor | None:
        """Return the norm of all gradients, from the squares of each rank's part."""
        squares = [
            torch.linalg.vector_norm(local_part(each.grad).float()) ** 2 / _copies(each.grad)
            for each in self.host.model.parameters()
            if each.grad is not None
        ]
        total = torch.zeros((), device=self.host.args.device)
        for each in squares:
            total += each.to(total.device)
        if dist.is_initialized():
            dist.all_reduce(total)
        return total.sqrt()


def _copies(tensor: torch.Tensor) -> int:
    """Return how many ranks hold the same part of a tensor."""
    if not hasattr(tensor, "placements"):
        return dist.get_world_size() if dist.is_initialized() else 1
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    copies = 1
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            copies *= mesh.size(dimension)
    return copies


def reshard(model: torch.nn.Module) -> None:
    """Shard parameters that FSDP2 has left gathered after a forward pass."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Fsdp2(Sharded):
    """FSDP2 through accelerate, with sharded and with full state dicts."""

    name = "FSDP2"

    @classmethod
    def is_at_work(cls, host: Host) -> bool:
        """Return whether accelerate shards the model by FSDP2, and nothing else divides it."""
        return _version(host) == 2 and parallelism(host) is None

    @property
    def puts_together(self) -> bool:  # type: ignore[override]
        """Whether rank 0 sends the others their parts: with full state dicts."""
        return _is_full(self.host)

    def settle(self) -> None:
        """Shard parameters that an evaluation has left gathered."""
        reshard(self.host.model)

    def read(self, checkpoint: str, *, weights_only: bool = False) -> Callable[[], None]:
        """Read this rank's shards, or with full state dicts everything on rank 0."""
        self.settle()
        read = self._read_full if _is_full(self.host) else self._read_shards
        return read(checkpoint, weights_only)

    def _live(self, *, weights_only: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return weights and optimizer in the form in which they are saved, each rank its part."""
        from torch.distributed.checkpoint import state_dict as states

        model = self.host.model
        if _is_adapted(model) and not _is_full(self.host):
            from peft import get_peft_model_state_dict

            # As accelerate saves shards of adapters: under the names of the file of an adapter.
            weights = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
        else:
            options = states.StateDictOptions(ignore_frozen_params=_is_adapted(model))
            weights = states.get_model_state_dict(model, options=options)
        if weights_only:
            return weights, {}
        return weights, states.get_optimizer_state_dict(model, _bare(self.host.optimizer))

    def _read_shards(self, checkpoint: str, weights_only: bool) -> Callable[[], None]:
        live, optimizer = self._live(weights_only=weights_only)
        weights = read_parts(os.path.join(checkpoint, f"{_MODEL}_0"), {"model": empty_on_cpu(live)})["model"]
        if not weights_only:
            folder = os.path.join(checkpoint, f"{_OPTIMIZER}_0")
            optimizer = read_parts(folder, {"optimizer": empty_on_cpu(optimizer)})["optimizer"]

        def put() -> None:
            with torch.no_grad():
                for name, tensor in live.items():
                    if isinstance(tensor, torch.Tensor):
                        local_part(tensor).copy_(local_part(weights[name]))
            if not weights_only:
                self._put_optimizer(optimizer, is_full=False)

        return put

    def _read_full(self, checkpoint: str, weights_only: bool) -> Callable[[], None]:
        from torch.distributed.checkpoint import state_dict as states

        live, live_optimizer = self._live(weights_only=weights_only)
        weights: dict[str, Any] = {}
        optimizer: dict[str, Any] = {}
        if self.host.args.process_index == 0:
            weights = read_whole(os.path.join(checkpoint, f"{_MODEL}.bin"), live)
            if not weights_only:
                optimizer = read_whole(os.path.join(checkpoint, f"{_OPTIMIZER}.bin"), live_optimizer)

        def put() -> None:
            options = _full_options(strict=not _is_adapted(self.host.model))
            states.set_model_state_dict(self.host.model, weights, options=options)
            if not weights_only:
                self._put_optimizer(optimizer, is_full=True)

        return put

    def _put_optimizer(self, state: dict[str, Any], *, is_full: bool) -> None:
        from torch.distributed.checkpoint import state_dict as states

        options = _full_options() if is_full else None
        with rates_kept(self.host):
            states.set_optimizer_state_dict(
                self.host.model, _bare(self.host.optimizer), state, options=options
            )


class Fsdp1(Sharded):
    """FSDP1 through accelerate, with sharded state dicts."""

    name = "FSDP1 with sharded state dicts"
    puts_together = True

    @classmethod
    def is_at_work(cls, host: Host) -> bool:
        """Return whether accelerate shards the model by FSDP1."""
        return _version(host) == 1 and parallelism(host) is None

    def settle(self) -> None:
        """Shard parameters that an evaluation has left gathered."""
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp._runtime_utils import _reshard

        for module in FullyShardedDataParallel.fsdp_modules(self.host.model):
            handle = module._handle
            if not handle or not hasattr(handle.flat_param, "_full_param_padded"):
                continue  # nothing was gathered yet
            # A forward pass alone leaves the gathered parameters in memory, and the next one would use them again.
            if handle.uses_sharded_strategy and not handle.needs_unshard():
                _reshard(module, handle, True)

    def unsupported(self) -> Unsupported | None:
        """Return why other state dicts than sharded ones cannot be put back."""
        if _is_adapted(self.host.model):
            return Unsupported(
                "FSDP1 and adapters, whose weights accelerate leaves out of its shards", _FSDP2
            )
        kind = _plugin(self.host).state_dict_type.name
        if kind == "SHARDED_STATE_DICT":
            return None
        return Unsupported(
            f"FSDP1 and `state_dict_type` {kind}",
            f"{_FSDP2}, or `state_dict_type` to 'SHARDED_STATE_DICT'",
        )

    def why_nothing_skipped(self) -> str | None:
        """Return why single updates cannot be left out where ranks hold copies."""
        strategy = getattr(_plugin(self.host).sharding_strategy, "name", "FULL_SHARD")
        if strategy in ("FULL_SHARD", "SHARD_GRAD_OP"):
            return super().why_nothing_skipped()
        return f"the sharding strategy {strategy} of FSDP1"

    def read(self, checkpoint: str, *, weights_only: bool = False) -> Callable[[], None]:
        """Read this rank's shards. Before and after that the ranks exchange what the shards hold."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        model, optimizer = self.host.model, self.host.optimizer
        self.settle()
        try:
            with self._sharded_state_dicts():
                weights = {"model": model.state_dict()}
                moments = (
                    {}
                    if weights_only
                    else {"optimizer": FullyShardedDataParallel.optim_state_dict(model, optimizer)}
                )
        except Exception as error:
            raise InExchange(f"{type(error).__name__}: {error}") from error
        read_parts(os.path.join(checkpoint, f"{_MODEL}_0"), weights)
        if not weights_only:
            read_parts(os.path.join(checkpoint, f"{_OPTIMIZER}_0"), moments)

        def put() -> None:
            with self._sharded_state_dicts():
                model.load_state_dict(weights["model"])
                if not weights_only:
                    state = FullyShardedDataParallel.optim_state_dict_to_load(
                        model=model, optim=optimizer, optim_state_dict=moments["optimizer"]
                    )
                    with rates_kept(self.host):
                        optimizer.load_state_dict(state)

        return put

    def _sharded_state_dicts(self) -> contextlib.AbstractContextManager[Any]:
        from torch.distributed.fsdp import FullyShardedDataParallel

        plugin = _plugin(self.host)
        how = plugin.state_dict_type, plugin.state_dict_config, plugin.optim_state_dict_config
        entered: contextlib.AbstractContextManager[Any] = FullyShardedDataParallel.state_dict_type(
            self.host.model, *how
        )
        return entered


def _plugin(host: Host) -> Any:
    return host.trainer.accelerator.state.fsdp_plugin


def _version(host: Host) -> int | None:
    """Return the version of FSDP that accelerate shards the model with; ``None`` if it does not."""
    if not getattr(host.trainer, "is_fsdp_enabled", False):
        return None
    return int(getattr(_plugin(host), "fsdp_version", 1))


def _is_full(host: Host) -> bool:
    return bool(_plugin(host).state_dict_type.name == "FULL_STATE_DICT")


def _is_adapted(model: Any) -> bool:
    """Return whether checkpoints of ``model`` hold adapters (PEFT), not the model."""
    return hasattr(model, "peft_config") and hasattr(model, "base_model")


def _bare(optimizer: Any) -> Any:
    """Return the optimizer inside of accelerate's wrapper, whose step would change the gradient scaler."""
    return getattr(optimizer, "optimizer", optimizer)


def _full_options(**options: Any) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    sends = dist.is_initialized() and dist.get_world_size() > 1
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=sends, **options)
