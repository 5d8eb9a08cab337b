"""Whether a weight or state file is whole, from its table of contents; nothing is unpickled."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from typing import Any, BinaryIO

from hf_divguard.storage.jsonio import parse_json, read_bytes
from hf_divguard.storage.regular_files import open_regular_file

__all__ = ["json_problem", "safetensors_problem", "zip_problem"]

_MAX_JSON_BYTES = 512 << 20
_MAX_JSON_DEPTH = 200
# The safetensors library itself refuses headers over 100 MB; the largest seen are below 20 MB.
_MAX_HEADER_BYTES = 64 << 20
_MAX_DIRECTORY_BYTES = 256 << 20
_ZIP_LOCAL_HEADER_BYTES = 30


def json_problem(path: str | os.PathLike[str]) -> tuple[Any, str | None]:
    """Parse the JSON file at ``path`` as the Trainer writes it, NaN tokens included.

    Returns:
        The value and no problem, or ``None`` and what is wrong with the file.
    """
    try:
        data = read_bytes(path, max_bytes=_MAX_JSON_BYTES)
        if not data:
            return None, "is empty"
        return parse_json(data, max_depth=_MAX_JSON_DEPTH, what="it", allow_nan=True), None
    except (FileNotFoundError, NotADirectoryError):
        return None, "is missing"
    except (OSError, ValueError) as error:
        return None, f"is not whole JSON ({getattr(error, 'strerror', None) or error})"


def safetensors_problem(path: str | os.PathLike[str]) -> str | None:
    """Return why the safetensors file at ``path`` is not whole, ``None`` if it is as long as its header says.

    Only the header is read.
    """
    try:
        with open(open_regular_file(path), "rb") as file:
            return _safetensors_problem(file, os.fstat(file.fileno()).st_size)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be judged ({getattr(error, 'strerror', None) or error})"


def _safetensors_problem(file: BinaryIO, size: int) -> str | None:
    if size == 0:
        return "is empty"
    if size < 8:
        return f"is too short: {size} bytes do not hold a header"
    (header_bytes,) = struct.unpack("<Q", file.read(8))
    if header_bytes > _MAX_HEADER_BYTES:
        return f"has a header of {header_bytes} bytes, at most {_MAX_HEADER_BYTES} are read"
    if 8 + header_bytes > size:
        return f"is too short: {size} bytes, its header alone needs {8 + header_bytes}"
    header = parse_json(file.read(header_bytes), max_depth=4, what="the header")
    if not isinstance(header, dict):
        return "has a header that is no JSON object"
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if (
            not isinstance(offsets, list)
            or len(offsets) != 2
            or any(type(offset) is not int for offset in offsets)
            or not 0 <= offsets[0] <= offsets[1]
        ):
            return "has a header with a tensor of no place"
        end = max(end, offsets[1])
    expected = 8 + header_bytes + end
    if size != expected:
        return f"is too {'short' if size < expected else 'long'}: {size} bytes, its header says {expected}"
    return None


def zip_problem(path: str | os.PathLike[str], *, read_all: bool = False) -> str | None:
    """Return why the archive that ``torch.save`` wrote to ``path`` is not whole, ``None`` if it is.

    Args:
        path: The file.
        read_all: Read every member and compare its checksum. Without it the central directory,
            which stands at the end, and the places it gives are compared with the length.
    """
    try:
        with open(open_regular_file(path), "rb") as file:
            return _zip_problem(file, os.fstat(file.fileno()).st_size, read_all)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except (
        ValueError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        struct.error,
        OverflowError,
        zlib.error,
    ) as error:
        return f"is not a whole archive ({error})"
    except zipfile.BadZipFile as error:
        return f"is not a whole archive ({error})"


def _zip_problem(file: BinaryIO, size: int, read_all: bool) -> str | None:
    if size == 0:
        return "is empty"
    directory_bytes = _zip_directory_bytes(file, size)
    if directory_bytes is None:
        return f"is not a whole archive: its {size} bytes do not end in a table of contents"
    if directory_bytes > min(size, _MAX_DIRECTORY_BYTES):
        return f"has a table of contents of {directory_bytes} bytes in a file of {size}"
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if not members:
            return "is an archive without members"
        for member in members:
            end = member.header_offset + _ZIP_LOCAL_HEADER_BYTES + member.compress_size
            if member.header_offset < 0 or end > size - directory_bytes:
                return "has a table of contents that points behind its end"
            if read_all and member.file_size > member.compress_size:
                # `torch.save` stores without packing, so a member that grows is not its work.
                return "has a packed member, which `torch.save` does not write"
        if read_all and (broken := archive.testzip()) is not None:
            return f"has changed bytes in its member {broken[:80]!a}"
    return None


def _zip_directory_bytes(file: BinaryIO, size: int) -> int | None:
    """Return the length of the central directory as the end record gives it, ``None`` without one."""
    longest_tail = 22 + 65_535
    file.seek(max(0, size - longest_tail))
    tail = file.read(longest_tail)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        return None
    directory_bytes: int = struct.unpack("<L", tail[at + 12 : at + 16])[0]
    if directory_bytes != 0xFFFFFFFF:
        return directory_bytes
    # ZIP64: the 20 bytes before point to a record that holds the length in 64 bits.
    if at < 20 or tail[at - 20 : at - 16] != b"PK\x06\x07":
        return None
    file.seek(min(size, struct.unpack("<Q", tail[at - 12 : at - 4])[0]))
    record = file.read(56)
    if len(record) < 56 or record[:4] != b"PK\x06\x06":
        return None
    long_directory_bytes: int = struct.unpack("<Q", record[40:48])[0]
    return long_directory_bytes
