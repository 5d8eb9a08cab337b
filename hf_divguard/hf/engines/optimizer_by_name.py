"""An optimizer saved by the names of the parameters, so that any number of ranks can load it.

Transformers saves it so for a model that it has sharded (``DistributedConfig``), and any other
run can load it: one process, or a whole model on each of several.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from hf_divguard.hf.engines.sharded_files import plain_errors, read_parts
from hf_divguard.hf.engines.tensors import empty_on_cpu
from hf_divguard.storage.layouts.distributed_config import OPTIMIZER_FOLDER

if TYPE_CHECKING:
    from hf_divguard.hf.host import Host

__all__ = ["has_optimizer", "read_optimizer", "read_to_resume", "save_optimizer"]

_SCHEDULE = "scheduler.pt"


def has_optimizer(checkpoint: str) -> bool:
    """Return whether ``checkpoint`` holds an optimizer in this form."""
    return os.path.isdir(os.path.join(checkpoint, OPTIMIZER_FOLDER))


def save_optimizer(host: Host, folder: str) -> None:
    """Save optimizer and schedule into the checkpoint ``folder``. The ranks exchange what each of them writes."""
    from transformers.distributed.checkpoint import save_optimizer_distributed

    target = os.path.join(folder, OPTIMIZER_FOLDER)
    with plain_errors(f"Writing {target}"):
        save_optimizer_distributed(host.model, _bare(host), target)
    if host.args.should_save:
        torch.save(host.scheduler.state_dict(), os.path.join(folder, _SCHEDULE))


def read_optimizer(host: Host, checkpoint: str) -> Callable[[], None]:
    """Read this rank's part of the optimizer, and return what gives it to the optimizer, learning rates included.

    Raises:
        OSError: If a file is missing or cannot be read.
        CheckpointError: If something that the optimizer holds is not there.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    present: Any = get_optimizer_state_dict(host.model, _bare(host), options=options)
    read = read_parts(os.path.join(checkpoint, OPTIMIZER_FOLDER), {"optimizer": empty_on_cpu(present)})[
        "optimizer"
    ]

    def put() -> None:
        with _without_empty_groups(_bare(host)):
            set_optimizer_state_dict(host.model, _bare(host), read, options=options)

    return put


@contextlib.contextmanager
def _without_empty_groups(optimizer: Any) -> Iterator[None]:
    """Take groups without parameters out, which PyTorch cannot load: of adapters no weight is without decay."""
    empty = {place: group for place, group in enumerate(optimizer.param_groups) if not group["params"]}
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    try:
        yield
    finally:
        for place, group in empty.items():
            optimizer.param_groups.insert(place, group)


def read_to_resume(host: Host, checkpoint: str) -> Callable[[], None]:
    """Read optimizer and schedule, and return what loads them."""
    put_optimizer = read_optimizer(host, checkpoint)
    schedule = torch.load(os.path.join(checkpoint, _SCHEDULE), map_location="cpu", weights_only=True)

    def put() -> None:
        put_optimizer()
        host.scheduler.load_state_dict(schedule)

    return put


def _bare(host: Host) -> Any:
    """Return the optimizer inside of accelerate's wrapper, whose step would change the gradient scaler."""
    return getattr(host.optimizer, "optimizer", host.optimizer)
