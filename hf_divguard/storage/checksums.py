"""Checksums of files, computed in threads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from hf_divguard.storage.regular_files import open_regular_file

__all__ = ["ALGORITHM", "DIGEST_LENGTHS", "digest_of", "file_digest", "file_digests"]

ALGORITHM = "xxh3_128"
"""What new manifests use. It finds damage, not forgery, and runs at the speed of the memory."""

_HASHES: Mapping[str, Any] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
DIGEST_LENGTHS = {"xxh3_128": 32, "sha256": 64}
"""How many hexadecimal digits each algorithm gives; the algorithms that can be read."""

_BLOCK_BYTES = 1 << 20
_MOST_THREADS = 8


def digest_of(data: bytes, algorithm: str = ALGORITHM) -> str:
    """Return the checksum of ``data`` in hexadecimal digits.

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
    digest = _HASHES[algorithm]()
    block = memoryview(bytearray(_BLOCK_BYTES))
    with open(open_regular_file(path), "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return str(digest.hexdigest())


def file_digests(
    folder: str | os.PathLike[str], sizes: Mapping[str, int], algorithm: str = ALGORITHM
) -> dict[str, str | OSError | ValueError]:
    """Return the checksum of each file of ``folder``, or the error that reading it raised.

    Several files are read at once: the hash functions release Python's global lock.

    Args:
        folder: The folder.
        sizes: The files to read, with their sizes. The largest ones are begun first.
        algorithm: One of :data:`DIGEST_LENGTHS`.
    """

    def digest_or_error(name: str) -> str | OSError | ValueError:
        try:
            return file_digest(Path(folder, name), algorithm)
        except (OSError, ValueError) as error:
            return error

    largest_first = sorted(sizes, key=lambda name: -sizes[name])
    threads = min(_MOST_THREADS, os.cpu_count() or 1, len(largest_first))
    if threads <= 1:
        return {name: digest_or_error(name) for name in largest_first}
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(largest_first, pool.map(digest_or_error, largest_first), strict=True))
