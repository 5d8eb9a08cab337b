"""A run that has finished is finished: however often it is started again, it trains no step and changes nothing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_divguard.storage.outcome_file import outcome_path, read_outcome
from tests.conftest import MetricByStep, Recorder
from tests.hf import scenarios
from tests.processes import fork, kill_self, wait_for
from tests.storage.conftest import tree
from tests.tiny import checkpoint_steps, same_weights, weights

MakeTrainer = Callable[..., Any]

GUARDED = {"eval_on_save": True, "save_steps": 2}


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.count = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1


ENDS = {
    "inside an epoch": {"max_steps": 5},
    "at the end of an epoch": {"max_steps": 8},
    "in the second epoch": {"max_steps": 11},
    "by epochs": {"max_steps": -1, "num_train_epochs": 2},
    "by epochs, saved by epoch": {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"},
    "saved by epoch inside one": {"max_steps": 5, "save_strategy": "epoch", "eval_strategy": "epoch"},
    "with accumulation": {"max_steps": 3, "gradient_accumulation_steps": 3},
    "one checkpoint": {"max_steps": 5, "save_total_limit": 1},
    "one checkpoint and the best": {"max_steps": 5, "save_total_limit": 1, "preserve_best_model": True},
    "an evaluation at the start": {"max_steps": 5, "eval_on_start": True},
    "data not skipped": {"max_steps": 5, "ignore_data_skip": True},
}


@pytest.mark.parametrize("options", ENDS.values(), ids=ENDS)
def test_starting_a_finished_run_again_returns_the_result_of_its_end_and_changes_nothing(
    options: dict[str, Any], make_trainer: MakeTrainer, tmp_path: Path, our_log: pytest.LogCaptureFixture
) -> None:
    first = make_trainer(**{**GUARDED, **options})
    ended = first.train()
    before = tree(tmp_path / "out")
    for _ in range(2):
        steps, recorder = Steps(), Recorder()
        again = make_trainer(callbacks=[steps, recorder], **{**GUARDED, **options})
        result = again.train(resume_from_checkpoint=True)
        assert steps.count == 0
        assert recorder.steps("evaluate") == recorder.steps("save") == []
        assert result.global_step == ended.global_step == again.state.global_step
        assert result.training_loss == ended.training_loss
        assert result.metrics == ended.metrics
        assert same_weights(weights(again.model), weights(first.model))
        changed = tree(tmp_path / "out")
        assert {name for name in changed if changed[name] != before.get(name)} <= {"divguard/lock.json"}
        assert before.keys() == changed.keys()
    assert "This run has finished: step" in our_log.text


def test_with_more_steps_training_goes_on(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(max_steps=5, **GUARDED).train()
    more = make_trainer(max_steps=9, **GUARDED)
    assert more.train(resume_from_checkpoint=True).global_step == 9
    end = read_outcome(tmp_path / "out")
    assert end is not None
    assert (end.status, end.step, end.max_steps) == ("finished", 9, 9)
    assert end.resume_from == str(tmp_path / "out" / "checkpoint-9")


def test_goes_on_as_an_uncut_run_would(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    options = {**GUARDED, "lr_scheduler_type": "constant"}
    uncut = make_trainer(tmp_path / "uncut", max_steps=9, **options)
    uncut.train()
    make_trainer(max_steps=5, **options).train()
    make_trainer(max_steps=5, **options).train(resume_from_checkpoint=True)
    more = make_trainer(max_steps=9, **options)
    more.train(resume_from_checkpoint=True)
    assert same_weights(weights(more.model), weights(uncut.model))


def test_a_finished_run_of_which_the_host_kept_the_best_alone_is_finished(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    metric = MetricByStep({2: 1.0, 4: 0.5, 6: 0.5})
    options = {
        "max_steps": 6,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
        "compute_metrics": metric,
    }
    first = make_trainer(callbacks=[metric], **{**GUARDED, **options})
    ended = first.train()
    assert checkpoint_steps(tmp_path / "out") == {2}, "the best is not the last here"
    steps = Steps()
    again = make_trainer(callbacks=[steps, metric], **{**GUARDED, **options})
    result = again.train(resume_from_checkpoint=True)
    assert steps.count == 0
    assert (result.global_step, result.training_loss) == (6, ended.training_loss)
    assert same_weights(weights(again.model), weights(first.model))
    assert checkpoint_steps(tmp_path / "out") == {2}


def test_a_checkpoint_that_is_named_is_trained_on(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(max_steps=6, **GUARDED).train()
    steps = Steps()
    again = make_trainer(callbacks=[steps], max_steps=6, **GUARDED)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert steps.count == 2


def test_a_run_that_started_from_scratch_in_the_same_folder_is_not_finished(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(max_steps=6, **GUARDED).train()
    steps = Steps()
    make_trainer(callbacks=[steps], max_steps=6, **GUARDED).train()
    assert steps.count == 6


def test_a_finished_run_is_finished_elsewhere_too(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    ended = make_trainer(max_steps=5, **GUARDED).train()
    steps = Steps()
    other = make_trainer(tmp_path / "other", callbacks=[steps], max_steps=5, **GUARDED)
    result = other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert (steps.count, result.training_loss) == (0, ended.training_loss)


def test_without_the_note_of_its_end_a_finished_run_trains_no_step_either(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(max_steps=5, **GUARDED).train()
    outcome_path(tmp_path / "out").write_text('{"version": 1, "status": [')
    steps = Steps()
    result = make_trainer(callbacks=[steps], max_steps=5, **GUARDED).train(resume_from_checkpoint=True)
    assert (steps.count, result.global_step) == (0, 5)


def test_all_ranks_return_the_result_of_the_end(run_ranks: Callable[..., Any], tmp_path: Path) -> None:
    first = [each.check() for each in run_ranks(scenarios.train, 2, output_dir=tmp_path / "out", max_steps=3)]
    before = tree(tmp_path / "out")
    for outcome, rank in zip(
        run_ranks(scenarios.train, 2, output_dir=tmp_path / "out", max_steps=3, resume=True),
        first,
        strict=True,
    ):
        again = outcome.check()
        assert (again["started"], again["weights"]) == (3, rank["weights"])
    after = tree(tmp_path / "out")
    assert {name for name in after if after[name] != before.get(name)} <= {"divguard", "divguard/lock.json"}


# ---- what the note says


def test_a_run_that_goes_on_or_was_killed_has_no_note_of_its_end(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(max_steps=3, **GUARDED).train()

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                kill_self()

    wait_for(fork(lambda: make_trainer(callbacks=[Look()], **GUARDED).train(resume_from_checkpoint=True)))
    assert not outcome_path(tmp_path / "out").exists()


def test_a_run_that_a_callback_ended_says_so_and_can_be_resumed(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    metric = MetricByStep(lambda step: -step)
    trainer = make_trainer(
        callbacks=[metric, EarlyStoppingCallback(early_stopping_patience=1)],
        compute_metrics=metric,
        metric_for_best_model="score",
        greater_is_better=True,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=20,
        **GUARDED,
    )
    trainer.train()
    end = read_outcome(tmp_path / "out")
    assert end is not None
    assert (end.status, end.max_steps) == ("ended_early", 20)
    assert end.step == 4
    assert end.loaded == os.path.basename(trainer.state.best_model_checkpoint)


def test_the_note_is_strict_json_with_the_metrics_of_the_end(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    result = make_trainer(max_steps=3, **GUARDED).train()

    def refuse(token: str) -> None:
        raise AssertionError(token)

    text = outcome_path(tmp_path / "out").read_text()
    assert json.loads(text, parse_constant=refuse)["version"] == 1
    end = read_outcome(tmp_path / "out")
    assert end is not None
    assert end.metrics == result.metrics
    assert end.train_loss == result.training_loss
    assert math.isfinite(end.time)


def test_a_stopped_run_names_what_to_resume_from(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class NaN(TrainerCallback):
        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            if state.global_step == 4:
                next(model.parameters()).data.fill_(math.nan)

    make_trainer(callbacks=[NaN()], divguard_detector="nonfinite", max_steps=8, save_steps=1).train()
    end = read_outcome(tmp_path / "out")
    assert end is not None
    assert end.status == "stopped"
    assert end.reason is not None
    assert end.reason.startswith("stop: ")
    assert end.resume_from is not None
    assert int(end.resume_from.rsplit("-", 1)[1]) <= 4


def test_without_any_option_the_stock_trainer_is_left_alone(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(max_steps=5).train()
    steps = Steps()
    make_trainer(callbacks=[steps], max_steps=5).train(resume_from_checkpoint=True)
    assert steps.count == 1
    assert not (tmp_path / "out" / "divguard").exists()
