"""``watch``: a look at a running job."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_tracker_files import event_file
from tests.processes import environment

RunOf = Callable[[str], Path]


def test_one_look_shows_loss_findings_and_checkpoints(cli: Any, made: Path) -> None:
    out = cli("watch", made / "rolled", "--once").out
    for words in ("finished", "steps 1 to 24", "rollback", "checkpoint-24", "best"):
        assert words in out
    assert "\x1b" not in out
    content = cli("watch", made / "rolled", "--json").json
    assert (content["state"], content["losses"][-1][0], len(content["checkpoints"])) == ("finished", 24, 5)
    assert content["events"][-1]["event"] == "rollback"


def test_a_fault_that_a_replay_finds_is_shown(cli: Any, made: Path) -> None:
    assert "non_finite, found by a replay" in cli("watch", made / "stock_nan", "--once").out


def test_event_files_are_further_than_the_newest_checkpoint(cli: Any, run_of: RunOf) -> None:
    folder = run_of("killed")
    shutil.rmtree(folder / "runs", ignore_errors=True)
    event_file(folder / "runs" / "today", [2.0] * 40)
    assert cli("watch", folder, "--json").json["step"] == 40


def test_a_run_that_logs_nothing_yet(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    assert "nothing is logged yet" in cli("watch", tmp_path, "--once").out


@pytest.mark.parametrize("words", [("--interval", "0"), ("--interval", "x")])
def test_a_wrong_interval_is_a_sentence(cli: Any, made: Path, words: tuple[str, ...]) -> None:
    answer = cli("watch", made / "killed", *words)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)


def test_it_looks_again_until_the_run_ends(run_of: RunOf) -> None:
    pytest.importorskip("rich", reason="watch draws in place with rich")
    folder = run_of("killed")
    newest = max(folder.glob("checkpoint-*"), key=lambda each: int(each.name[11:]))
    (newest / "trainer_state.json").touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_divguard.cli", "watch", str(folder), "--interval", "0.1"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        time.sleep(0.5)
        assert process.poll() is None
        (folder / "divguard").mkdir(exist_ok=True)
        outcome = folder / "divguard" / "outcome.tmp"
        outcome.write_text('{"status": "finished", "step": 24}')
        os.replace(outcome, folder / "divguard" / "outcome.json")
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "finished" in out
