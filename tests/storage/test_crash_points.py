"""A short form of ``benchmarks/crash_points.py``, and a twin that shows that it can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_divguard.storage import manifest

from .crash_points import OPERATIONS, Operation, explore


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.name)
def test_no_kill_and_no_single_loss_of_power_costs_a_good_checkpoint(
    operation: Operation, staged: bool, tmp_path: Path
) -> None:
    if not staged and operation.name == "resume after a kill":
        pytest.skip("nothing is staged there")
    killed = explore(tmp_path, operation, staged=staged, flush=False, most_lost=0)
    power = explore(tmp_path, operation, staged=staged, flush=True, most_lost=1)
    stale = explore(tmp_path, operation, staged=staged, flush=False, most_lost=0, stale=True)
    assert killed.wrong + power.wrong + stale.wrong == []
    assert killed.tried > 10
    assert power.tried > killed.tried


def test_a_manifest_that_is_written_before_its_files_are_flushed_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "flush_tree", lambda folder: None)
    table = explore(tmp_path, OPERATIONS[0], staged=False, flush=True, most_lost=1)
    assert any("counts as complete and is not" in wrong for wrong in table.wrong)
