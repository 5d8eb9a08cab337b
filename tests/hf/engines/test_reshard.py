"""A checkpoint of a sharded run, resumed on another number of ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard import find_checkpoints
from tests.hf.engines import resharded
from tests.hf.engines.launch import NEEDS_TRANSFORMERS_5
from tests.hf.engines.test_every_engine import NEEDS_SHARDED_MODELS

STOP = resharded.STOP

Trained = tuple[Path, dict[str, Any]]

SHARDED_MODEL = pytest.param("distributed-config", marks=NEEDS_SHARDED_MODELS)
FSDP = [
    pytest.param(kind, marks=[pytest.mark.slow, NEEDS_TRANSFORMERS_5]) for kind in ("fsdp2", "fsdp2-full")
]


@pytest.fixture(scope="module", params=[SHARDED_MODEL, *FSDP])
def engine(request: pytest.FixtureRequest) -> str:
    """What the runs train under."""
    return str(request.param)


@pytest.fixture(scope="module")
def four_ranks(
    engine: str, run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """The folder of a run of four ranks, and what its first rank saw."""
    folder = tmp_path_factory.mktemp("reshard")
    outcomes = run_ranks(resharded.train, 4, folder=folder, engine=engine, timeout=300)
    return folder, outcomes[0].check()


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_checkpoint_of_four_ranks_goes_on_with_fewer(
    engine: str, ranks: int, four_ranks: Trained, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """The evaluation loss is the same, the optimizer goes on counting, and training lowers the loss."""
    folder, before = four_ranks
    shutil.copytree(folder, tmp_path / "run")
    how = {"engine": engine, "resumes": True, "timeout": 300}
    for outcome in run_ranks(resharded.train, ranks, folder=tmp_path / "run", **how):
        after = outcome.check()
        assert after["evaluated"][1] == pytest.approx(before["evaluated"][-1], abs=1e-5)
        assert after["evaluated"][2] < before["evaluated"][-1]
        assert after["losses"][-1] < before["losses"][-1]
        assert after["step"] == 2 * STOP
        assert set(after["updates"]) == {2 * STOP}


def test_a_checkpoint_of_four_ranks_is_complete(engine: str, four_ranks: Trained) -> None:
    (info,) = find_checkpoints(four_ranks[0] / resharded.OUT)
    assert (info.verdict.status, info.verdict.resumable) == ("complete", True)
    for written in ("divguard_manifest.json", "divguard_state.json"):
        assert (Path(info.path) / written).exists()


def test_a_missing_part_of_the_optimizer_is_named_with_its_rank(
    engine: str, four_ranks: Trained, tmp_path: Path
) -> None:
    if engine == "fsdp2-full":
        pytest.skip("a full state dict has no parts")
    shutil.copytree(four_ranks[0] / resharded.OUT, tmp_path / "out")
    folder = "distributed_optimizer" if engine == "distributed-config" else "optimizer_0"
    (tmp_path / "out" / f"checkpoint-{STOP}" / folder / "__2_0.distcp").unlink()
    newest = find_checkpoints(tmp_path / "out")[-1]
    assert newest.verdict.status == "incomplete"
    assert f"`{folder}/__2_0.distcp`" in newest.verdict.reason
