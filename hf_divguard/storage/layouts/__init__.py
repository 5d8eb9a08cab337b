"""The layouts of sharded checkpoints whose files can be judged, each with the rank that a file belongs to."""

from __future__ import annotations

from collections.abc import Iterable

from hf_divguard.storage.layouts.deepspeed import DeepSpeedLayout
from hf_divguard.storage.layouts.distributed_config import DistributedConfigLayout
from hf_divguard.storage.layouts.fsdp import FsdpLayout
from hf_divguard.storage.layouts.layout import Layout, Parts

__all__ = ["LAYOUTS", "Layout", "Parts", "layout_of"]

LAYOUTS: tuple[Layout, ...] = (
    DeepSpeedLayout(),
    DistributedConfigLayout(),
    FsdpLayout(),
)
"""One line for each layout; the first that is there counts."""


def layout_of(names: Iterable[str]) -> Layout | None:
    """Return the layout that the file ``names`` of a checkpoint are in; ``None`` for the Trainer's own and unknown ones.

    Example:
        >>> layout_of(["pytorch_model_fsdp.bin", "optimizer.bin", "trainer_state.json"]).name
        'FSDP'
    """
    listed = list(names)
    return next((layout for layout in LAYOUTS if layout.is_here(listed)), None)
