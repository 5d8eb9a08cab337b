"""How a process ends after a run that diverged, and what its folder says of that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from hf_divguard import DivGuardTrainingArguments
from hf_divguard.cli.main import main
from hf_divguard.errors import DIVERGED_EXIT_CODE
from hf_divguard.storage.outcome_file import outcome_path, read_outcome
from tests.hf import record_runs

RunRanks = Callable[..., Any]


@pytest.mark.parametrize(
    ("action", "status", "step"),
    [("stop", "stopped", 7), ("abort", "stopped", 7), ("rollback", "gave_up", 8)],
)
def test_a_diverged_run_ends_with_the_code_and_its_folder_says_why(
    run_ranks: RunRanks,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    action: str,
    status: str,
    step: int,
) -> None:
    out = tmp_path / "out"
    outcome = run_ranks(record_runs.diverged, output_dir=out, action=action, code=DIVERGED_EXIT_CODE)[0]
    assert outcome.error == f"SystemExit: {DIVERGED_EXIT_CODE}"
    end = read_outcome(out)
    assert end is not None
    assert end.status == status
    assert end.resume_from == str(out / "checkpoint-4")
    assert end.reason is not None
    assert end.reason.startswith(f"{action}: ")
    content = json.loads(outcome_path(out).read_text())
    assert content.keys() >= {"version", "status", "step", "max_steps", "reason", "resume_from"}
    assert end.reason.partition(": ")[2].partition(".")[0] in outcome.log  # on standard error
    assert main(["status", str(out), "--exit-code"]) == DIVERGED_EXIT_CODE
    assert "checkpoint-4" in capsys.readouterr().out


def test_without_the_option_a_stopped_run_returns_and_failed_rollbacks_raise(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    stopped = run_ranks(record_runs.diverged, output_dir=tmp_path / "stopped", action="stop")[0]
    assert stopped.check()["step"] == 7
    failed = run_ranks(record_runs.diverged, output_dir=tmp_path / "failed", action="rollback")[0]
    assert failed.error.startswith("TrainingDivergedError: Training was ended at step")


def test_all_ranks_end_with_the_code(run_ranks: RunRanks, tmp_path: Path) -> None:
    outcomes = run_ranks(record_runs.diverged, 2, output_dir=tmp_path / "out", action="rollback", code=0)
    assert [outcome.error for outcome in outcomes] == ["SystemExit: 0"] * 2


def test_a_healthy_run_does_not_end_the_process(make_trainer: Any) -> None:
    trainer = make_trainer(divguard_detector="adaptive", divguard_exit_code=79)
    trainer.train()
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("code", [-1, 75, 126, 1.5, True, "79"])
def test_a_code_that_means_something_else_is_refused(tmp_path: Path, code: Any) -> None:
    with pytest.raises(ValueError, match="`divguard_exit_code` must be none or a whole number from 0 to 125"):
        DivGuardTrainingArguments(str(tmp_path), use_cpu=True, divguard_exit_code=code)


def test_it_is_a_flag_and_an_option_of_the_command_line(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--divguard_exit_code", "79"]
    [args] = HfArgumentParser(DivGuardTrainingArguments).parse_args_into_dataclasses(words)
    assert args.divguard_exit_code == 79
    from hf_divguard.cli.run_options import options_from_words

    assert options_from_words(["--divguard_exit_code", "79"]) == {"divguard_exit_code": 79}
    assert options_from_words(["--divguard_exit_code", "none"]) == {"divguard_exit_code": None}
