"""Which checkpoints of a run count, which are best wherever they stand, and which may go."""

from __future__ import annotations

import logging
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest

from hf_divguard.storage.checkpoints import (
    best_checkpoints,
    find_checkpoints,
    latest_complete_checkpoint,
    verify_checkpoint,
)
from hf_divguard.storage.ledger import CheckpointLedger
from hf_divguard.storage.manifest import build_manifest, write_manifest
from hf_divguard.storage.names import MANIFEST_NAME, SIDECAR_NAME
from hf_divguard.storage.quarantine import clear_suspect, mark_suspect, quarantine
from hf_divguard.storage.sidecar import read_sidecar, write_sidecar

from .conftest import small_checkpoint, tree

KEY = "eval_loss"


def start(run: Path, resumed_from: Path | None = None) -> CheckpointLedger:
    return CheckpointLedger.read(str(run), None if resumed_from is None else str(resumed_from), KEY)


def save(ledger: CheckpointLedger, step: int, metric: float | None) -> Path:
    """Save a checkpoint as a training does: record, host files, sidecar, manifest."""
    folder = small_checkpoint(Path(ledger.run_dir, f"checkpoint-{step}"))
    ledger.add(step, metric)
    sidecar = ledger.sidecar(step, metric_name=KEY, greater_is_better=False)
    write_sidecar(folder, sidecar)
    manifest = build_manifest(
        folder,
        step=step,
        run_id=sidecar.run_id,
        sequence=sidecar.sequence,
        world_size=1,
        metric_name=KEY,
        metric=metric,
        greater_is_better=False,
    )
    write_manifest(folder, manifest)
    return folder


def run_of(run: Path, metrics: dict[int, float | None]) -> CheckpointLedger:
    run.mkdir(parents=True, exist_ok=True)
    ledger = start(run)
    for step, metric in metrics.items():
        save(ledger, step, metric)
    return ledger


def steps(found: list) -> list[int]:
    return [each.step for each in found]


# ---- one ranking


def test_the_ledger_and_the_folder_give_the_same_best_checkpoints(tmp_path: Path) -> None:
    ledger = run_of(tmp_path, {10: 0.3, 20: math.nan, 30: 0.1, 40: None, 50: 0.3})
    again = start(tmp_path, tmp_path / "checkpoint-50")
    for found in (ledger.best(False), again.best(False), best_checkpoints(tmp_path)):
        assert steps(found) == [30, 50, 10, 20]
        assert found[0].path == str(tmp_path / "checkpoint-30")
        assert (found[0].metric, found[0].metric_name, found[0].greater_is_better) == (0.1, KEY, False)
        assert found[0].verdict.status == "complete"
    assert again.run_id == ledger.run_id


def test_another_runs_checkpoints_and_those_of_an_abandoned_branch_are_not_ranked(tmp_path: Path) -> None:
    run_of(tmp_path, {10: 0.3, 20: 0.2, 30: 0.1})
    branch = start(tmp_path, tmp_path / "checkpoint-10")
    assert steps(branch.best(False)) == [10]
    save(branch, 15, 0.5)
    assert steps(branch.best(False)) == [10, 15]
    assert steps(start(tmp_path, tmp_path / "checkpoint-15").best(False)) == [10, 15]
    assert steps(best_checkpoints(tmp_path)) == [10, 15]
    other = start(tmp_path)
    save(other, 12, 0.9)
    assert steps(best_checkpoints(tmp_path)) == [12]
    assert steps(start(tmp_path, tmp_path / "checkpoint-15").best(False)) == [10, 15]


