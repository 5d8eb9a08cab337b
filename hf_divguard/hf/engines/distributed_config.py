"""Models that Transformers has sharded itself: ``from_pretrained(distributed_config=DistributedConfig(fsdp_size=2))``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_divguard.errors import CheckpointError
from hf_divguard.hf.engines import optimizer_by_name
from hf_divguard.hf.engines.elsewhere import NO_RESUME, parallelism
from hf_divguard.hf.engines.engine import Unsupported
from hf_divguard.hf.engines.fsdp import Sharded, reshard
from hf_divguard.hf.engines.sharded_files import read_weights
from hf_divguard.hf.engines.tensors import is_adapted
from hf_divguard.hf.engines.whole_weights import load_weights
from hf_divguard.hf.rates import rates_kept

if TYPE_CHECKING:
    from hf_divguard.hf.host import Host

__all__ = ["DistributedConfig"]


class DistributedConfig(Sharded):
    """FSDP2 by Transformers, with ``fsdp_size`` and ``dp_replicate_size``.

    A checkpoint holds the weights as one model, as the host saves them, and the optimizer by
    the names of the parameters. The host saves no optimizer, and cannot load the weights.
    """

    name = "FSDP2 by `DistributedConfig`"

    @classmethod
    def is_at_work(cls, host: Host) -> bool:
        """Return whether Transformers has sharded the model, and no layer is divided."""
        return _is_loaded_in_parts(host) and parallelism(host) is None

    def unsupported(self) -> Unsupported | None:
        """Return why the parallelism of experts or of stages has no rollback."""
        config = self.host.model.config.distributed_config
        for name in ("pp_size", "ep_size"):
            if (getattr(config, name, 1) or 1) > 1:
                return Unsupported(f"`{name}={getattr(config, name)}` in `DistributedConfig`", NO_RESUME)
        return None

    def settle(self) -> None:
        """Shard parameters that an evaluation has left gathered."""
        reshard(self.host.model)

    # ---- on disk

    def read(self, checkpoint: str, *, weights_only: bool = False) -> Callable[[], None]:
        """Read this rank's part of weights and optimizer."""
        self.settle()
        put_weights = self._read_weights(checkpoint)
        put_optimizer = None if weights_only else self._read_optimizer(checkpoint)

        def put() -> None:
            put_weights()
            if put_optimizer is not None:
                with rates_kept(self.host):
                    put_optimizer()

        return put

    def _read_weights(self, checkpoint: str) -> Callable[[], None]:
        if is_adapted(self.host.model):
            # Adapters are whole on every rank.
            return lambda: load_weights(self.host, checkpoint)
        return read_weights(self.host.model, checkpoint)

    def _read_optimizer(self, checkpoint: str) -> Callable[[], None]:
        self._check_optimizer(checkpoint)
        return optimizer_by_name.read_optimizer(self.host, checkpoint)

    def _check_optimizer(self, checkpoint: str) -> None:
        if optimizer_by_name.has_optimizer(checkpoint):
            return
        if os.path.isfile(os.path.join(checkpoint, "optimizer.pt")):
            raise CheckpointError(
                f"The optimizer in {checkpoint} is that of a model that was not sharded. Go on from it without "
                "`distributed_config`, or start a new run from its weights."
            )
        raise FileNotFoundError(
            f"{checkpoint} has no optimizer, so training cannot go on from it. Keep `save_only_model=False`."
        )

    @property
    def loads_weights(self) -> bool:
        """Whether the host cannot load the weights: those of a whole model into sharded parameters."""
        return not is_adapted(self.host.model)

    def save_optimizer(self, folder: str) -> bool:
        """Save the optimizer by the names of the parameters; the ranks exchange what each of them writes."""
        self.settle()
        optimizer_by_name.save_optimizer(self.host, folder)
        return True

    def loads_optimizer(self, checkpoint: str) -> bool:
        """Return that the optimizer has to be loaded here."""
        return True

    def read_to_resume(self, checkpoint: str) -> Callable[[], None]:
        """Read optimizer and schedule to resume from."""
        self._check_optimizer(checkpoint)
        return optimizer_by_name.read_to_resume(self.host, checkpoint)


def _is_loaded_in_parts(host: Host) -> Any:
    return getattr(host.trainer, "is_distributed_loading_by_transformers", False)
