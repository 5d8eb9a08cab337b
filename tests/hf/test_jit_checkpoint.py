"""The host's own save on SIGTERM (``enable_jit_checkpoint``) ends in a checkpoint like any other."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.storage.checkpoints import find_checkpoints, verify_checkpoint
from hf_divguard.storage.manifest import read_manifest
from hf_divguard.storage.names import INCOMPLETE_NAME, SIDECAR_NAME
from hf_divguard.storage.sidecar import read_sidecar
from tests.hf import scenarios
from tests.tiny import names_in

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers.trainer_jit_checkpoint") is None,
    reason="this version of Transformers has no save on SIGTERM",
)

MODES = pytest.mark.parametrize("mode", ["staged", "in_place"])


@MODES
def test_sigterm_ends_in_a_published_checkpoint(
    mode: str, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = run_ranks(
        scenarios.stop_by_sigterm, output_dir=tmp_path / "out", at_step=3, divguard_save_mode=mode
    )[0]
    assert outcome.check()["step"] == 3
    folder = tmp_path / "out" / "checkpoint-3"
    verdict = verify_checkpoint(folder)
    assert verdict.status == "complete"
    assert verdict.resumable
    assert not (folder / INCOMPLETE_NAME).exists()
    assert SIDECAR_NAME in read_manifest(folder).files
    assert read_sidecar(folder).metric is None  # this step was not evaluated
    assert names_in(tmp_path / "out") == ["checkpoint-2", "checkpoint-3"]
    again = run_ranks(scenarios.train, output_dir=tmp_path / "out", resume=True)[0]
    assert again.check()["started"] == 3


def test_staged_the_folder_with_the_hosts_marker_alone_is_gone_while_the_checkpoint_is_written(
    run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = run_ranks(
        scenarios.stop_by_sigterm, output_dir=tmp_path / "out", at_step=3, divguard_save_mode="staged"
    )[0]
    assert outcome.check()["seen"] == ["_divguard_staging", "checkpoint-2"]


@MODES
@pytest.mark.parametrize("limit", [1, 3])
def test_sigterm_right_after_a_save_leaves_that_step_complete(
    limit: int, mode: str, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = run_ranks(
        scenarios.stop_by_sigterm,
        output_dir=tmp_path / "out",
        at_step=4,
        event="on_step_begin",
        divguard_save_mode=mode,
        save_total_limit=limit,
        preserve_best_model=True,
    )[0]
    outcome.check()
    folder = tmp_path / "out" / "checkpoint-4"
    assert verify_checkpoint(folder).resumable
    assert not (folder / INCOMPLETE_NAME).exists()
    assert all(info.verdict.status == "complete" for info in find_checkpoints(tmp_path / "out"))
    again = run_ranks(scenarios.train, output_dir=tmp_path / "out", resume=True, max_steps=6)[0]
    assert again.check()["started"] >= 4


@MODES
def test_sigterm_right_after_a_resume_leaves_the_checkpoint_it_came_from_complete(
    mode: str, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"output_dir": tmp_path / "out", "divguard_save_mode": mode, "save_total_limit": 1}
    run_ranks(scenarios.train, max_steps=4, **options)[0].check()
    stopped = run_ranks(
        scenarios.stop_by_sigterm, at_step=4, event="on_step_begin", resume=True, max_steps=8, **options
    )[0]
    stopped.check()
    assert names_in(tmp_path / "out")[0].startswith("checkpoint-")
    assert all(info.verdict.resumable for info in find_checkpoints(tmp_path / "out"))
