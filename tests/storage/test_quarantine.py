from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_divguard.storage.checkpoints import (
    best_checkpoints,
    find_checkpoints,
    latest_complete_checkpoint,
    verify_checkpoint,
)
from hf_divguard.storage.names import MANIFEST_NAME, SIDECAR_NAME
from hf_divguard.storage.quarantine import quarantine
from hf_divguard.storage.sidecar import read_sidecar

from .conftest import certify, records_of, small_checkpoint

NOTE = {"reason": "The loss diverged.", "onset_step": 15, "now": 0.0}


@pytest.mark.parametrize(
    "left", ["both", "manifest", "sidecar", "neither", "broken sidecar", "broken manifest"]
)
def test_a_quarantined_checkpoint_is_never_resumed_whichever_of_our_files_it_has(
    left: str, tmp_path: Path
) -> None:
    folder = certify(small_checkpoint(tmp_path / "checkpoint-20"))
    if left in ("manifest", "neither"):
        (folder / SIDECAR_NAME).unlink()
    if left in ("sidecar", "neither"):
        (folder / MANIFEST_NAME).unlink()
    if left.startswith("broken"):
        (folder / (SIDECAR_NAME if left.endswith("sidecar") else MANIFEST_NAME)).write_text("{")
    quarantine(folder, **NOTE)
    verdict = verify_checkpoint(folder)
    assert verdict.status == "quarantined"
    assert not verdict.resumable
    assert "from step 15 on" in verdict.reason
    assert "The loss diverged." in verdict.reason
    assert latest_complete_checkpoint(tmp_path) is None
    assert best_checkpoints(tmp_path) == []


def test_a_quarantined_checkpoint_keeps_its_weights_loadable(run_dir: Path) -> None:
    folder = certify(run_dir / "checkpoint-4")
    quarantine(folder, **NOTE)
    assert verify_checkpoint(folder).loadable


def test_either_file_alone_is_enough_for_a_reader(tmp_path: Path) -> None:
    folder = certify(small_checkpoint(tmp_path / "checkpoint-20"))
    quarantine(folder, **NOTE)
    for name in (MANIFEST_NAME, SIDECAR_NAME):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        assert verify_checkpoint(folder).status == "quarantined"
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("dies_at", [0, 1])
def test_a_quarantine_cut_short_holds_from_the_first_file_on(
    dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = certify(small_checkpoint(tmp_path / "checkpoint-20"))
    real, calls = os.replace, []

    def replace(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) > dies_at:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        quarantine(folder, **NOTE)
    assert verify_checkpoint(folder).status == ("complete" if dies_at == 0 else "quarantined")


def test_a_quarantine_changes_neither_place_in_the_order_nor_time_of_change(tmp_path: Path) -> None:
    for place, step in enumerate((30, 10, 20), start=1):
        certify(
            small_checkpoint(tmp_path / f"checkpoint-{step}"),
            sequence=place,
            records=records_of(30, 10, 20)[:place],
        )
    (tmp_path / "checkpoint-30" / SIDECAR_NAME).unlink()
    (tmp_path / "checkpoint-30" / MANIFEST_NAME).unlink()
    os.utime(tmp_path / "checkpoint-30", (5, 5))
    quarantine(tmp_path / "checkpoint-30", **NOTE)
    assert [info.step for info in find_checkpoints(tmp_path)] == [30, 10, 20]
    assert os.stat(tmp_path / "checkpoint-30").st_mtime == 5


def test_the_rest_of_a_sidecar_stays(tmp_path: Path) -> None:
    folder = certify(small_checkpoint(tmp_path / "checkpoint-20"), callbacks={"D": {"x": 1}}, metric=0.5)
    quarantine(folder, reason="two\nlines", now=0.0)
    sidecar = read_sidecar(folder)
    assert (sidecar.callbacks, sidecar.metric) == ({"D": {"x": 1}}, 0.5)
    assert sidecar.quarantine == {"reason": "two lines", "onset_step": None, "time": "1970-01-01T00:00:00Z"}
