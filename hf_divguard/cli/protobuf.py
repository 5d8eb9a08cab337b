"""The wire format of Protocol Buffers: the numbered fields of a message, without its description."""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["message_fields", "number_of", "text_of"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def message_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    r"""Yield number and value of each field: a number for varints, the raw bytes for all other kinds.

    Raises:
        ValueError: If ``data`` is no message.

    Example:
        >>> list(message_fields(b"\x10\x96\x01\x0a\x02hi"))
        [(2, 150), (1, b'hi')]
    """
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        value: int | bytes
        if kind == _VARINT:
            value, place = _varint(data, place)
        else:
            if kind == _BYTES:
                length, place = _varint(data, place)
            elif kind in (_FIXED64, _FIXED32):
                length = 8 if kind == _FIXED64 else 4
            else:
                raise ValueError(f"field {number} is of the kind {kind}, which does not exist")
            value = data[place : place + length]
            if len(value) < length:
                raise ValueError(f"field {number} is cut off")
            place += length
        yield number, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(data) and shift < 64:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ValueError("a number is cut off")


def text_of(value: int | bytes) -> str:
    """Return a field as text; no error for bytes that are none."""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def number_of(value: int | bytes) -> float:
    r"""Return a field as a number, of 4 or 8 bytes or a varint.

    Example:
        >>> number_of(b"\x00\x00\x00\x40"), number_of(7)
        (2.0, 7.0)
    """
    if isinstance(value, int):
        return float(value)
    return float(struct.unpack("<f" if len(value) == 4 else "<d", value)[0])
