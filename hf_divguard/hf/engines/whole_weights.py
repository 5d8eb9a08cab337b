"""Loads the weights of a whole model, as one process and DistributedDataParallel hold it, into the running model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from hf_divguard.errors import CheckpointError
from hf_divguard.hf.engines.tensors import is_adapted

if TYPE_CHECKING:
    from hf_divguard.hf.host import Host

__all__ = ["load_weights", "weights_kept_on_error"]


def load_weights(host: Host, checkpoint: str) -> None:
    """Load the weights of ``checkpoint`` into the running model, and make sure that all of them came.

    The host loads what it finds under the names of the model and leaves the rest as it is,
    with a warning at most. A tensor counts the writes into it, so one whose count stays the
    same did not come back, however the file and the adapters name it. What is saved under
    other names (mixtures of experts in Transformers 5) is read as ``from_pretrained`` does.

    Parameters keep their identity, memory, precision and ``requires_grad``; adapters that
    were active stay active.

    Raises:
        CheckpointError: If a parameter that is trained, or a buffer that should have been
            saved, did not come back. Some of the others may have: see
            :func:`weights_kept_on_error`.
    """
    model = getattr(host.model, "_orig_mod", host.model)
    wanted = _saved_tensors(model)
    counts = {name: tensor._version for name, tensor in wanted.items()}
    cause: Exception | None = None
    with _parameters_kept_in_place(model):
        try:
            host.load_weights(checkpoint)
        except RuntimeError as error:  # a shape that differs, as where weights are saved transposed
            cause = error
    written = {tensor.data_ptr() for name, tensor in wanted.items() if tensor._version != counts[name]}
    missing = [name for name, tensor in wanted.items() if tensor.data_ptr() not in written]
    if (missing or cause is not None) and not is_adapted(model) and hasattr(model, "from_pretrained"):
        try:
            missing, cause = _load_as_from_pretrained(model, checkpoint, wanted), None
        except Exception as error:
            cause = error
    if missing:
        named = ", ".join(f"`{name}`" for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"{checkpoint} does not give back {len(missing)} of {len(wanted)} tensors that training changes: {named}. "
            "Keep states in memory with `divguard_snapshot_steps`, which hold all of them."
        ) from cause
    if cause is not None:
        raise cause


def _saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return what a checkpoint has to give back: parameters that are trained, and buffers if the model saves any."""
    wanted = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if not is_adapted(model):
        saved = model.state_dict().keys() - set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        wanted |= {name: each for name, each in model.named_buffers() if name in saved}
    return wanted


def _load_as_from_pretrained(model: Any, checkpoint: str, wanted: dict[str, torch.Tensor]) -> list[str]:
    """Read ``checkpoint`` into a second model, copy what is wanted, and return the names that it lacks."""
    kinds = [each.dtype for each in model.state_dict().values() if each.is_floating_point()]
    widest = torch.float32
    if kinds:
        widest = kinds[0]
        for kind in kinds:
            widest = torch.promote_types(widest, kind)
    with torch.random.fork_rng(devices=[]):
        read, report = type(model).from_pretrained(checkpoint, dtype=widest, output_loading_info=True)
    lacking = set(report["missing_keys"])
    names = [*read.named_parameters(remove_duplicate=False), *read.named_buffers(remove_duplicate=False)]
    # Of tied weights one name is enough.
    there = {id(tensor) for name, tensor in names if name not in lacking}
    found = {name: tensor for name, tensor in names if id(tensor) in there}
    with torch.no_grad():
        for name, tensor in wanted.items():
            if name in found:
                tensor.copy_(found[name])
    return [name for name in wanted if name not in found]


@contextlib.contextmanager
def _parameters_kept_in_place(model: Any) -> Iterator[None]:
    """Give parameters back their identity, memory and ``requires_grad``, and adapters their being active."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    memory = {name: each.data for name, each in parameters.items()}
    trained = {name: each.requires_grad for name, each in parameters.items()}
    active = list(model.active_adapters) if is_adapted(model) else []
    try:
        yield
    finally:
        if is_adapted(model) and list(model.active_adapters) != active:
            model.base_model.set_adapter(active)
        now = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, each in parameters.items():
                new = now.get(name)
                if new is not None and new is not each:
                    if new.shape == each.shape:
                        each.copy_(new)
                    owner, _, leaf = name.rpartition(".")
                    model.get_submodule(owner)._parameters[leaf] = each
                elif each.dtype != memory[name].dtype or each.data_ptr() != memory[name].data_ptr():
                    memory[name].copy_(each)
                    each.data = memory[name]
                each.requires_grad_(trained[name])


@contextlib.contextmanager
def weights_kept_on_error(model: Any) -> Iterator[None]:
    """Put trained parameters and buffers back as they were if what is done in here fails."""
    tensors = [each for each in model.parameters() if each.requires_grad] + list(model.buffers())
    copies = [each.detach().to("cpu", copy=True) for each in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for each, kept in zip(tensors, copies, strict=True):
                each.copy_(kept)
        raise
