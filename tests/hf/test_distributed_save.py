"""Checkpoints of several ranks: on one folder, on folders of their own, with an error on one of them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.storage.checkpoints import find_checkpoints, verify_checkpoint
from hf_divguard.storage.manifest import read_manifest
from hf_divguard.storage.names import MANIFEST_NAME
from tests.hf import scenarios
from tests.tiny import checkpoint_steps


def complete_steps(folder: Path) -> list[int]:
    return [info.step for info in find_checkpoints(folder) if info.verdict.status == "complete"]


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith("_divguard") or name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_fifty_saves_with_random_delays_give_fifty_whole_checkpoints(
    ranks: int, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"max_steps": 50, "save_steps": 1, "eval_on_save": False, "divguard_save_mode": "staged"}
    outcomes = run_ranks(
        scenarios.train_with_delays, ranks, output_dir=tmp_path / "out", timeout=300, **options
    )
    for outcome in outcomes:
        assert outcome.check()["step"] == 50
    assert complete_steps(tmp_path / "out") == list(range(1, 51))
    assert leftovers(tmp_path / "out") == []
    for step in range(1, 51):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        manifest = read_manifest(folder)
        present = {path.name for path in folder.iterdir()} - {MANIFEST_NAME}
        assert set(manifest.files) == present
        assert manifest.world_size == ranks
        assert {f"rng_state_{rank}.pth" for rank in range(ranks)} <= present


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_missing_file_of_any_rank_is_named(
    mode: str, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    for outcome in run_ranks(
        scenarios.train, 2, output_dir=tmp_path / "out", max_steps=2, divguard_save_mode=mode
    ):
        assert outcome.check()["modes"] == [mode]
    whole = tmp_path / "out" / "checkpoint-2"
    names = sorted(read_manifest(whole).files)
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json", "model.safetensors"} <= set(names)
    for name in names:
        damaged = Path(shutil.copytree(whole, tmp_path / "copy" / "checkpoint-2"))
        (damaged / name).unlink()
        verdict = verify_checkpoint(damaged)
        assert verdict.status == "incomplete"
        assert f"`{name}`" in verdict.reason
        shutil.rmtree(damaged)


ERRORS = {
    "in sealing on rank 0": (scenarios.fail_to_seal, {"at_save": 2, "on_rank": 0}, "rank 0"),
    "in writing on rank 1": (scenarios.fail_to_write, {"at_call": 2, "on_rank": 1}, "rank 1"),
    "in writing on rank 0": (scenarios.fail_to_write, {"at_call": 2, "on_rank": 0}, "rank 0"),
}


@pytest.mark.parametrize(("scenario", "where", "named"), ERRORS.values(), ids=ERRORS)
def test_an_error_on_one_rank_ends_all_ranks_with_the_same_error(
    scenario: Callable[..., Any],
    where: dict[str, int],
    named: str,
    run_ranks: Callable[..., Any],
    tmp_path: Path,
) -> None:
    outcomes = run_ranks(scenario, 2, output_dir=tmp_path / "out", timeout=60, **where)
    assert len({outcome.error for outcome in outcomes}) == 1
    for outcome in outcomes:
        assert outcome.error is not None
        assert outcome.error.startswith("CheckpointSaveError: ")
        assert f"checkpoint-4 failed on {named}: OSError: [Errno 5] an injected error" in outcome.error
        assert outcome.seconds < 30
    assert complete_steps(tmp_path / "out") == [2]
    assert checkpoint_steps(tmp_path / "out") == {2}
    assert leftovers(tmp_path / "out") == []


def test_after_an_error_all_ranks_go_on_if_asked_to(run_ranks: Callable[..., Any], tmp_path: Path) -> None:
    outcomes = run_ranks(
        scenarios.fail_to_write,
        2,
        output_dir=tmp_path / "out",
        at_call=2,
        on_rank=1,
        divguard_on_save_error="continue",
        preserve_best_model=True,
    )
    first, second = (outcome.check() for outcome in outcomes)
    assert first == second
    assert first["evaluated"] == [2, 6, 8]
    assert complete_steps(tmp_path / "out") == [2, 6, 8]


def test_a_rank_that_dies_leaves_no_checkpoint_that_counts(
    run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    first, second = run_ranks(
        scenarios.die_while_writing, 2, output_dir=tmp_path / "out", at_call=2, on_rank=1, timeout=60
    )
    assert second.error == "it ended with -9"
    assert first.error is not None
    assert first.seconds < 30
    assert complete_steps(tmp_path / "out") == [2]
    for outcome in run_ranks(scenarios.train, 2, output_dir=tmp_path / "out", resume=True):
        assert outcome.check()["started"] == 2
    assert complete_steps(tmp_path / "out") == [2, 4, 6, 8]


@pytest.mark.parametrize("on_rank", [0, 1])
def test_a_nan_metric_on_one_rank_leaves_the_same_folders_for_all(
    on_rank: int, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    outcomes = run_ranks(
        scenarios.rank_with_a_nan,
        2,
        nodes=True,
        output_dir=tmp_path / "out",
        own=True,
        on_rank=on_rank,
        save_on_each_node=True,
        preserve_best_model=True,
        save_total_limit=1,
    )
    first, second = (outcome.check() for outcome in outcomes)
    assert first == second
    assert checkpoint_steps(tmp_path / "out" / "node0") == checkpoint_steps(tmp_path / "out" / "node1")
    assert checkpoint_steps(tmp_path / "out" / "node0") == set(first["evaluated"])


# ---- ranks with folders of their own

EACH_NODE = {"save_on_each_node": True, "repair_each_node": True}


@pytest.fixture
def nodes(run_ranks: Callable[..., Any], tmp_path: Path) -> Path:
    """Two nodes without a shared disk, each with complete checkpoints 6 and 8."""
    outcomes = run_ranks(
        scenarios.train, 2, nodes=True, output_dir=tmp_path, own=True, save_total_limit=2, **EACH_NODE
    )
    for outcome in outcomes:
        outcome.check()
    return tmp_path


def resume(run_ranks: Callable[..., Any], folder: Path) -> list[Any]:
    return run_ranks(
        scenarios.train, 2, nodes=True, output_dir=folder, own=True, resume=True, max_steps=10, **EACH_NODE
    )


def test_each_node_publishes_and_deletes_on_its_own_disk(nodes: Path) -> None:
    for rank in (0, 1):
        assert complete_steps(nodes / f"node{rank}") == [6, 8]
        assert leftovers(nodes / f"node{rank}") == []
        manifest = read_manifest(nodes / f"node{rank}" / "checkpoint-8")
        assert manifest.ranks == (rank,)
        assert f"rng_state_{rank}.pth" in manifest.files
        assert f"rng_state_{1 - rank}.pth" not in manifest.files


def test_nodes_resume_from_the_newest_step_that_all_of_them_have(
    nodes: Path, run_ranks: Callable[..., Any]
) -> None:
    (nodes / "node1" / "checkpoint-8" / "optimizer.pt").unlink()
    first, second = resume(run_ranks, nodes)
    assert first.check()["started"] == second.check()["started"] == 6
    assert first.value["weights"] == second.value["weights"]
    assert "checkpoint-8: on rank 1" in first.log
    assert "`optimizer.pt` is missing" in first.log


def test_nodes_without_a_common_step_refuse_with_the_same_error(
    nodes: Path, run_ranks: Callable[..., Any]
) -> None:
    for rank, step in ((0, 6), (1, 8)):
        (nodes / f"node{rank}" / f"checkpoint-{step}" / "model.safetensors").unlink()
    first, second = resume(run_ranks, nodes)
    assert first.error == second.error
    assert first.error.startswith("NoCompleteCheckpointError: ")
    assert "on rank 1" in first.error


def test_a_checkpoint_that_was_named_and_is_broken_on_one_rank_is_refused_by_all(
    run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    for outcome in run_ranks(scenarios.train, 2, output_dir=tmp_path / "out", max_steps=2):
        outcome.check()
    named = tmp_path / "out" / "checkpoint-2"
    (named / "rng_state_1.pth").unlink()
    first, second = run_ranks(scenarios.train, 2, output_dir=tmp_path / "out", resume=str(named))
    assert first.error == second.error
    assert first.error.startswith("CheckpointError: ")
    assert "`rng_state_1.pth` (random state of rank 1) is missing" in first.error


def test_ranks_with_own_folders_but_no_model_in_each_are_told_so(
    run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"output_dir": tmp_path, "own": True, "nodes": True, "max_steps": 4}
    for outcome in run_ranks(scenarios.train, 2, **options):
        outcome.check()
    assert complete_steps(tmp_path / "node0") == [2, 4]
    assert sorted(read_manifest(tmp_path / "node1" / "checkpoint-4").files) == [
        "divguard_state.json",
        "rng_state_1.pth",
    ]
    first, second = run_ranks(scenarios.train, 2, resume=True, **options)
    assert first.error == second.error
    assert "save_on_each_node=True" in first.error


def test_saving_on_each_node_into_one_shared_folder_gives_whole_checkpoints(
    run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    outcomes = run_ranks(scenarios.train, 2, nodes=True, output_dir=tmp_path / "out", save_on_each_node=True)
    for outcome in outcomes:
        outcome.check()
    assert complete_steps(tmp_path / "out") == [2, 4, 6, 8]
    assert read_manifest(tmp_path / "out" / "checkpoint-8").ranks == (0, 1)


# ---- file systems that cannot do everything


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM], ids=["EXDEV", "EPERM"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_where_folders_cannot_be_renamed_checkpoints_are_written_in_place(
    ranks: int, code: int, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"output_dir": tmp_path / "out", "code": code, "save_total_limit": 2}
    for outcome in run_ranks(scenarios.train_where_renaming_folders_fails, ranks, **options):
        assert outcome.check()["modes"] == ["in_place"]
    assert complete_steps(tmp_path / "out") == [6, 8]
    assert leftovers(tmp_path / "out") == []
    for outcome in run_ranks(
        scenarios.train_where_renaming_folders_fails, ranks, resume=True, max_steps=10, **options
    ):
        assert outcome.check()["started"] == 8


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_folder_that_cannot_be_flushed_does_not_stop_a_save(
    mode: str, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = run_ranks(
        scenarios.train_where_folders_cannot_be_flushed, output_dir=tmp_path / "out", divguard_save_mode=mode
    )
    assert outcome[0].check()["files_flushed"] >= 4 * 9
    assert complete_steps(tmp_path / "out") == [2, 4, 6, 8]


def test_two_ranks_train_to_the_same_weights_with_and_without_a_cut(
    run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    whole = run_ranks(scenarios.train, 2, output_dir=tmp_path / "whole")
    run_ranks(scenarios.die_while_writing, 2, output_dir=tmp_path / "cut", at_call=3, on_rank=0, timeout=60)
    cut = run_ranks(scenarios.train, 2, output_dir=tmp_path / "cut", resume=True)
    assert [outcome.check()["started"] for outcome in cut] == [4, 4]
    assert len({outcome.check()["weights"] for outcome in (*whole, *cut)}) == 1
    states = [
        json.loads((tmp_path / name / "checkpoint-8" / "trainer_state.json").read_text())
        for name in ("whole", "cut")
    ]
    assert states[0]["global_step"] == states[1]["global_step"] == 8
