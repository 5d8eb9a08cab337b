"""The engines that hold weights and optimizer of a run. The rest of the package knows none of them by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_divguard.hf.engines.deepspeed import DeepSpeed
from hf_divguard.hf.engines.distributed_config import DistributedConfig
from hf_divguard.hf.engines.elsewhere import Elsewhere
from hf_divguard.hf.engines.engine import Engine, KeptState, Unsupported
from hf_divguard.hf.engines.fsdp import Fsdp1, Fsdp2
from hf_divguard.hf.engines.whole import Whole

if TYPE_CHECKING:
    from hf_divguard.hf.host import Host

__all__ = ["ENGINES", "Engine", "KeptState", "Unsupported", "engine_of", "supported"]

ENGINES: tuple[type[Engine], ...] = (
    Fsdp2,
    Fsdp1,
    DeepSpeed,
    DistributedConfig,
    Elsewhere,
    Whole,
)
"""One line for each engine; the first one that is at work counts, and the last one takes what is left."""


def engine_of(host: Host) -> Engine:
    """Return the engine that the run of ``host`` trains with."""
    return next(engine for engine in ENGINES if engine.is_at_work(host))(host)


def supported() -> str:
    """Return the names of the engines that a state can be put back under."""
    return ", ".join(engine.name for engine in reversed(ENGINES) if engine.name)
