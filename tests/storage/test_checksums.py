from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import xxhash

from hf_divguard.storage import checksums
from hf_divguard.storage.checksums import ALGORITHM, file_digest, file_digests


@pytest.mark.parametrize(
    ("algorithm", "reference"), [("sha256", hashlib.sha256), (ALGORITHM, xxhash.xxh3_128)]
)
def test_the_checksum_is_that_of_the_complete_file(algorithm: str, reference: object, tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 7)
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file", algorithm) == reference(data).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 64, 65, 128, 200], ids="{} of parts of 64".format)
def test_the_checksum_of_a_large_file_is_that_of_the_checksums_of_its_parts(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checksums._PART_BYTES, ALGORITHM, 64)
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    parts = [xxhash.xxh3_128(data[start : start + 64]) for start in range(0, size, 64)] or [xxhash.xxh3_128()]
    joined = xxhash.xxh3_128(b"".join(part.digest() for part in parts))
    expected = (joined if len(parts) > 1 else parts[0]).hexdigest()
    # The size that is given shares out the work; the checksum is that of the file.
    for given in (0, 64, size):
        if given <= size:
            assert file_digests(tmp_path, {"file": given}) == {"file": expected}


def test_several_files_get_their_own_checksums_and_errors(tmp_path: Path) -> None:
    sizes = {f"file{number}": number * 1000 for number in range(20)}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(name.encode() * size)
    os.mkfifo(tmp_path / "pipe")
    found = file_digests(tmp_path, {**sizes, "missing": 5, "pipe": 0})
    assert {name: found[name] for name in sizes} == {name: file_digest(tmp_path / name) for name in sizes}
    assert isinstance(found["missing"], FileNotFoundError)
    assert isinstance(found["pipe"], ValueError)
