"""Each engine with adapters, half precision, accumulated gradients, recomputed activations, and without clipping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hf.engines import runs
from tests.hf.engines.launch import NEEDS_TRANSFORMERS_5
from tests.hf.engines.test_every_engine import NEEDS_DEEPSPEED, NEEDS_SHARDED_MODELS

pytestmark = [pytest.mark.slow, NEEDS_TRANSFORMERS_5]

Ranks = list[dict[str, Any]]

FORMS: dict[str, runs.Options] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "activation checkpointing": {"gradient_checkpointing": True},
    "no clipping": {"max_grad_norm": 0.0},
    "adapter": {"adapter": True},
}
ENGINES = [
    "fsdp2",
    "fsdp2-full",
    "fsdp1",
    pytest.param("distributed-config", marks=NEEDS_SHARDED_MODELS),
    *(pytest.param(f"zero{stage}", marks=NEEDS_DEEPSPEED) for stage in (1, 2, 3)),
]


def forms_of(engine: str) -> dict[str, runs.Options]:
    """Return the forms in which an engine is run, each with its options."""
    forms = dict(FORMS)
    if engine.startswith("fsdp"):
        forms["activation checkpointing"] = {"fsdp_config": {"activation_checkpointing": True}}
    if engine == "fsdp1":
        del forms["adapter"]
    return forms


@pytest.fixture(scope="module", params=ENGINES)
def forms(
    request: pytest.FixtureRequest, run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Ranks:
    """How a rollback in each form went on each rank."""
    what = {f"from_disk_and_memory/{name}": options for name, options in forms_of(request.param).items()}
    if request.param != "fsdp1":
        what["resume/adapter"] = {"adapter": True}
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


def test_a_resumed_run_of_an_adapter_is_the_one_that_was_not_interrupted(forms: Ranks) -> None:
    """Weights and optimizer of every rank."""
    if "resume/adapter" not in forms[0]:
        pytest.skip("adapters are refused under FSDP1")
    assert all(rank["resume/adapter"]["same"] for rank in forms)


def test_fsdp1_with_adapters_is_refused_at_the_start(run_ranks: Callable[..., Any], tmp_path: Path) -> None:
    """With what to do instead."""
    what = {"from_disk_and_memory": {"adapter": True}}
    for outcome in run_ranks(runs.several, 2, folder=tmp_path, engine="fsdp1", what=what):
        assert "does not work with FSDP1 and adapters" in outcome.error
        assert "Set `version` to 2 in `fsdp_config`." in outcome.error
