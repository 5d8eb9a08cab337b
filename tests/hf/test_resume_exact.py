"""A run that is cut after any save and resumed ends as one that was never cut: findings, logs and weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_divguard import (
    DivGuardTrainer,
    DivGuardTrainingArguments,
    DualTimeScaleDivergenceDetector,
    DualWindowDivergenceDetector,
    latest_complete_checkpoint,
)
from tests.processes import kill_self
from tests.tiny import TokenRows, base_arguments, same_weights, tiny_model, weights

pytestmark = pytest.mark.filterwarnings("ignore:mtime may not be reliable")

STEPS = 12
FAULT_AT = 7


class Fault(TrainerCallback):
    """Spoils the weights once, so that every loss from then on is higher."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == FAULT_AT:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(-4.0)


def ema(metric_key: str, action: str) -> DualTimeScaleDivergenceDetector:
    return DualTimeScaleDivergenceDetector(0.9, 0.01, threshold=0.1, action=action, metric_key=metric_key)


def window(metric_key: str, action: str) -> DualWindowDivergenceDetector:
    return DualWindowDivergenceDetector(2, 3, threshold=0.1, action=action, metric_key=metric_key)


def make_run(
    folder: Path,
    *detectors: Any,
    trainer_class: Any = DivGuardTrainer,
    arguments_class: Any = DivGuardTrainingArguments,
    **options: Any,
) -> Any:
    options = {
        "max_steps": STEPS,
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 3e-3,
        "seed": 5,
        **options,
    }
    return trainer_class(
        model=tiny_model(dropout=0.1),
        args=arguments_class(**base_arguments(folder, **options)),
        train_dataset=TokenRows(20),  # five steps an epoch: the cuts fall everywhere in one
        eval_dataset=TokenRows(4, seed=1),
        callbacks=[Fault(), *detectors],
    )


def cut_after(step: int, whole: Path, folder: Path) -> None:
    """Leave in ``folder`` what a run killed right after its save of ``step`` would have left."""
    shutil.copytree(whole, folder)
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)


def told(detector: Any) -> list[tuple[int, float, float | None, dict[str, Any]]]:
    return [
        (finding.step, finding.value, finding.limit, dict(finding.evidence)) for finding in detector.findings
    ]


def logs_of(trainer: Any) -> list[dict[str, Any]]:
    return [
        {
            key: value
            for key, value in entry.items()
            if not key.endswith(("runtime", "per_second", "total_flos"))
        }
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]


def check_every_cut(
    tmp_path: Path, make: Any, metric_key: str, cuts: Any, action: str = "warn", **options: Any
) -> Any:
    whole_detector = make(metric_key, action)
    whole = make_run(tmp_path / "whole", whole_detector, **options)
    whole.train()
    assert whole_detector.findings, "the fault is meant to be found"
    end = whole.state.global_step
    for cut in cuts:
        if cut >= end:
            continue
        folder = tmp_path / f"cut-{cut}"
        cut_after(cut, tmp_path / "whole", folder)
        detector = make(metric_key, action)
        resumed = make_run(folder, detector, **options)
        # What was saved while the condition lasted is skipped.
        started = latest_complete_checkpoint(folder)
        assert started is not None
        resumed.train(resume_from_checkpoint=True)
        assert told(detector) == [entry for entry in told(whole_detector) if entry[0] > started.step]
        assert detector.state_dict() == whole_detector.state_dict()
        assert resumed.state.global_step == end
        assert logs_of(resumed) == logs_of(whole)
        assert same_weights(weights(resumed.model), weights(whole.model))
        shutil.rmtree(folder)
    return whole


@pytest.mark.parametrize("make", [ema, window])
@pytest.mark.parametrize("metric_key", ["loss", "eval_loss"])
def test_cut_after_some_saves_it_finds_the_same_at_the_same_steps_with_the_same_values(
    tmp_path: Path, make: Any, metric_key: str
) -> None:
    check_every_cut(tmp_path, make, metric_key, cuts=(3, FAULT_AT, 10))


@pytest.mark.slow
@pytest.mark.parametrize("make", [ema, window])
@pytest.mark.parametrize("metric_key", ["loss", "eval_loss"])
@pytest.mark.parametrize("action", ["warn", "stop", "abort"])
def test_cut_after_any_save_it_ends_as_if_it_had_never_been_cut(
    tmp_path: Path, make: Any, metric_key: str, action: str
) -> None:
    whole = check_every_cut(tmp_path, make, metric_key, cuts=range(1, STEPS), action=action)
    if action != "warn":
        assert FAULT_AT < whole.state.global_step < STEPS


@pytest.mark.parametrize(
    "options",
    [
        {"logging_steps": 3},
        {"logging_strategy": "epoch"},
        {"logging_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=["logs in steps", "logs in epochs", "gradient accumulation"],
)
def test_a_cut_between_two_logs_changes_neither_the_next_log_nor_what_is_found_in_it(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    check_every_cut(tmp_path, ema, "loss", cuts=(2, 4, 8), **options)


@pytest.mark.parametrize("make", [ema, window])
def test_cut_with_the_stock_trainer_it_finds_the_same(tmp_path: Path, make: Any) -> None:
    check_every_cut(
        tmp_path, make, "eval_loss", cuts=(4, 9), trainer_class=Trainer, arguments_class=TrainingArguments
    )


def test_best_checkpoints_and_their_folders_are_those_of_an_uncut_run(tmp_path: Path) -> None:
    options = {"preserve_best_model": True, "preserve_n_best": 2, "save_total_limit": 2, "eval_on_save": True}
    seen = []
    for cut in (None, 6):
        folder = tmp_path / f"cut-{cut}"
        trainer = make_run(folder, **options)
        if cut is not None:
            trainer.add_callback(StopAt(cut))
            trainer.train()
            trainer = make_run(folder, **options)
        trainer.train(resume_from_checkpoint=cut is not None)
        seen.append(
            (
                [(entry.step, entry.metric) for entry in trainer.best_checkpoints()],
                sorted(path.name for path in folder.iterdir()),
                trainer.state.best_global_step,
                trainer.state.best_metric,
            )
        )
    assert seen[0] == seen[1]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


class KillAt(TrainerCallback):
    """Kills its own process right after a save, as a machine that goes away does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            kill_self()


def train_until_killed(rank: int, folder: str, at_step: int) -> None:
    make_run(Path(folder), ema("loss", "warn"), KillAt(at_step), save_steps=2).train()


def test_a_process_killed_after_a_save_resumes_as_if_nothing_had_happened(
    run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    whole_detector, detector = ema("loss", "warn"), ema("loss", "warn")
    whole = make_run(tmp_path / "whole", whole_detector, save_steps=2)
    whole.train()
    (killed,) = run_ranks(train_until_killed, folder=tmp_path / "killed", at_step=6)
    assert killed.error == "it ended with -9", killed.log
    resumed = make_run(tmp_path / "killed", detector, save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert whole_detector.findings
    assert told(detector) == [entry for entry in told(whole_detector) if entry[0] > 6]
    assert logs_of(resumed) == logs_of(whole)
    assert same_weights(weights(resumed.model), weights(whole.model))