def test_a_step_that_another_run_has_written_over_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    run_of(tmp_path, {10: 0.1, 20: 0.2})
    other = start(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-10")
    save(other, 10, 0.0)
    assert steps(start(tmp_path, tmp_path / "checkpoint-20").best(False)) == [20]


def test_thousands_of_saves_with_branches_keep_the_lineage_and_sidecars_of_one_size(tmp_path: Path) -> None:
    tmp_path.joinpath("run").mkdir()
    ledger = start(tmp_path / "run")
    sizes = {}
    for step in range(1, 1001):
        ledger.add(step, math.sin(step))
        if step in (300, 600):
            ledger.quarantine_after(step - 10)
        if step in (50, 400, 1000):
            (tmp_path / str(step)).mkdir()
            write_sidecar(
                tmp_path / str(step), ledger.sidecar(step, metric_name=KEY, greater_is_better=False)
            )
            sizes[step] = os.stat(tmp_path / str(step) / SIDECAR_NAME).st_size
    assert max(sizes.values()) <= 1.5 * sizes[50]
    sidecar = read_sidecar(tmp_path / "1000")
    assert sidecar.lineage == ((1, 290), (301, 590), (601, 1000))
    assert sidecar.is_partial


def test_what_a_summary_of_all_records_says_is_what_it_says_after_each_save() -> None:
    ledger = CheckpointLedger("run", "id", [], KEY)
    for step in range(1, 200):
        ledger.add(step % 150, None if step % 7 == 0 else math.sin(step))
        fresh = CheckpointLedger("run", "id", list(ledger.records), KEY)
        for greater in (False, True):
            assert ledger.finite_best(greater) == fresh.finite_best(greater)
        last = step % 150
        assert ledger.sidecar(last, metric_name=KEY, greater_is_better=False) == fresh.sidecar(
            last, metric_name=KEY, greater_is_better=False
        )
    assert pickle.loads(pickle.dumps(ledger)) == ledger


def test_folders_of_the_stock_trainer_keep_their_age_beside_ours(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        small_checkpoint(tmp_path / f"checkpoint-{step}")
    ledger = start(tmp_path, tmp_path / "checkpoint-30")
    for step in range(40, 140):
        save(ledger, step, 0.5)
    assert steps(find_checkpoints(tmp_path)) == [10, 20, 30, *range(40, 140)]
    assert steps(ledger.best(False, 1)) == [139]


# ---- a lineage in another folder


@pytest.mark.parametrize("how", ["other folder", "renamed", "copy", "copy of all", "linked"])
def test_the_best_of_the_lineage_stays_best_wherever_it_stands(how: str, tmp_path: Path) -> None:
    first, second = tmp_path / "A", tmp_path / "B"
    run_of(first, {10: 0.1, 20: 0.4})
    second.mkdir()
    source, best = first / "checkpoint-20", first / "checkpoint-10"
    if how == "renamed":
        source = source.rename(first / "best-model")
    elif how == "copy":
        source = Path(shutil.copytree(source, tmp_path / "C" / "checkpoint-20"))
    elif how == "copy of all":
        shutil.rmtree(second)
        source = Path(shutil.copytree(first, second)) / "checkpoint-20"
        best = second / "checkpoint-10"
    elif how == "linked":
        (second / "checkpoint-20").symlink_to(source)
        source = second / "checkpoint-20"
    before = tree(first)
    ledger = start(second, source)
    save(ledger, 30, 0.9)
    for ledger_now in (ledger, start(second, second / "checkpoint-30")):
        assert [each.path for each in ledger_now.best(False, 1)] == [str(best)]
        assert ledger_now.path(10) == str(best)
        assert ledger_now.finite_best(False) == ledger_now.best(False, 1)[0]
        assert not ledger_now.would_be_best(0.2, False)
        assert [each.metric for each in ledger_now.best(False)] == [0.1, 0.4, 0.9]
        for step in (40, 50, 60):
            ledger_now.add(step, 0.95)
        home = {10, 30} if how == "copy of all" else {30}
        assert set(ledger_now.to_delete(1, 1, False)) - {20} <= home | {40, 50}
        assert 20 not in ledger_now.to_delete(1, 1, False) or how == "copy of all"
    assert tree(first) == before


def test_the_memory_of_other_folders_goes_on_from_folder_to_folder(tmp_path: Path) -> None:
    run_of(tmp_path / "A", {10: 0.1, 20: 0.4})
    for name, before, step in (
        ("B", "A/checkpoint-20", 30),
        ("C", "B/checkpoint-30", 40),
        ("D", "C/checkpoint-40", 50),
    ):
        (tmp_path / name).mkdir()
        ledger = start(tmp_path / name, tmp_path / before)
        save(ledger, step, 0.5)
        assert ledger.best(False)[0].path == str(tmp_path / "A" / "checkpoint-10")
    assert [Path(each.path).parent.name for each in ledger.best(False)] == ["A", "A", "D", "C", "B"]


def test_what_was_written_over_or_deleted_elsewhere_is_not_taken_for_the_best(tmp_path: Path) -> None:
    run_of(tmp_path / "A", {10: 0.1, 20: 0.2, 30: 0.4})
    (tmp_path / "B").mkdir()
    save(start(tmp_path / "B", tmp_path / "A" / "checkpoint-30"), 40, 0.5)
    shutil.rmtree(tmp_path / "A" / "checkpoint-20")
    shutil.rmtree(tmp_path / "A" / "checkpoint-10")
    other = start(tmp_path / "A")
    save(other, 10, 0.0)
    again = start(tmp_path / "B", tmp_path / "B" / "checkpoint-40")
    assert steps(again.best(False)) == [30, 40]


def test_a_rollback_forgets_what_stands_elsewhere_and_comes_after(tmp_path: Path) -> None:
    run_of(tmp_path / "A", {10: 0.3, 20: 0.2})
    (tmp_path / "B").mkdir()
    ledger = start(tmp_path / "B", tmp_path / "A" / "checkpoint-20")
    save(ledger, 30, 0.1)
    assert ledger.quarantine_after(10) == [30]
    assert steps(ledger.best(False)) == [10]


# ---- suspects


def test_a_suspect_is_passed_over_until_it_is_cleared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_of(tmp_path, {10: 0.3, 20: 0.1})
    folder = tmp_path / "checkpoint-20"
    before = verify_checkpoint(folder)
    mark_suspect(folder, reason="The loss rises.", onset_step=18)
    verdict = verify_checkpoint(folder)
    assert (verdict.status, verdict.resumable, verdict.loadable) == (
        "suspect",
        before.resumable,
        before.loadable,
    )
    assert "from step 18 on" in verdict.reason
    with caplog.at_level(logging.WARNING):
        latest = latest_complete_checkpoint(tmp_path)
    assert latest is not None
    assert latest.step == 10
    assert "checkpoint-20 is passed over: It is suspect" in caplog.text
    assert steps(best_checkpoints(tmp_path)) == [10]
    ledger = start(tmp_path, folder)
    assert ledger.suspects == {20}
    assert steps(ledger.best(False)) == [10]
    clear_suspect(folder)
    assert verify_checkpoint(folder) == before
    assert steps(best_checkpoints(tmp_path)) == [20, 10]


@pytest.mark.parametrize("left", [MANIFEST_NAME, SIDECAR_NAME])
def test_either_file_alone_makes_it_suspect(left: str, tmp_path: Path) -> None:
    folder = save(run_of(tmp_path, {}), 20, 0.1)
    mark_suspect(folder, reason="The loss rises.")
    (folder / (SIDECAR_NAME if left == MANIFEST_NAME else MANIFEST_NAME)).unlink()
    assert verify_checkpoint(folder).status in ("suspect", "incomplete")
    assert latest_complete_checkpoint(tmp_path) is None


def test_a_sidecar_that_says_suspect_makes_a_manifest_that_says_so(tmp_path: Path) -> None:
    folder = save(run_of(tmp_path, {}), 20, 0.1)
    mark_suspect(folder, reason="The loss rises.")
    write_manifest(folder, build_manifest(folder, step=20, run_id="a", sequence=1, world_size=1))
    assert verify_checkpoint(folder).status == "suspect"


def test_clearing_what_is_not_marked_changes_nothing(tmp_path: Path) -> None:
    folder = save(run_of(tmp_path, {}), 20, 0.1)
    before = tree(tmp_path)
    clear_suspect(folder)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_suspects_never_evict_the_newest_or_the_best_good_one(limit: int, tmp_path: Path) -> None:
    ledger = CheckpointLedger("run", "id", [], KEY)
    on_disk: list[int] = []
    for step in range(10, 110, 10):
        ledger.add(step, 0.1 if step == 20 else 0.5 if step <= 50 else 0.01)
        on_disk.append(step)
        if step > 50:
            ledger.mark_suspect(step)
        for gone in ledger.to_delete(limit, 1, False):
            ledger.forget(gone)
            on_disk.remove(gone)
        as_stock = ledger.to_delete_as_stock(limit, 20)
        assert not {20, min(step, 50)} & set(as_stock)
    assert 20 in on_disk
    assert 50 in on_disk
    assert [step for step in on_disk if step > 50] == list(range(110 - 10 * limit, 110, 10))
    assert steps(ledger.best(False, 1)) == [20]
    good = ledger.last_good(onset_step=56)
    assert good is not None
    assert good.step == 50
    assert sorted(ledger.suspects) == [step for step in on_disk if step > 50]
    ledger.suspects = set()
    assert ledger.best(False, 1)[0].step == 100


def test_a_stronger_mark_wins(tmp_path: Path) -> None:
    folder = save(run_of(tmp_path, {}), 20, 0.1)
    mark_suspect(folder, reason="The loss rises.")
    quarantine(folder, reason="It diverged.")
    clear_suspect(folder)
    assert verify_checkpoint(folder).status == "quarantined"


# ---- retention


def test_a_deletion_that_failed_is_asked_for_again_until_the_step_is_saved_anew(tmp_path: Path) -> None:
    ledger = run_of(tmp_path, {10: 0.3, 20: 0.2, 30: 0.1})
    assert ledger.to_delete(1, 1, False) == [10, 20]
    ledger.forget(10)
    ledger.deletion_failed(10)
    assert ledger.to_delete(1, 1, False) == [20, 10]
    assert ledger.to_delete_as_stock(1, 30) == [20, 10]
    ledger.forget(10)
    assert ledger.to_delete(2, 1, False) == []
    ledger.deletion_failed(10)
    ledger.add(10, 0.0)
    assert 10 not in ledger.to_delete(1, 1, False)


def test_a_linked_checkpoint_is_judged_ranked_and_never_deleted(tmp_path: Path) -> None:
    run_of(tmp_path / "A", {20: 0.9})
    (tmp_path / "B").mkdir()
    (tmp_path / "B" / "checkpoint-20").symlink_to(tmp_path / "A" / "checkpoint-20")
    latest = latest_complete_checkpoint(tmp_path / "B")
    assert latest is not None
    assert latest.path == str(tmp_path / "B" / "checkpoint-20")
    ledger = start(tmp_path / "B", Path(latest.path))
    for step in (30, 40, 50):
        save(ledger, step, 0.1)
    assert ledger.to_delete(1, 1, False) == [30, 40]
    (tmp_path / "A" / "checkpoint-20" / "weights.dat").unlink()
    assert latest_complete_checkpoint(tmp_path / "B").step == 50  # type: ignore[union-attr]
    assert find_checkpoints(tmp_path / "B")[0].verdict.status == "incomplete"


def test_a_ledger_goes_back_to_an_earlier_copy(tmp_path: Path) -> None:
    from dataclasses import replace

    ledger = run_of(tmp_path, {10: 0.3, 20: 0.2})
    before = replace(ledger)
    ledger.add(30, 0.1)
    ledger.mark_suspect(20)
    ledger.quarantine_after(10)
    ledger.rewind_to(before)
    assert steps(ledger.best(False)) == [20, 10]
    assert ledger.add(30, None).sequence == 3
