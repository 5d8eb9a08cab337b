"""A signal before the kill: the step is saved, the process ends with a code of its own, the resumed run is exact."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_divguard import DivGuardTrainingArguments
from hf_divguard.errors import DIVERGED_EXIT_CODE, INTERRUPTED_EXIT_CODE
from hf_divguard.storage.checkpoints import find_checkpoints, verify_checkpoint
from hf_divguard.storage.outcome_file import read_outcome
from tests.conftest import AskAt, MetricByStep, Recorder
from tests.hf import scenarios, signalled
from tests.processes import ROOT, environment, python
from tests.tiny import base_arguments, checkpoint_steps

MakeTrainer = Callable[..., Any]
RunRanks = Callable[..., Any]

NEEDS_JIT = pytest.mark.skipif(
    importlib.util.find_spec("transformers.trainer_jit_checkpoint") is None,
    reason="this version of Transformers has no save on SIGTERM",
)


def test_the_code_is_no_other_code() -> None:
    assert INTERRUPTED_EXIT_CODE == 75
    assert INTERRUPTED_EXIT_CODE not in (0, 1, 2, DIVERGED_EXIT_CODE)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_step_is_saved_and_the_process_ends_with_a_code_of_its_own(
    name: str, run_ranks: RunRanks, tmp_path: Path
) -> None:
    outcome = run_ranks(signalled.train, output_dir=tmp_path / "out", name=name, at_step=3, save_steps=100)[0]
    assert outcome.error == f"SystemExit: {INTERRUPTED_EXIT_CODE}"
    assert verify_checkpoint(tmp_path / "out" / "checkpoint-3").resumable
    assert f"{name} was received, and step 3 was saved to {tmp_path / 'out' / 'checkpoint-3'}" in outcome.log
    end = read_outcome(tmp_path / "out")
    assert end is not None
    assert (end.status, end.step, end.reason) == ("interrupted", 3, name)
    assert end.resume_from == str(tmp_path / "out" / "checkpoint-3")


# An epoch has eight steps.
CUTS = {
    "inside an epoch": (3, {}),
    "at a save": (4, {}),
    "at the end of an epoch": (8, {}),
    "in the second epoch": (11, {}),
    "at the end of an epoch that is logged and saved": (
        8,
        {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"},
    ),
    "with a detector": (5, {"divguard_detector": "adaptive", "divguard_action": "warn"}),
    "between two logs": (5, {"logging_steps": 3}),
    "where the best are saved": (
        5,
        {
            "save_strategy": "best",
            "eval_strategy": "steps",
            "eval_steps": 4,
            "metric_for_best_model": "loss",
        },
    ),
    "in place": (5, {"divguard_save_mode": "in_place"}),
    "with a rollback that may come": (5, {"divguard_detector": "adaptive", "divguard_action": "rollback"}),
}


@pytest.mark.parametrize(("at_step", "options"), CUTS.values(), ids=CUTS)
def test_the_resumed_run_is_that_which_was_not_cut_to_the_bit(
    at_step: int, options: dict[str, Any], run_ranks: RunRanks, tmp_path: Path
) -> None:
    options = {"max_steps": 13, "save_steps": 4, "logging_steps": 1, **options}
    uncut = run_ranks(signalled.train, output_dir=tmp_path / "uncut", **options)[0].check()
    cut = run_ranks(signalled.train, output_dir=tmp_path / "cut", at_step=at_step, **options)[0]
    assert cut.error == f"SystemExit: {INTERRUPTED_EXIT_CODE}"
    resumed = run_ranks(signalled.train, output_dir=tmp_path / "cut", resume=True, **options)[0].check()
    assert resumed["weights"] == uncut["weights"]
    assert resumed["history"] == uncut["history"]


def test_the_save_of_a_signal_is_not_evaluated_and_deletes_no_other(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    recorder = Recorder()
    metric = MetricByStep(lambda step: -step)
    trainer = make_trainer(
        callbacks=[metric, recorder, signalled.Send("SIGUSR1", 5)],
        compute_metrics=metric,
        divguard_save_on_signal="SIGUSR1",
        eval_on_save=True,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        save_total_limit=1,
    )
    with pytest.raises(SystemExit):
        trainer.train()
    assert recorder.steps("evaluate") == [2, 4]
    assert 5 in checkpoint_steps(tmp_path / "out"), "the host would delete it at the end, as 2 is the best"


def test_a_signal_in_the_last_step_lets_the_run_finish(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(callbacks=[signalled.Send("SIGUSR1", 8)], divguard_save_on_signal="sigusr1")
    assert trainer.train().global_step == 8
    end = read_outcome(tmp_path / "out")
    assert end is not None
    assert end.status == "finished"


def test_nothing_else_is_saved_than_what_the_signal_asks_for(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(
        callbacks=[signalled.Send("SIGUSR1", 3)], divguard_save_on_signal="SIGUSR1", save_strategy="no"
    )
    with pytest.raises(SystemExit):
        trainer.train()
    assert checkpoint_steps(tmp_path / "out") == {3}


def test_a_save_that_fails_on_a_signal_ends_the_run_as_asked(
    make_trainer: MakeTrainer, tmp_path: Path, our_log: pytest.LogCaptureFixture
) -> None:
    class Block(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                (tmp_path / "out" / "checkpoint-3").write_text("a file")

    trainer = make_trainer(
        callbacks=[Block(), signalled.Send("SIGUSR1", 3)],
        divguard_save_on_signal="SIGUSR1",
        divguard_on_save_error="continue",
    )
    with pytest.raises(SystemExit):
        trainer.train()
    assert "SIGUSR1 was received, but step 3 could not be saved" in our_log.text
    assert [info.step for info in find_checkpoints(tmp_path / "out")] == [2]


# ---- handlers


@pytest.fixture
def earlier() -> Any:
    """A handler that is there before the training."""

    def handler(signum: int, frame: Any) -> None:
        pass

    before = signal.signal(signal.SIGUSR1, handler)
    yield handler
    signal.signal(signal.SIGUSR1, before)


class Raise(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyError("a bug")


@pytest.mark.parametrize("way", ["finished", "stopped", "error", "refused", "signal"])
def test_the_handler_from_before_is_put_back_on_every_way_out(
    way: str, earlier: Any, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    callbacks = {"error": [Raise()], "stopped": [AskAt(stop=[2])], "signal": [signalled.Send("SIGUSR1", 2)]}
    options = {"save_only_model": True, "divguard_detector": "adaptive", "divguard_action": "rollback"}
    trainer = make_trainer(
        callbacks=callbacks.get(way),
        divguard_save_on_signal="SIGUSR1",
        max_steps=3,
        **(options if way == "refused" else {}),
    )
    if way in ("finished", "stopped"):
        trainer.train()
    else:
        with pytest.raises((KeyError, ValueError, SystemExit)):
            trainer.train()
    assert signal.getsignal(signal.SIGUSR1) is earlier


def test_outside_of_the_main_thread_there_is_a_warning_and_training_goes_on(
    earlier: Any, make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(divguard_save_on_signal="SIGUSR1", max_steps=2)
    thread = threading.Thread(target=trainer.train, name="a-notebook")
    thread.start()
    thread.join()
    assert trainer.state.global_step == 2
    assert "needs training to run in the main thread" in our_log.text


def test_without_the_option_no_handler_is_installed(earlier: Any, make_trainer: MakeTrainer) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(signal.getsignal(signal.SIGUSR1))

    make_trainer(callbacks=[Look()], eval_on_save=True, max_steps=1).train()
    assert seen == [earlier]


@pytest.mark.parametrize("value", ["", "SIGKILL", "TERM", "SIGTERM SIGUSR1", 15, None, "none,SIGTERM"])
def test_what_is_no_list_of_signals_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="`divguard_save_on_signal` must be none, or one or more of SIGTERM, "
    ):
        DivGuardTrainingArguments(**base_arguments(tmp_path, divguard_save_on_signal=value))


# ---- several ranks


@pytest.mark.parametrize("on_rank", [0, 1])
def test_a_signal_on_one_rank_saves_and_ends_all(on_rank: int, run_ranks: RunRanks, tmp_path: Path) -> None:
    options = {"max_steps": 7, "save_steps": 100}
    cut = run_ranks(
        signalled.train, 2, output_dir=tmp_path / "cut", at_step=3, on_rank=on_rank, timeout=60, **options
    )
    assert [outcome.error for outcome in cut] == [f"SystemExit: {INTERRUPTED_EXIT_CODE}"] * 2
    assert checkpoint_steps(tmp_path / "cut") == {3}
    assert verify_checkpoint(tmp_path / "cut" / "checkpoint-3").resumable
    resumed = run_ranks(signalled.train, 2, output_dir=tmp_path / "cut", resume=True, **options)
    uncut = run_ranks(signalled.train, 2, output_dir=tmp_path / "uncut", **options)
    assert [each.check()["weights"] for each in resumed] == [each.check()["weights"] for each in uncut]


def start(*arguments: Any, ranks: int = 1, log: Path) -> subprocess.Popen[bytes]:
    with open(log, "wb") as file:
        return subprocess.Popen(
            python("-m", "tests.hf.signalled", *arguments, ranks=ranks),
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def process_at_step(output_dir: Path, step: int, rank: int = 0) -> int:
    """Wait until a rank has begun a step; return its process id."""
    path = Path(f"{output_dir}-step-{step}-{rank}")
    until = time.monotonic() + 120
    while not path.exists() or not path.read_text():
        assert time.monotonic() < until, "it did not get there in time"
        time.sleep(0.05)
    return int(path.read_text())


@pytest.mark.slow
def test_a_script_that_gets_sigterm_from_outside_ends_with_the_code_and_is_resumed(tmp_path: Path) -> None:
    script = start(tmp_path / "out", "new", 400, log=tmp_path / "log")
    script.send_signal(signal.SIGTERM) if process_at_step(tmp_path / "out", 3) == script.pid else None
    assert script.wait(60) == INTERRUPTED_EXIT_CODE, (tmp_path / "log").read_text()
    [step] = checkpoint_steps(tmp_path / "out")
    assert step >= 4
    again = start(tmp_path / "out", "resume", step + 2, log=tmp_path / "log")
    assert again.wait(60) == 0, (tmp_path / "log").read_text()
    end = read_outcome(tmp_path / "out")
    assert end is not None
    assert (end.status, end.step) == ("finished", step + 2)


@pytest.mark.slow
def test_under_torchrun_a_signal_to_one_worker_ends_all_and_the_note_says_why(tmp_path: Path) -> None:
    launcher = start(tmp_path / "out", "new", 400, ranks=2, log=tmp_path / "log")
    os.kill(process_at_step(tmp_path / "out", 3, rank=1), signal.SIGUSR1)
    assert launcher.wait(90) == 1, "torchrun turns each code into 1"
    log = (tmp_path / "log").read_text()
    assert f"exitcode: {INTERRUPTED_EXIT_CODE}" in log or f"exitcode  : {INTERRUPTED_EXIT_CODE}" in log
    end = read_outcome(tmp_path / "out")
    assert end is not None
    assert (end.status, end.reason) == ("interrupted", "SIGUSR1")
    assert checkpoint_steps(tmp_path / "out") == {end.step}
    assert verify_checkpoint(tmp_path / "out" / f"checkpoint-{end.step}").resumable


# ---- the host's own save on SIGTERM


@NEEDS_JIT
@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end"])
def test_the_hosts_save_on_sigterm_ends_with_the_same_code(
    event: str, run_ranks: RunRanks, tmp_path: Path
) -> None:
    outcome = run_ranks(scenarios.raise_by_sigterm, output_dir=tmp_path / "out", at_step=3, event=event)[0]
    assert outcome.error == f"SystemExit: {INTERRUPTED_EXIT_CODE}"
    assert "SIGTERM was received, and step 3 was saved to" in outcome.log
    assert verify_checkpoint(tmp_path / "out" / "checkpoint-3").resumable
    end = read_outcome(tmp_path / "out")
    assert end is not None
    assert end.status == "interrupted"


@NEEDS_JIT
def test_without_any_option_of_ours_the_hosts_save_on_sigterm_is_left_alone(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    options = {"eval_on_save": False, "divguard_save_mode": "auto"}
    outcome = run_ranks(scenarios.raise_by_sigterm, output_dir=tmp_path / "out", at_step=3, **options)[0]
    assert outcome.check()["step"] >= 3


@NEEDS_JIT
def test_two_options_that_save_on_sigterm_are_refused(tmp_path: Path) -> None:
    options = {"divguard_save_on_signal": "SIGTERM", "enable_jit_checkpoint": True}
    with pytest.raises(ValueError, match="both save on SIGTERM"):
        DivGuardTrainingArguments(**base_arguments(tmp_path, **options))
