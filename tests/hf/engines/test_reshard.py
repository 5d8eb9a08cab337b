"""A checkpoint of a model that Transformers has sharded, resumed on another number of ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard import find_checkpoints
from tests.hf.engines import runs
from tests.hf.engines.test_every_engine import NEEDS_SHARDED_MODELS

pytestmark = NEEDS_SHARDED_MODELS

Trained = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def four_ranks(run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The folder of a run of four ranks, and what its first rank saw."""
    folder = tmp_path_factory.mktemp("reshard")
    outcomes = run_ranks(runs.go_on, 4, folder=folder, max_steps=8)
    return folder, next(outcome.check() for outcome in outcomes)


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_checkpoint_of_four_ranks_is_resumed_on_fewer(
    ranks: int, four_ranks: Trained, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    folder, before = four_ranks
    shutil.copytree(folder, tmp_path / "run")
    for outcome in run_ranks(runs.go_on, ranks, folder=tmp_path / "run", resumes=True, max_steps=16):
        after = outcome.check()
        assert after["evaluated"][2][0] == after["evaluated"][1][0] == before["evaluated"][1][0] == 8
        assert after["evaluated"][2][1] == pytest.approx(before["evaluated"][1][1], abs=1e-5)
        assert after["updates"] == after["step"] == 16, "the optimizer goes on counting"
        assert after["losses"][-1] < before["losses"][-1]


def test_a_checkpoint_of_a_sharded_model_is_complete_with_its_optimizer(four_ranks: Trained) -> None:
    for info in find_checkpoints(four_ranks[0] / "out"):
        assert (info.verdict.status, info.verdict.resumable) == ("complete", True)
        for manifest in ("divguard_manifest.json", "divguard_state.json"):
            assert (Path(info.path) / manifest).exists()


def test_a_missing_part_of_the_optimizer_is_named_with_its_rank(four_ranks: Trained, tmp_path: Path) -> None:
    shutil.copytree(four_ranks[0] / "out", tmp_path / "out")
    (tmp_path / "out" / "checkpoint-8" / "distributed_optimizer" / "__2_0.distcp").unlink()
    newest = find_checkpoints(tmp_path / "out")[-1]
    assert newest.verdict.status == "incomplete"
    assert "`distributed_optimizer/__2_0.distcp`" in newest.verdict.reason
