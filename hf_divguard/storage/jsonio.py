"""Strict JSON files: read with limits, written in one step."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_divguard.storage.names import TEMPORARY_PREFIX
from hf_divguard.storage.regular_files import flush_folder, read_bytes

__all__ = [
    "encode_json",
    "from_strict",
    "parse_json",
    "read_json",
    "to_strict",
    "write_bytes_atomic",
    "write_json_atomic",
]

_FLOAT_KEY = "__float__"
_DICT_KEY = "__dict__"
_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# Python refuses to convert integers of more than 4300 digits; states of random generators stay far below.
_MAX_INTEGER_BITS = 4096
_MAX_VALUE_DEPTH = 50
# The same when it is read, with the levels that hold it. How deep Python itself can go differs between its versions.
_MAX_READ_DEPTH = 2 * _MAX_VALUE_DEPTH
_MANY_BYTES = 1 << 20


def read_json(path: str | os.PathLike[str], *, max_bytes: int) -> dict[str, Any]:
    """Read the JSON object in the regular file at ``path``, refusing what a hostile file could do.

    Args:
        path: The file. A FIFO or a device is refused.
        max_bytes: Largest size that is read.

    Raises:
        ValueError: If the file is not strict JSON with an object at the top, or breaks a limit.
        OSError: If it is missing or cannot be read.
    """
    value = parse_json(read_bytes(path, max_bytes=max_bytes), what=repr(os.fspath(path)))
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(path)!r} must hold a JSON object, found {_json_type(value)}.")
    return value


def parse_json(data: bytes, *, what: str, allow_nan: bool = False) -> Any:
    """Parse ``data`` as JSON with one value at the top.

    Args:
        data: The text, in UTF-8.
        what: What is parsed, for the messages.
        allow_nan: Read as Python writes it: the tokens ``NaN`` and ``Infinity`` are accepted,
            which ``trainer_state.json`` may hold, and a key that is given twice. So is a byte
            order mark, which editors put before the text.

    Raises:
        ValueError: If ``data`` is not that, or is nested too deeply for Python.

    Example:
        >>> parse_json(b'{"step": 1}', what="text")
        {'step': 1}
        >>> parse_json(b"[" * 100_000, what="text")
        Traceback (most recent call last):
        ...
        ValueError: text must not be nested so deeply.
    """
    try:
        text = data.decode("utf-8-sig" if allow_nan else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} must be UTF-8 text, found other bytes at {error.start}.") from None
    collects = gc.isenabled() and len(data) > _MANY_BYTES
    try:
        if collects:
            gc.disable()  # it would look again and again at all that has been parsed, which holds no cycles
        if allow_nan:
            return json.loads(text)
        return _STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{what} must be complete JSON: {error.msg.removesuffix(' at')} at byte {error.pos} of {len(data)}."
        ) from None
    except RecursionError:
        raise ValueError(f"{what} must not be nested so deeply.") from None
    except ValueError as error:
        raise ValueError(f"{what} must be strict JSON: {error}") from None
    finally:
        if collects:
            gc.enable()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object.")
    return result


def _refuse_constant(token: str) -> float:
    raise ValueError(f"{token} is not a JSON number.")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is too large for a float.")
    return value


_ENCODER = json.JSONEncoder(allow_nan=False)
_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float
)


def _json_type(value: object) -> str:
    return {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(
        type(value), "a number"
    )


def to_strict(value: Any) -> Any:
    """Return ``value`` as strict JSON can hold it; ``from_strict`` gives it back.

    Tuples become lists, whatever has an ``item()`` of one number (NumPy scalars, tensors of
    no dimension) becomes that number, and NaN and infinities become small objects.

    Raises:
        TypeError: If something in ``value`` has no such form. The message names where it stands.

    Example:
        >>> to_strict({"best": float("inf"), "window": (1, 2)})
        {'best': {'__float__': 'Infinity'}, 'window': [1, 2]}
        >>> to_strict({"seen": [1, {2}]})
        Traceback (most recent call last):
        ...
        TypeError: `value['seen'][1]` must be a value that JSON can hold, got set.
    """
    return _to_strict(value, "value", 0)


def _to_strict(value: Any, where: str, depth: int) -> Any:
    if depth > _MAX_VALUE_DEPTH:
        where = where if len(where) <= 80 else where[:80] + "..."
        raise TypeError(
            f"`{where}` must be nested at most {_MAX_VALUE_DEPTH} levels deep (or does it hold itself?)."
        )
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        if value.bit_length() > _MAX_INTEGER_BITS:
            raise TypeError(
                f"`{where}` must be an integer of at most {_MAX_INTEGER_BITS} bits, got {value.bit_length()}."
            )
        return int(value)
    if isinstance(value, float):
        return _strict_float(float(value))
    if isinstance(value, Mapping):
        return _strict_mapping(value, where, depth)
    if isinstance(value, list | tuple):
        return [_to_strict(entry, f"{where}[{index}]", depth + 1) for index, entry in enumerate(value)]
    return _to_strict(_single_item(value, where), where, depth + 1)


def _strict_float(value: float) -> Any:
    if math.isfinite(value):
        return value
    return {_FLOAT_KEY: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}


def _strict_mapping(value: Mapping[Any, Any], where: str, depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, entry in value.items():
        if not isinstance(key, str):
            raise TypeError(f"`{where}` must have only strings as keys, got {key!r} ({type(key).__name__}).")
        result[str.__str__(key)] = _to_strict(entry, f"{where}[{key!r}]", depth + 1)
    # A dictionary that looks like one of our own encodings is wrapped, so that it comes back as it was.
    return (
        {_DICT_KEY: result}
        if len(result) == 1 and not result.keys().isdisjoint((_FLOAT_KEY, _DICT_KEY))
        else result
    )


def _single_item(value: Any, where: str) -> Any:
    item = getattr(value, "item", None)
    problem = f"`{where}` must be a value that JSON can hold, got {type(value).__name__}"
    if not callable(item):
        raise TypeError(problem + ".")
    try:
        result = item()
    except Exception as error:
        raise TypeError(f"{problem} that is not a single number ({type(error).__name__}).") from error
    if not isinstance(result, bool | int | float | str):
        raise TypeError(f"{problem} of {type(result).__name__}.")
    return result


def from_strict(value: Any) -> Any:
    """Return what ``to_strict`` was given, with lists where it had tuples.

    Raises:
        ValueError: If an encoded float has an unknown name, or ``value`` is nested too deeply.

    Example:
        >>> from_strict({"best": {"__float__": "-Infinity"}})
        {'best': -inf}
    """
    return _from_strict(value, 0)


def _from_strict(value: Any, depth: int) -> Any:
    if depth > _MAX_READ_DEPTH:
        raise ValueError(f"Values must not be nested more than {_MAX_READ_DEPTH} levels deep.")
    if isinstance(value, list):
        return [_from_strict(entry, depth + 1) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_FLOAT_KEY}:
        name = value[_FLOAT_KEY]
        if not isinstance(name, str) or name not in _FLOATS:
            raise ValueError(f"An encoded float must be one of {sorted(_FLOATS)}, found {str(name)[:80]!r}.")
        return _FLOATS[name]
    if value.keys() == {_DICT_KEY} and isinstance(value[_DICT_KEY], dict):
        value = value[_DICT_KEY]
    return {key: _from_strict(entry, depth + 1) for key, entry in value.items()}


def encode_json(data: Mapping[str, Any], *, max_bytes: int | None = None) -> bytes:
    """Return ``data`` as strict JSON text that ends in a line feed.

    Raises:
        ValueError: If it holds NaN or an infinity, or breaks a limit that its reader has.
        TypeError: If it holds what JSON cannot.
    """
    # One line per key at the top is enough to read it by eye, and each value goes through the
    # encoder written in C, which `indent` would turn off.
    lines = (f" {_ENCODER.encode(str(key))}: {_ENCODER.encode(value)}" for key, value in data.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if max_bytes is not None and len(text) > max_bytes:
        raise ValueError(
            f"The JSON text must have at most {max_bytes} bytes to be read again, got {len(text)}."
        )
    return text.encode("ascii")


def write_json_atomic(path: str | os.PathLike[str], data: Mapping[str, Any], *, flush: bool = False) -> None:
    """Write ``data`` to ``path`` so that a reader finds the old file or the complete new one.

    Args:
        path: The file. Its folder must exist.
        data: What ``to_strict`` returns for a mapping.
        flush: Wait until the file is on the disk.

    Raises:
        ValueError: If ``data`` is not strict JSON.
        OSError: If the file cannot be written. The old one is left as it was.
    """
    write_bytes_atomic(path, encode_json(data), flush=flush)


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes, *, flush: bool = False) -> None:
    """Write ``data`` to ``path`` so that a reader finds the old file or the complete new one.

    The new file has the mode of one created in the usual way, the user's umask applied.

    Raises:
        OSError: If the file cannot be written. The old one is left as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}-{path.name}-{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if flush:
        flush_folder(path.parent)
