"""Whether a weight or state file is complete, from its table of contents; nothing is unpickled.

Each check returns nothing for a sound file and raises ``ValueError`` with what is wrong,
``LimitExceeded`` for a file that is too large to be judged, or ``OSError`` for one that cannot be read.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from typing import Any, BinaryIO

from hf_divguard.storage.jsonio import parse_json
from hf_divguard.storage.regular_files import LimitExceeded, open_regular_file

__all__ = ["check_safetensors", "check_zip", "read_host_json"]

# The largest headers seen are below 20 MB. Python needs about two seconds for so many.
_MAX_HEADER_BYTES = 24 << 20
# An entry has 46 bytes and a name: some 100,000 tensors. Python needs about a second for so many.
_MAX_DIRECTORY_BYTES = 8 << 20
_ZIP_LOCAL_HEADER_BYTES = 30
_END_BYTES = 64 << 10
_GLOBAL_STEP = re.compile(rb'"global_step": ?([0-9]{1,18})[,\s}]')


def read_host_json(path: str | os.PathLike[str], *, max_bytes: int) -> Any:
    """Return the value in the JSON file at ``path``, NaN tokens included, as the Trainer writes it.

    Of a file of more than ``max_bytes`` only both ends are looked at: it must begin and end with a
    brace. Its value is an object that holds the ``global_step`` that stands near its beginning, if any.
    """
    with open(open_regular_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            head = file.read(_END_BYTES)
            file.seek(max(0, size - _END_BYTES))
            if not head.lstrip().startswith(b"{") or not file.read(_END_BYTES).rstrip().endswith(b"}"):
                raise ValueError("is not complete JSON (it does not begin and end with a brace)")
            step = _GLOBAL_STEP.search(head)
            return {"global_step": int(step[1])} if step else {}
        data = file.read(max_bytes + 1)
    if not data:
        raise ValueError("is empty")
    try:
        return parse_json(data, what="it", allow_nan=True)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("it ").removesuffix(".")) from None


def check_safetensors(path: str | os.PathLike[str], *, max_bytes: int) -> int:
    """Raise unless the safetensors file at ``path`` is as long as its header says.

    Returns:
        The length of the header; more is not read.
    """
    with open(open_regular_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise ValueError("is empty")
        if size < 8:
            raise ValueError(f"is too short: {size} bytes do not hold a header")
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        if 8 + header_bytes > size:
            raise ValueError(f"is too short: {size} bytes, its header alone needs {8 + header_bytes}")
        if header_bytes > min(max_bytes, _MAX_HEADER_BYTES):
            raise LimitExceeded(f"has a header of {header_bytes} bytes, more than is read")
        try:
            header = parse_json(file.read(header_bytes), what="the header", allow_nan=True)
        except ValueError as error:
            raise ValueError(f"has a damaged header ({error})") from None
    expected = 8 + header_bytes + _end_of_tensors(header)
    if size != expected:
        raise ValueError(
            f"is too {'short' if size < expected else 'long'}: {size} bytes, its header says {expected}"
        )
    return int(header_bytes)


def _end_of_tensors(header: Any) -> int:
    if not isinstance(header, dict):
        raise ValueError("has a header that is no JSON object")
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
            raise ValueError("has a header with a tensor of no place")
        end = max(end, offsets[1])
    return end


def check_zip(path: str | os.PathLike[str], *, read_all: bool = False) -> None:
    """Raise unless the archive that ``torch.save`` wrote to ``path`` is complete.

    Args:
        path: The file.
        read_all: Read every member and compare its checksum. Without it the table of contents,
            which stands at the end, and the places it gives are compared with the length.
    """
    with open(open_regular_file(path), "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError("is empty")
        try:
            with zipfile.ZipFile(_Limited(file)) as archive:
                problem = _zip_problem(archive, read_all)
        except (LimitExceeded, OSError):
            raise
        except (
            zipfile.BadZipFile,
            ValueError,
            EOFError,
            NotImplementedError,
            RuntimeError,
            struct.error,
            OverflowError,
            zlib.error,
        ) as error:
            raise ValueError(f"is not a complete archive ({error})") from None
    if problem is not None:
        raise ValueError(problem)


def _zip_problem(archive: zipfile.ZipFile, read_all: bool) -> str | None:
    members = archive.infolist()
    if not members:
        return "is an archive without members"
    stored = 0
    for member in members:
        end = member.header_offset + _ZIP_LOCAL_HEADER_BYTES + member.compress_size
        if member.header_offset < 0 or end > archive.start_dir:
            return "has a table of contents that points behind its end"
        stored += member.compress_size
        if read_all and member.file_size > member.compress_size:
            # `torch.save` stores without packing, so a member that grows is not its work.
            return "has a packed member, which `torch.save` does not write"
    if read_all and stored > archive.start_dir:
        return "has members that overlap"
    if read_all and (broken := archive.testzip()) is not None:
        return f"has changed bytes in its member {broken[:80]!a}"
    return None


class _Limited:
    """A file of which no single read takes more than a table of contents may have."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        """Return the next ``count`` bytes."""
        longest = _MAX_DIRECTORY_BYTES
        data = b"" if count > longest else self._file.read(count if count >= 0 else longest + 1)
        if max(count, len(data)) > longest:
            raise LimitExceeded(f"has a table of contents of more than {longest} bytes")
        return data
