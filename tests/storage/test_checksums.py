from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import xxhash

from hf_divguard.storage.checksums import file_digest, file_digests


@pytest.mark.parametrize(
    ("algorithm", "reference"), [("sha256", hashlib.sha256), ("xxh3_128", xxhash.xxh3_128)]
)
def test_the_checksum_is_that_of_the_complete_file(algorithm: str, reference: object, tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 7)
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file", algorithm) == reference(data).hexdigest()


def test_several_files_get_their_own_checksums_and_errors(tmp_path: Path) -> None:
    sizes = {f"file{number}": number * 1000 for number in range(20)}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(name.encode() * size)
    os.mkfifo(tmp_path / "pipe")
    found = file_digests(tmp_path, {**sizes, "missing": 5, "pipe": 0})
    assert {name: found[name] for name in sizes} == {name: file_digest(tmp_path / name) for name in sizes}
    assert isinstance(found["missing"], FileNotFoundError)
    assert isinstance(found["pipe"], ValueError)
