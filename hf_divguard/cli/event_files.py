"""Scalars of TensorBoard event files, read without the package tensorboard."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from hf_divguard.cli.exits import CommandError
from hf_divguard.cli.protobuf import message_fields, number_of, text_of
from hf_divguard.storage.regular_files import error_words, read_bytes

__all__ = ["read_event_files"]

_MAX_BYTES = 2 << 30
_LONGEST_RECORD = 256 << 20
_FLOAT, _DOUBLE = 1, 2

# Numbers of the fields in the messages Event, Summary.Value and TensorProto of TensorFlow.
_WALL_TIME, _STEP, _SUMMARY = 1, 2, 5
_TAG, _SIMPLE_VALUE, _TENSOR = 1, 2, 8
_DTYPE, _SHAPE, _CONTENT, _FLOATS, _DOUBLES = 1, 2, 4, 5, 6


def read_event_files(files: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the scalars in ``files`` as rows, a row for all that was written for one step, and notes.

    Raises:
        CommandError: If a file cannot be read, or is no event file.
    """
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for file in files:
        try:
            data = read_bytes(file, max_bytes=_MAX_BYTES)
        except (OSError, ValueError) as error:
            raise CommandError(f"`{file}` cannot be read: {error_words(error)}.") from None
        try:
            for record in _records(data):
                _add(rows, record)
        except EOFError:
            notes.append(f"The last record of `{file}` is cut off and was left out.")
        except (ValueError, struct.error) as error:
            raise CommandError(f"`{file}` cannot be read as an event file: {error}.") from None
    return rows, notes


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in the TFRecord format: length, its checksum, content, its checksum."""
    place = 0
    while place < len(data):
        if place + 12 > len(data):
            if place == 0:
                raise ValueError("it is too short")
            raise EOFError
        (length,) = struct.unpack_from("<Q", data, place)
        if length > _LONGEST_RECORD:
            raise ValueError(f"at byte {place} stands no record")
        if place + 16 + length > len(data):
            raise EOFError
        yield data[place + 12 : place + 12 + length]
        place += 16 + length


def _add(rows: list[dict[str, Any]], record: bytes) -> None:
    step, moment, summary = 0, 0.0, b""
    for number, value in message_fields(record):
        if number == _WALL_TIME:
            moment = number_of(value)
        elif number == _STEP and isinstance(value, int):
            step = value
        elif number == _SUMMARY and isinstance(value, bytes):
            summary = value
    for number, value in message_fields(summary):
        if number != 1 or not isinstance(value, bytes):
            continue
        scalar = _scalar(value)
        if scalar is None:
            continue
        tag, amount = scalar
        if not rows or rows[-1]["step"] != step or tag in rows[-1]:
            rows.append({"step": step, "wall_time": moment})
        rows[-1][tag] = amount


def _scalar(message: bytes) -> tuple[str, float] | None:
    tag, amount = "", None
    for number, value in message_fields(message):
        if number == _TAG:
            tag = text_of(value)
        elif number == _SIMPLE_VALUE:
            amount = number_of(value)
        elif number == _TENSOR and isinstance(value, bytes):
            amount = _tensor(value)
    return None if amount is None or tag in ("", "step", "wall_time") else (tag, amount)


def _tensor(message: bytes) -> float | None:
    """Return the value of a tensor without dimensions; ``None`` for any other."""
    fields = dict(message_fields(message))
    size = {_FLOAT: 4, _DOUBLE: 8}.get(int(fields.get(_DTYPE, 0) or 0))
    content = next((each for key in (_CONTENT, _FLOATS, _DOUBLES) if (each := fields.get(key))), None)
    if fields.get(_SHAPE) or size is None or not isinstance(content, bytes) or len(content) != size:
        return None
    return number_of(content)
