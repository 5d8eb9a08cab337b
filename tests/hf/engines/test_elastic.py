"""Jobs that ``torchrun`` starts again after a kill, on one node and on two."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_divguard import find_checkpoints
from tests.hf.engines.launch import NEEDS_TRANSFORMERS_5
from tests.processes import ROOT, environment, free_port

pytestmark = pytest.mark.slow  # each start of torchrun takes some ten seconds


def ended_by(folder: Path, commands: list[list[str]], **variables: str) -> list[dict[str, Any]]:
    """Run the launcher of each node to its end; return how each rank ended."""
    launchers = [
        subprocess.Popen(
            words,
            cwd=ROOT,
            # With the store of the first start, the ranks of the second find the addresses of the first.
            env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for words in commands
    ]
    try:
        logs = [launcher.communicate(timeout=240)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), "\n".join(logs)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def ended(folder: Path, *flags: str, nodes: int = 1) -> list[dict[str, Any]]:
    """Run a job of two ranks to its end with ``torchrun`` on each node, which starts its ranks again once."""
    where = f"--rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{free_port()} --local-addr=127.0.0.1"
    how = f"--nnodes={nodes} --nproc_per_node={2 // nodes} --max-restarts=1 --monitor-interval=0.2"
    words = ["-m", "torch.distributed.run", *where.split(), *how.split(), "-m", "tests.hf.engines.elastic"]
    folder.mkdir()
    return ended_by(folder, [[sys.executable, *words, str(folder), *flags]] * nodes)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """How the job ends if nothing kills it."""
    return ended(tmp_path_factory.mktemp("elastic") / "whole")


def without_restarts(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all but how often the ranks were started."""
    return [{key: value for key, value in rank.items() if key != "restarts"} for rank in ranks]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_whose_rank_was_killed_restarts_and_ends_as_the_one_that_was_not(
    rank: int, tmp_path: Path, never_killed: list[dict[str, Any]]
) -> None:
    restarted = ended(tmp_path / "job", "--kill_at=8", f"--kill_rank={rank}")
    assert [each["restarts"] for each in restarted] == [1, 1]
    assert [each["restarts"] for each in never_killed] == [0, 0]
    assert without_restarts(restarted) == without_restarts(never_killed)


def test_a_job_killed_before_its_first_checkpoint_starts_from_scratch(
    tmp_path: Path, never_killed: list[dict[str, Any]]
) -> None:
    restarted = ended(tmp_path / "job", "--kill_at=2")
    assert [each["restarts"] for each in restarted] == [1, 1]
    assert without_restarts(restarted) == without_restarts(never_killed)


@NEEDS_TRANSFORMERS_5
def test_a_sharded_job_restarts_and_ends_as_the_one_that_was_not_killed(tmp_path: Path) -> None:
    flags = "--engine=fsdp2"
    never_killed = ended(tmp_path / "whole", flags)
    restarted = ended(tmp_path / "job", flags, "--kill_at=8")
    assert [each["restarts"] for each in restarted] == [1, 1]
    assert without_restarts(restarted) == without_restarts(never_killed)


def test_two_nodes_with_a_disk_each_restart_together_and_end_as_one_node_does(
    tmp_path: Path, never_killed: list[dict[str, Any]]
) -> None:
    restarted = ended(tmp_path / "job", "--kill_at=8", "--own_folders", nodes=2)
    # A node whose own ranks did not fail does not always count the restart.
    assert restarted[1]["restarts"] == 1
    assert without_restarts(restarted) == without_restarts(never_killed)
    for node in range(2):
        found = find_checkpoints(tmp_path / "job" / f"node{node}" / "out")
        kept = [(info.step, info.verdict.status, info.verdict.resumable) for info in found]
        assert kept == [(9, "complete", True), (12, "complete", True)]
