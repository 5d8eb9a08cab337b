"""FSDP with adapters, half precision, accumulated gradients..., and on another number of ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hf.engines import resharded, runs
from tests.hf.engines.launch import NEEDS_TRANSFORMERS_5

pytestmark = [pytest.mark.slow, NEEDS_TRANSFORMERS_5]

Ranks = list[dict[str, Any]]

FORMS: dict[str, runs.Options] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "activation checkpointing": {"fsdp_config": {"activation_checkpointing": True}},
    "no clipping": {"max_grad_norm": 0.0},
    "adapter": {"adapter": True},
}


@pytest.fixture(scope="module", params=["fsdp2", "fsdp2-full", "fsdp1"])
def forms(
    request: pytest.FixtureRequest, run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Ranks:
    """How a rollback in each form went on each rank."""
    what = {f"from_disk_and_memory/{name}": options for name, options in FORMS.items()}
    if request.param == "fsdp1":
        del what["from_disk_and_memory/adapter"]
    folder = tmp_path_factory.mktemp("forms")
    outcomes = run_ranks(runs.several, 2, folder=folder, engine=request.param, what=what, timeout=500)
    return [outcome.check() for outcome in outcomes]


@pytest.mark.parametrize("form", FORMS)
def test_every_rank_gets_its_part_back_to_the_bit(forms: Ranks, form: str) -> None:
    """From disk and from memory."""
    name = f"from_disk_and_memory/{form}"
    if name not in forms[0]:
        pytest.skip(
            "accelerate leaves the weights of adapters out of the shards of FSDP1: refused at the start"
        )
    for source in ("disk", "memory"):
        assert forms[0][name][source]["events"] == forms[1][name][source]["events"]
        for rank in forms:
            assert rank[name][source]["same"]
            assert all(rank[name][source]["same"])
            assert rank[name][source]["moved"]


def test_fsdp1_with_adapters_is_refused_at_the_start(run_ranks: Callable[..., Any], tmp_path: Path) -> None:
    """With what to do instead."""
    what = {"from_disk_and_memory": {"adapter": True}}
    for outcome in run_ranks(runs.several, 2, folder=tmp_path, engine="fsdp1", what=what):
        assert "does not work with FSDP1 and adapters" in outcome.error
        assert "Set `version` to 2 in `fsdp_config`." in outcome.error


@pytest.fixture(scope="module", params=["fsdp2", "fsdp2-full"])
def four(
    request: pytest.FixtureRequest, run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, float]:
    """A checkpoint of four ranks, and its evaluation loss."""
    folder = tmp_path_factory.mktemp("four")
    outcomes = run_ranks(resharded.train, 4, folder=folder, engine=request.param, timeout=300)
    return request.param, folder, outcomes[0].check()["evaluated"][-1]


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_checkpoint_of_four_ranks_goes_on_with_fewer(
    four: tuple[str, Path, float], ranks: int, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """The evaluation loss is the same, and training lowers it."""
    engine, folder, loss = four
    shutil.copytree(folder, tmp_path / "run")
    how = {"engine": engine, "resumes": True, "alone": ranks == 1}
    for outcome in run_ranks(resharded.train, ranks, folder=tmp_path / "run", timeout=300, **how):
        seen = outcome.check()
        assert seen["evaluated"][1] == pytest.approx(loss, abs=1e-5)
        assert seen["evaluated"][2] < loss
        assert seen["step"] == 2 * resharded.STOP
