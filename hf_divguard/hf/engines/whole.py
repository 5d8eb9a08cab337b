"""Every rank holds the whole model and optimizer: one process, and DistributedDataParallel."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from hf_divguard.errors import CheckpointError
from hf_divguard.hf.engines import optimizer_by_name
from hf_divguard.hf.engines.engine import Engine, KeptState, Unsupported
from hf_divguard.hf.engines.tensors import (
    held_by_optimizer,
    kept_parts,
    live_parts,
    named_shortly,
    to_cpu,
)
from hf_divguard.hf.engines.whole_weights import load_weights, weights_kept_on_error
from hf_divguard.hf.losses import gradient_norm
from hf_divguard.hf.rates import rates_kept, replace_optimizer_state

if TYPE_CHECKING:
    from hf_divguard.hf.host import Host

__all__ = ["Whole"]


class Whole(Engine):
    """One process, or the same model and optimizer on every rank."""

    name = "one process, DistributedDataParallel"

    @classmethod
    def is_at_work(cls, host: Host) -> bool:
        """Return whether no other engine is: it stands last in the list."""
        return True

    def unsupported(self) -> Unsupported | None:
        """Return why optimizers that run in the backward pass cannot be put back."""
        optimizer = str(getattr(self.host.args.optim, "value", self.host.args.optim))
        if "layerwise" in optimizer or optimizer in ("lomo", "adalomo"):
            return Unsupported(
                f"the optimizer {optimizer}, which updates the weights during the backward pass"
            )
        return None

    # ---- in memory

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what training changes or may change."""
        return kept_parts(self.host)

    def keep(self, *, with_optimizer: bool = True) -> KeptState:
        """Return a copy in CPU memory."""
        return KeptState(
            to_cpu(self.tensors()),
            to_cpu(self.host.optimizer.state_dict()) if with_optimizer else {},
        )

    def check(self, kept: KeptState, step: int) -> None:
        """Raise if the optimizer was given a parameter only after the state was kept."""
        held = held_by_optimizer(self.host)
        parameters = self.host.model.named_parameters()
        lacking = [name for name, each in parameters if id(each) in held and name not in kept.tensors]
        if lacking:
            raise CheckpointError(
                f"The snapshot of step {step} lacks {named_shortly(lacking)}, which the optimizer was given only after "
                "it was taken."
            )

    def put_back(self, kept: KeptState, *, weights_only: bool = False) -> None:
        """Copy a kept state into the parameters, and give the optimizer a copy of its own."""
        present = live_parts(self.host)
        with torch.no_grad():
            for name, tensor in kept.tensors.items():
                if name in present:
                    present[name].copy_(tensor)
        if not weights_only:
            # The optimizer takes over tensors it is given as they are; the kept ones must stay as they are.
            replace_optimizer_state(self.host, to_cpu(kept.optimizer))

    @contextlib.contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Put trained parameters and buffers back as they were on an error."""
        with weights_kept_on_error(self.host.model):
            yield

    @contextlib.contextmanager
    def swapped(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Let parameters and buffers use other memory. The optimizer's objects stay, and so does their own memory.

        Buffers always get a copy: some modules write to them in evaluation mode too.
        """
        named = dict(self.host.model.named_parameters())
        buffers = dict(self.host.model.named_buffers())
        replaced: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for name, tensor in (*named.items(), *buffers.items()):
                kept = tensors.get(name)
                if kept is None and name not in buffers:
                    continue
                other = tensor.detach().clone() if kept is None else kept.to(tensor.device, copy=True)
                replaced.append((tensor, tensor.data))
                tensor.data = other
            yield
        finally:
            for tensor, own in replaced:
                tensor.data = own

    # ---- on disk

    def read(self, checkpoint: str, *, weights_only: bool = False) -> Callable[[], None]:
        """Read the optimizer; the weights are read and written tensor by tensor by what is returned."""
        put_optimizer = None if weights_only else self._read_optimizer(checkpoint)

        def put() -> None:
            load_weights(self.host, checkpoint)
            if put_optimizer is not None:
                with rates_kept(self.host):
                    put_optimizer()

        return put

    def _read_optimizer(self, checkpoint: str) -> Callable[[], None]:
        if optimizer_by_name.has_optimizer(checkpoint):
            return optimizer_by_name.read_optimizer(self.host, checkpoint)
        path = os.path.join(checkpoint, "optimizer.pt")
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{checkpoint} has no optimizer.pt, so training cannot go back to it. Keep `save_only_model=False`."
            )
        # To the CPU: `load_state_dict` moves each tensor to the device of its parameter.
        state = torch.load(path, map_location="cpu", weights_only=True)
        return lambda: self.host.optimizer.load_state_dict(state)

    def loads_optimizer(self, checkpoint: str) -> bool:
        """Return whether ``checkpoint`` was saved by a run whose model Transformers had sharded."""
        return optimizer_by_name.has_optimizer(checkpoint)

    def read_to_resume(self, checkpoint: str) -> Callable[[], None]:
        """Read optimizer and schedule to resume from such a run."""
        return optimizer_by_name.read_to_resume(self.host, checkpoint)

    # ---- gradients

    def gradient_norm(self) -> torch.Tensor | None:
        """Return the norm of all gradients."""
        return gradient_norm(self.host.model)
