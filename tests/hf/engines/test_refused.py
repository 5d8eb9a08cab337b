"""Ways of distributing a model that no state can be put back under: refused by their names, with a safe advice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_divguard.hf.engines import engine_of, supported
from hf_divguard.hf.restore import refuse_unsupported
from tests.hf.engines import runs
from tests.hf.engines.test_every_engine import NEEDS_DEEPSPEED, NEEDS_SHARDED_MODELS
from tests.hf.fake_host import FakeHost


def host_of(tmp_path: Path, *, loaded_in_parts: bool = False, kind: str = "NO", **sizes: int) -> FakeHost:
    """Return a host whose trainer is distributed as accelerate says."""
    host = FakeHost(tmp_path)
    config: Any = SimpleNamespace(**sizes)
    host.trainer = SimpleNamespace(
        is_distributed_loading_by_transformers=loaded_in_parts,
        accelerator=SimpleNamespace(parallelism_config=config),
    )
    host.distributed_type = kind
    return host


AUTO = "start the script again with resume_from_checkpoint='auto': it passes over checkpoints"
NEW = "start a new one from the weights of the checkpoint that the last line of the stopped run names"


@pytest.mark.parametrize(
    ("how", "name", "advice"),
    [
        ({"tp_size": 2}, "tensor parallelism (`tp_size=2`)", AUTO),
        ({"cp_size": 4}, "context parallelism (`cp_size=4`)", AUTO),
        ({"sp_size": 2}, "sequence parallelism (`sp_size=2`)", AUTO),
        ({"tp_size": 2, "loaded_in_parts": True}, "tensor parallelism (`tp_size=2`)", NEW),
        ({"sp_size": 2, "kind": "DEEPSPEED"}, "sequence parallelism (`sp_size=2`)", AUTO),
        ({"kind": "MEGATRON_LM"}, "Megatron-LM, which shards weights and optimizer", AUTO),
        ({"kind": "XLA"}, "XLA, where weights and optimizer live on devices of its own", AUTO),
        ({"kind": "ANOTHER"}, "the distributed type ANOTHER", AUTO),
    ],
    ids=lambda value: str(value)[:40],
)
def test_it_is_refused_by_its_name_with_an_advice(
    tmp_path: Path, how: dict[str, Any], name: str, advice: str
) -> None:
    """The advice never leads to a checkpoint that was saved under the fault."""
    host = host_of(tmp_path, **how)
    with pytest.raises(ValueError, match="`rollback` does not work with") as caught:
        refuse_unsupported(host, SimpleNamespace(divguard_snapshot_steps=0))
    assert name in str(caught.value)
    assert advice in str(caught.value)
    assert f"Supported are {supported()}." in str(caught.value)
    assert engine_of(host).why_not_compared()
    assert engine_of(host).why_nothing_skipped()


def test_sizes_of_one_are_no_parallelism(tmp_path: Path) -> None:
    """accelerate names all of them."""
    host = host_of(tmp_path, tp_size=1, cp_size=1, sp_size=1, kind="MULTI_CPU")
    assert engine_of(host).unsupported() is None


@NEEDS_SHARDED_MODELS
@pytest.mark.parametrize(
    "engine", ["fsdp2", pytest.param("zero2", marks=[NEEDS_DEEPSPEED, pytest.mark.slow])]
)
def test_a_trainer_that_divides_sequences_is_refused_before_its_first_step(
    engine: str, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """Under FSDP2 and DeepSpeed, which work without that; every rank gets the same error."""
    outcomes = run_ranks(runs.divided, 2, folder=tmp_path, engine=engine)
    first, second = (outcome.check() for outcome in outcomes)
    assert first == second
    name = "context parallelism (`cp_size=2`)" if engine == "fsdp2" else "sequence parallelism (`sp_size=2`)"
    assert f"`rollback` does not work with {name}" in first["error"]
    assert AUTO in first["error"]
    assert first["step"] == 0
