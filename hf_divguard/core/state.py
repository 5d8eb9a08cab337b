"""State of dataclasses as strict JSON values, and back with every type checked."""

from __future__ import annotations

import copy
import inspect
import math
import types
import typing
from collections import deque
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, Union

__all__ = ["StateError", "Stateful", "decode", "encode", "memory"]


class StateError(ValueError):
    """A saved state that does not fit what is to be restored from it."""


def memory(default: Any) -> Any:
    """Declare a field that belongs to the memory of a ``Stateful`` dataclass.

    Args:
        default: The value of a new memory, or what makes it (``list``, a class).
    """
    return (
        field(init=False, default_factory=default)
        if callable(default)
        else field(init=False, default=default)
    )


class Stateful:
    """Base of dataclasses whose memory can be saved.

    Fields that the constructor takes are settings. Fields declared with ``memory`` are the
    memory: ``reset`` clears them, ``state_dict`` returns them by name without leading
    underscores, and ``load_state_dict`` takes them over, all or none.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Largest(Stateful):
        ...     limit: float = 9.0
        ...     _value: float | None = memory(None)
        >>> largest = Largest()
        >>> largest.load_state_dict({"value": 4.0})
        >>> largest, largest.state_dict()
        (Largest(limit=9.0, _value=4.0), {'value': 4.0})
        >>> largest.load_state_dict({"value": "four"})
        Traceback (most recent call last):
            ...
        hf_divguard.core.state.StateError: `value` in the state of Largest must be a finite number or null, got 'four'.
    """

    def reset(self) -> None:
        """Forget everything that was observed."""
        for entry in _memory_of(type(self)):
            factory = entry.default_factory
            setattr(self, entry.name, entry.default if factory is MISSING else factory())

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as strict JSON values, without settings."""
        return {entry.name.lstrip("_"): encode(getattr(self, entry.name)) for entry in _memory_of(type(self))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory that ``state_dict`` returned. Settings stay as constructed.

        Raises:
            StateError: If a part is missing or of another type; nothing is changed then.
        """
        owner, kinds, loaded = type(self).__name__, _types_of(type(self)), {}
        entries = _memory_of(type(self))
        _require_keys(state_dict, [entry.name.lstrip("_") for entry in entries], owner)
        for entry in entries:
            key = entry.name.lstrip("_")
            loaded[entry.name] = decode(
                kinds[entry.name],
                state_dict[key],
                f"`{key}` in the state of {owner}",
                getattr(self, entry.name),
            )
        for name, value in loaded.items():
            setattr(self, name, value)


def encode(value: Any) -> Any:
    """Return ``value`` (numbers, texts, sequences, mappings, dataclasses) as strict JSON values.

    NaN and infinities, which JSON does not have, become ``None``.
    """
    if isinstance(value, Stateful):
        return value.state_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: encode(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, dict):
        return {key: encode(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [encode(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode(kind: Any, value: Any, where: str, like: Any = None) -> Any:
    """Return the JSON value ``value`` as ``kind``.

    Args:
        kind: A type as in an annotation: ``int``, ``float`` (finite), ``str``, ``bool``,
            ``X | None``, ``list[X]``, ``tuple[X, Y]``, ``deque[X]``, ``dict[str, X]``, or a
            dataclass.
        value: What was read from JSON.
        where: What the value is, to begin the message of an error with.
        like: The present value, whose settings a ``Stateful`` keeps.

    Raises:
        StateError: If ``value`` is of another type.

    Example:
        >>> decode(list[tuple[int, float | None]], [[1, 2.5], [2, None]], "`losses`")
        [(1, 2.5), (2, None)]
    """
    words = _in_words(kind)
    if typing.get_origin(kind) in (Union, types.UnionType):
        if value is None:
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is float and _is_number(value):
        return value
    if kind in (int, str, bool) and type(value) is kind:
        return value
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(parts):
        return tuple(decode(part, entry, where) for part, entry in zip(parts, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {str(key): decode(parts[1], entry, where) for key, entry in value.items()}
    container = origin or kind
    if (
        isinstance(container, type)
        and issubclass(container, (list, deque))
        and isinstance(value, (list, tuple))
    ):
        entries = [decode(parts[0] if parts else float, entry, where) for entry in value]
        return deque(entries, like.maxlen) if type(like) is deque else container(entries)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        return _decode_dataclass(kind, value, like)
    raise StateError(f"{where} must be {words}, got {value!r:.200}.")


def _decode_dataclass(kind: Any, value: dict[str, Any], like: Any) -> Any:
    if issubclass(kind, Stateful):
        restored = copy.copy(like) if like is not None else kind()
        restored.load_state_dict(value)
        return restored
    names = [entry.name for entry in fields(kind)]
    _require_keys(value, names, kind.__name__)
    hints = _types_of(kind)
    return kind(**{n: decode(hints[n], value[n], f"`{n}` in the state of {kind.__name__}") for n in names})


def _types_of(kind: Any) -> dict[str, Any]:
    """Return the types of the fields of a dataclass, by name.

    ``typing.get_type_hints`` of Python 3.10 refuses a class with the mark ``_: KW_ONLY``, which is no field.
    """
    names = {entry.name for entry in fields(kind)}
    found: dict[str, Any] = {}
    for each in reversed(kind.__mro__):
        own = {name: note for name, note in inspect.get_annotations(each).items() if name in names}
        found |= typing.get_type_hints(
            type("Fields", (), {"__annotations__": own, "__module__": each.__module__})
        )
    return found


def _require_keys(state: Any, names: list[str], owner: str) -> None:
    if not isinstance(state, dict):
        raise StateError(f"The state of {owner} must be a mapping, got {state!r:.200}.")
    missing = [name for name in names if name not in state]
    if missing:
        raise StateError(
            f"The state of {owner} must hold {missing}, but holds only {sorted(map(str, state))}."
        )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)


_WORDS = {
    float: "a finite number",
    int: "a whole number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}


def _in_words(kind: Any) -> str:
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_in_words, typing.get_args(kind)))
    return _WORDS.get(kind) or ("a list" if "list" in str(kind) or "deque" in str(kind) else str(kind))


def _memory_of(owner: type) -> tuple[Field[Any], ...]:
    return tuple(entry for entry in fields(owner) if not entry.init)
