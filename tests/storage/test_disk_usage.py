"""What checkpoints take on the disk, counted while they are judged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_divguard.storage.disk_usage import DiskUsage
from hf_divguard.storage.survey import find_checkpoints, find_with_usage, look_at
from tests.storage.conftest import certify, small_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for place, step in enumerate((10, 20, 30), start=1):
        certify(small_checkpoint(tmp_path / f"checkpoint-{step}"), sequence=place)
    return tmp_path


def test_judging_with_and_without_the_sizes_gives_the_same(run: Path) -> None:
    (run / "checkpoint-10" / "weights.dat").write_bytes(b"")
    (run / "checkpoint-20" / "trainer_state.json").unlink()
    found, usage = find_with_usage(run)
    assert found == find_checkpoints(run)
    assert [each.verdict.status for each in found] == ["incomplete", "incomplete", "complete"]
    for each in found:
        files = [path for path in Path(each.path).rglob("*") if path.is_file()]
        assert usage.size_of(each.path) == sum(path.stat().st_size for path in files) > 0


def test_a_file_that_has_changed_since_it_was_looked_at_is_looked_at_again(run: Path) -> None:
    folder = str(run / "checkpoint-10")
    sizes = DiskUsage().look_at(folder)
    size = sizes.pop("weights.dat")
    assert look_at(folder, 10, sizes).verdict.status == "complete"
    assert look_at(folder, 10, {**sizes, "weights.dat": size + 1}).verdict.status == "complete"
    (run / "checkpoint-10" / "weights.dat").write_bytes(b"")
    assert look_at(folder, 10, sizes).verdict.status == "incomplete"


def test_a_linked_checkpoint_is_judged_and_takes_nothing(
    run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    certify(small_checkpoint(other / "checkpoint-40"), sequence=4)
    (run / "checkpoint-40").symlink_to(other / "checkpoint-40")
    os.link(run / "checkpoint-10" / "weights.dat", run / "kept")
    found, usage = find_with_usage(run)
    assert [each.verdict.status for each in found] == ["complete"] * 4
    assert usage.size_of(str(run / "checkpoint-40")) == 0
    size = (run / "kept").stat().st_size
    everything = usage.freed_by(each.path for each in found)
    assert usage.size - everything == size
