"""What a loss function changes on its trainer, or on modules of the model, while it is only asked for a loss."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset

__all__ = ["SideEffectError", "values_kept"]

_CONTAINERS = (list, dict, set, deque)
_NUMBERS = (int, float)
# Tensors up to so many numbers, and containers up to so many entries, are copied, so that they can be put back.
_MOST_NUMBERS = 1_000_000
_MOST_ENTRIES = 10_000
_DATA = ("train_dataset", "eval_dataset", "data_collator", "processing_class", "args", "state", "control")
# Objects of these are looked after by others, or are not part of a loss.
_KNOWN = ("torch", "transformers", "accelerate", "datasets", "peft", "trl", "hf_divguard")


class SideEffectError(Exception):
    """A loss function changes what cannot be put back."""


@contextlib.contextmanager
def values_kept(trainer: Any) -> Iterator[None]:
    """Put numbers, containers and tensors back that are attributes of a trainer, of its own objects or of modules.

    Raises:
        SideEffectError: If a tensor or a container has changed that is too large for a copy.
    """
    states = [_State(holder) for holder in _holders(trainer)]
    try:
        yield
    finally:
        changed = [name for state in states for name in state.put_back()]
    if changed:
        raise SideEffectError(f"computing a loss changes {', '.join(changed)}, which cannot be put back")


def _holders(trainer: Any) -> Iterable[Any]:
    """Return the trainer, the objects of its own classes that it holds, and the modules of its model."""
    yield trainer
    for name, value in list(vars(trainer).items()):
        is_known = type(value).__module__.partition(".")[0] in (*_KNOWN, "builtins")
        is_other = is_known or name in _DATA or isinstance(value, (torch.nn.Module, Dataset, type))
        if hasattr(value, "__dict__") and not is_other:
            yield value
    model = getattr(trainer, "model", None)
    if isinstance(model, torch.nn.Module):
        yield from model.modules()


class _State:
    """The attributes of one object, as they were; of a module only numbers, the rest is looked after by others."""

    def __init__(self, holder: Any) -> None:
        self._holder = holder
        is_module = isinstance(holder, torch.nn.Module)
        self._kinds: Any = _NUMBERS if is_module else (*_NUMBERS, *_CONTAINERS, torch.Tensor)
        self._before = {name: value for name, value in vars(holder).items() if self._counts(name, value)}
        self._copies = {
            name: _copied(value) if len(value) <= _MOST_ENTRIES else None
            for name, value in self._before.items()
            if isinstance(value, _CONTAINERS)
        }
        self._lengths = {name: len(self._before[name]) for name in self._copies}
        self._tensors = {
            name: (value._version, value.detach().clone() if value.numel() <= _MOST_NUMBERS else None)
            for name, value in self._before.items()
            if isinstance(value, torch.Tensor)
        }

    def _counts(self, name: str, value: Any) -> bool:
        is_own = not isinstance(self._holder, torch.nn.Module) or not name.startswith(("_", "ds_"))
        return is_own and name != "training" and isinstance(value, self._kinds)

    def put_back(self) -> list[str]:
        """Put the attributes back; return the names of those that cannot be."""
        attributes = vars(self._holder)
        for name, value in list(attributes.items()):
            if name not in self._before and self._counts(name, value):
                delattr(self._holder, name)
        lost = [name for name in self._copies if not self._container_is_back(name)]
        lost += [name for name in self._tensors if not self._tensor_is_back(name)]
        for name, before in self._before.items():
            if attributes.get(name) is not before:
                setattr(self._holder, name, before)
        return [f"`{type(self._holder).__name__}.{name}`" for name in lost]

    def _container_is_back(self, name: str) -> bool:
        content, container = self._copies[name], self._before[name]
        if content is None:
            return len(container) == self._lengths[name]
        _fill(container, content)
        return True

    def _tensor_is_back(self, name: str) -> bool:
        (version, values), tensor = self._tensors[name], self._before[name]
        if tensor._version != version and values is not None:
            with torch.no_grad():
                tensor.copy_(values)
        return values is not None or tensor._version == version


def _copied(container: Any) -> Any:
    """Return a copy of a container and of those in it; what else it holds is the same."""
    same = copy.copy(container)
    if isinstance(same, dict):
        for key, value in same.items():
            if isinstance(value, _CONTAINERS):
                same[key] = _copied(value)
    elif isinstance(same, (list, deque)):
        for place, value in enumerate(same):
            if isinstance(value, _CONTAINERS):
                same[place] = _copied(value)
    return same


def _fill(container: Any, content: Any) -> None:
    """Give a container its content of before, if that has changed."""
    if _is_same(container, content):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)


def _is_same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if not isinstance(one, _CONTAINERS):
        return one is other or (isinstance(one, (*_NUMBERS, str)) and one == other)
    if len(one) != len(other) or isinstance(one, set):
        return isinstance(one, set) and one == other
    if isinstance(one, dict):
        return list(one) == list(other) and all(_is_same(one[key], other[key]) for key in one)
    return all(map(_is_same, one, other))
