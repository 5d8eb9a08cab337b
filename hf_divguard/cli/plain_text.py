"""Text as it stands in real files: compressed, with a byte order mark, in UTF-16."""

from __future__ import annotations

import codecs
import io
import zlib

__all__ = ["MAX_BYTES", "plain_text"]

MAX_BYTES = 512 << 20
"""Files that hold more, before or after they are unpacked, are not read."""

_GZIP = b"\x1f\x8b"
_PART = 1 << 24


def plain_text(data: bytes) -> bytes:
    """Return ``data`` unpacked, if gzip has packed it, and as UTF-8 without a byte order mark, if it is text with one.

    Raises:
        ValueError: If it cannot be unpacked or decoded, or is too large.

    Example:
        >>> plain_text("loss".encode("utf-16"))
        b'loss'
    """
    if data.startswith(_GZIP):
        data = _unpacked(data)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return data.decode("utf-16").encode()
        except UnicodeError:
            raise ValueError("it begins like text in UTF-16, but is not") from None
    return data.removeprefix(codecs.BOM_UTF8)


def _unpacked(data: bytes) -> bytes:
    out, rest = io.BytesIO(), data
    try:
        while rest.startswith(_GZIP):  # several packed files may follow each other
            unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
            while not unpacker.eof:
                part = unpacker.decompress(rest, _PART)
                rest = unpacker.unconsumed_tail
                if not part and not rest and not unpacker.eof:
                    raise ValueError("it was packed by gzip and is cut off")
                if out.tell() + len(part) > MAX_BYTES:
                    raise ValueError(
                        f"it must have at most {MAX_BYTES} bytes when it is unpacked, found more"
                    )
                out.write(part)
            rest = unpacker.unused_data
    except zlib.error as error:
        raise ValueError(f"it was packed by gzip and is damaged ({error})") from None
    return out.getvalue()
