"""The files of ``examples/configs/`` under ``accelerate launch``, and two nodes that share a disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_divguard import find_checkpoints
from tests.hf.engines.launch import NEEDS_TRANSFORMERS_5
from tests.hf.engines.test_elastic import ended, ended_by, without_restarts
from tests.hf.engines.test_every_engine import NEEDS_DEEPSPEED
from tests.hf.engines.zero import CONFIGS

pytestmark = [pytest.mark.slow, NEEDS_TRANSFORMERS_5]


@pytest.mark.parametrize(
    ("file", "engine"),
    [
        ("fsdp2.yaml", "launched-fsdp2"),
        pytest.param("deepspeed_zero2.yaml", "launched-zero2", marks=NEEDS_DEEPSPEED),
    ],
)
def test_a_script_that_names_no_engine_is_rolled_back_under_that_of_the_file(
    file: str, engine: str, tmp_path: Path
) -> None:
    """Two processes, bf16, as the first line of the file says."""
    words = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(CONFIGS / file)]
    script = ["-m", "tests.hf.engines.elastic", str(tmp_path), f"--engine={engine}", "--bf16", "--nan_at=8"]
    first, second = ended_by(tmp_path, [[sys.executable, *words, *script]], DS_ACCELERATOR="cpu")
    assert first["rollbacks"] == second["rollbacks"] == [[8, 6]]
    assert first["step"] == second["step"] == 12
    assert first["losses"] == second["losses"]
    assert first["losses"][-1] < first["losses"][0]
    kept = [(info.step, info.verdict.resumable) for info in find_checkpoints(tmp_path / "out")]
    assert kept[-1] == (12, True)


def test_two_nodes_that_share_a_disk_restart_and_end_as_one_node_does(tmp_path: Path) -> None:
    """Under FSDP2: each rank writes its shards into the one folder."""
    flags = "--engine=fsdp2"
    one_node: list[dict[str, Any]] = ended(tmp_path / "whole", flags)
    restarted = ended(tmp_path / "job", flags, "--kill_at=8", nodes=2)
    # A node whose own ranks did not fail does not always count the restart.
    assert restarted[1]["restarts"] == 1
    assert without_restarts(restarted) == without_restarts(one_node)
    found = find_checkpoints(tmp_path / "job" / "out")
    assert [(info.step, info.verdict.resumable) for info in found] == [(9, True), (12, True)]
    shards = sorted(path.name for path in (Path(found[-1].path) / "pytorch_model_fsdp_0").glob("*.distcp"))
    assert shards == ["__0_0.distcp", "__1_0.distcp"]
    assert json.loads((tmp_path / "job" / "rank1.json").read_text())["step"] == 12
