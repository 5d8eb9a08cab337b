"""Checksums of files, computed in threads."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from hf_divguard.storage.regular_files import open_regular_file

__all__ = ["ALGORITHM", "DIGEST_LENGTHS", "digest_of", "file_digest", "file_digests"]

ALGORITHM = "xxh3_128_64m"
"""What new manifests use: XXH3 of 128 bits. It finds damage, not forgery, and runs at the speed of the memory.

Of a file of more than 64 MiB it is the checksum of the checksums of its parts of 64 MiB, so that
several threads can read one file.
"""

_HASHES: Mapping[str, Any] = {ALGORITHM: xxhash.xxh3_128, "sha256": hashlib.sha256}
DIGEST_LENGTHS = {ALGORITHM: 32, "sha256": 64}
"""How many hexadecimal digits each algorithm gives; the algorithms that can be read."""

_PART_BYTES = {ALGORITHM: 64 << 20}
"""Size of the parts; an algorithm that is not listed takes a file in one."""

_BLOCK_BYTES = 1 << 20
_MOST_THREADS = 8


def digest_of(data: bytes, algorithm: str = ALGORITHM) -> str:
    """Return the checksum of ``data``, at most 64 MiB, in hexadecimal digits.

    Example:
        >>> digest_of(b"", "sha256")[:8]
        'e3b0c442'
    """
    return str(_HASHES[algorithm](data).hexdigest())


def file_digest(path: str | os.PathLike[str], algorithm: str = ALGORITHM) -> str:
    """Return the checksum of the regular file at ``path`` in hexadecimal digits.

    Raises:
        ValueError: If ``path`` is not a regular file.
        OSError: If it cannot be read.
    """
    path = Path(path)
    digest = file_digests(path.parent, {path.name: 0}, algorithm)[path.name]
    if isinstance(digest, Exception):
        raise digest
    return digest


def file_digests(
    folder: str | os.PathLike[str], sizes: Mapping[str, int], algorithm: str = ALGORITHM
) -> dict[str, str | OSError | ValueError]:
    """Return the checksum of each file of ``folder``, or the error that reading it raised.

    Several files, and several parts of one, are read at once: the hash functions release
    Python's global lock.

    Args:
        folder: The folder.
        sizes: The files to read, with their sizes. They say only how the work is shared out.
        algorithm: One of :data:`DIGEST_LENGTHS`.
    """
    part = _PART_BYTES.get(algorithm)
    starts = [
        (name, start)
        for name in sorted(sizes, key=lambda name: -sizes[name])
        for start in (range(0, max(1, sizes[name]), part) if part else (0,))
    ]

    def read(job: tuple[str, int]) -> list[bytes] | OSError | ValueError:
        name, start = job
        is_last = not part or start + part >= sizes[name]
        try:
            return _digests(Path(folder, name), algorithm, start, to_end=is_last)
        except (OSError, ValueError) as error:
            return error

    threads = min(_MOST_THREADS, os.cpu_count() or 1, len(starts))
    if threads <= 1:
        results = list(map(read, starts))
    else:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(read, starts))
    found: dict[str, list[bytes] | OSError | ValueError] = {}
    for (name, _), result in zip(starts, results, strict=True):
        before = found.get(name, [])
        if isinstance(before, list):
            found[name] = before + result if isinstance(result, list) else result
    return {
        name: each if isinstance(each, Exception) else _joined(each, algorithm)
        for name, each in found.items()
    }


def _digests(path: Path, algorithm: str, start: int, *, to_end: bool) -> list[bytes]:
    """Return the checksum of the part of a file that begins at ``start``, and with ``to_end`` of all parts after it."""
    part = _PART_BYTES.get(algorithm, sys.maxsize)
    block = memoryview(bytearray(_BLOCK_BYTES))
    digests: list[bytes] = []
    with open(open_regular_file(path), "rb", buffering=0) as file:
        file.seek(start)
        while True:
            digest, left = _HASHES[algorithm](), part
            while left and (count := file.readinto(block[: min(left, _BLOCK_BYTES)])):
                digest.update(block[:count])
                left -= count
            if left < part or (start == 0 and not digests):
                digests.append(digest.digest())
            if left or not to_end:
                return digests


def _joined(digests: list[bytes], algorithm: str) -> str:
    """Return the checksum of a file from those of its parts."""
    return digests[0].hex() if len(digests) == 1 else digest_of(b"".join(digests), algorithm)
