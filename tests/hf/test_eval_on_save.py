"""With ``eval_on_save`` every checkpoint has metrics of its own step, and no step is evaluated twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback

from hf_divguard import DivGuardTrainer, DualTimeScaleDivergenceDetector, MetricNotFoundError
from tests.conftest import AskAt, MetricByStep, Recorder
from tests.tiny import TokenRows, checkpoint_steps

QUIET = {"logging_strategy": "no"}


class CountingTrainer(DivGuardTrainer):
    """Notes at which steps ``evaluate`` was called, evaluations of single data sets included."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.evaluated = [*getattr(self, "evaluated", []), self.state.global_step]
        return super().evaluate(*args, **kwargs)


@pytest.fixture
def run(make_trainer: Any) -> Callable[..., tuple[Any, Recorder]]:
    """Return ``run(...)``: trains with ``eval_on_save`` and gives the trainer and what was recorded."""

    def run(resume: Any = None, callbacks: Any = (), **options: Any) -> tuple[Any, Recorder]:
        recorder = Recorder()
        options = {"eval_on_save": True, **QUIET, **options}
        trainer = make_trainer(trainer_class=CountingTrainer, callbacks=[*callbacks, recorder], **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, recorder

    return run


def logged_steps(checkpoint: Path, key: str = "eval_loss") -> list[int]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in history if key in entry]


def check_each_checkpoint_has_its_metrics(output_dir: Path, key: str = "eval_loss") -> None:
    assert checkpoint_steps(output_dir)
    for step in checkpoint_steps(output_dir):
        assert logged_steps(output_dir / f"checkpoint-{step}", key).count(step) == 1
        sidecar = json.loads((output_dir / f"checkpoint-{step}" / "divguard_state.json").read_text())
        assert sidecar["metric"] is not None


# ---- which steps


@pytest.mark.parametrize("preserve", [False, True])
def test_save_7_eval_5_of_23_evaluates_and_saves_each_step_once_and_loads_the_best(
    run: Any, tmp_path: Path, preserve: bool
) -> None:
    # The evaluation at 15, which no save meets, is the best of all.
    metric = MetricByStep({5: 0.5, 7: 0.6, 10: 0.5, 14: 0.3, 15: 0.1, 20: 0.9, 21: 0.4, 23: 0.7}, "error")
    trainer, recorder = run(
        callbacks=[metric],
        compute_metrics=metric,
        save_steps=7,
        eval_steps=5,
        eval_strategy="steps",
        max_steps=23,
        load_best_model_at_end=True,
        preserve_best_model=preserve,
        **({"best_model_metric": "error"} if preserve else {}),
        metric_for_best_model="error",
        greater_is_better=False,
    )
    assert trainer.evaluated == [5, 7, 10, 14, 15, 20, 21, 23]
    assert recorder.steps("save") == [7, 14, 21, 23]
    assert trainer.state.best_metric == 0.3
    assert trainer.state.best_global_step == 14
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-14")


@pytest.mark.parametrize("preserve", [False, True])
def test_the_model_that_is_loaded_at_the_end_evaluates_to_the_best_metric(run: Any, preserve: bool) -> None:
    trainer, _ = run(
        save_steps=7,
        eval_steps=5,
        eval_strategy="steps",
        max_steps=23,
        load_best_model_at_end=True,
        preserve_best_model=preserve,
        learning_rate=0.3,
        lr_scheduler_type="constant",
    )
    best = trainer.state.best_metric
    assert math.isfinite(best)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{trainer.state.best_global_step}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)


# 32 rows in batches of 4: an epoch has 8 steps.
PLANS = {
    "saves in steps, evaluations in epochs": (
        {"save_steps": 3, "eval_strategy": "epoch", "max_steps": 17},
        [3, 6, 8, 9, 12, 15, 16, 17],
        [3, 6, 9, 12, 15, 17],
    ),
    "saves in epochs, evaluations in steps": (
        {"save_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 3, "max_steps": 16},
        [3, 6, 8, 9, 12, 15, 16],
        [8, 16],
    ),
    "saves in steps, no evaluations": (
        {"save_steps": 3, "eval_strategy": "no", "max_steps": 8},
        [3, 6, 8],
        [3, 6, 8],
    ),
    "saves in epochs, no evaluations": (
        {"save_strategy": "epoch", "eval_strategy": "no", "num_train_epochs": 2, "max_steps": -1},
        [8, 16],
        [8, 16],
    ),
    "saves and evaluations in epochs": (
        {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1},
        [8, 16],
        [8, 16],
    ),
    "a save and the end of an epoch on one step": (
        {"save_steps": 4, "eval_strategy": "epoch", "max_steps": 16},
        [4, 8, 12, 16],
        [4, 8, 12, 16],
    ),
    "ratios": (
        {"save_steps": 0.25, "eval_strategy": "steps", "eval_steps": 0.3, "max_steps": 20},
        [5, 6, 10, 12, 15, 18, 20],
        [5, 10, 15, 20],
    ),
    "no saves": (
        {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 4, "max_steps": 8},
        [4, 8],
        [],
    ),
    "an evaluation before the first step": (
        {"save_steps": 4, "eval_strategy": "no", "eval_on_start": True, "max_steps": 8},
        [0, 4, 8],
        [4, 8],
    ),
}


@pytest.mark.parametrize(("options", "evaluations", "saves"), PLANS.values(), ids=PLANS)
def test_every_save_is_evaluated_and_no_step_twice(
    run: Any, tmp_path: Path, options: dict[str, Any], evaluations: list[int], saves: list[int]
) -> None:
    trainer, recorder = run(**options)
    assert trainer.evaluated == evaluations
    assert recorder.steps("save") == saves
    if saves:
        check_each_checkpoint_has_its_metrics(tmp_path / "out")
        assert max(saves) == trainer.state.max_steps, "the last checkpoint is the end of training"


def test_with_save_strategy_best_only_new_bests_are_saved_and_each_is_evaluated_once(
    run: Any, tmp_path: Path
) -> None:
    metric = MetricByStep({2: 0.5, 4: 0.7, 6: 0.4, 8: 0.4, 10: math.nan, 12: 0.1}, "error")
    trainer, recorder = run(
        callbacks=[metric],
        compute_metrics=metric,
        save_strategy="best",
        eval_strategy="steps",
        eval_steps=2,
        max_steps=12,
        preserve_best_model=True,
        best_model_metric="error",
    )
    assert trainer.evaluated == [2, 4, 6, 8, 10, 12]
    assert recorder.steps("save") == [2, 6, 12]
    check_each_checkpoint_has_its_metrics(tmp_path / "out", "eval_error")
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-12")


def test_a_dict_of_eval_datasets_is_evaluated_once_in_each_round(run: Any, tmp_path: Path) -> None:
    trainer, recorder = run(
        eval_dataset={"news": TokenRows(4, seed=1), "books": TokenRows(4, seed=2)},
        preserve_best_model=True,
        best_model_metric="books_loss",
        eval_strategy="steps",
        eval_steps=2,
        save_steps=3,
        max_steps=6,
    )
    # Each round calls `evaluate` for the whole and for each of the two sets.
    assert trainer.evaluated == [step for step in (2, 3, 4, 6) for _ in range(3)]
    assert recorder.steps("evaluate") == [step for step in (2, 3, 4, 6) for _ in range(2)]
    for step in (3, 6):
        for key in ("eval_news_loss", "eval_books_loss"):
            assert logged_steps(tmp_path / "out" / f"checkpoint-{step}", key).count(step) == 1
    assert {entry.step for entry in trainer.best_checkpoints(9)} == {3, 6}


# ---- resume


@pytest.mark.parametrize("cut", [3, 6, 8])
@pytest.mark.parametrize("start", [False, True], ids=["", "eval_on_start"])
def test_a_resumed_run_evaluates_no_step_again(run: Any, cut: int, start: bool) -> None:
    options = {
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "max_steps": 11,
        "eval_on_start": start,
    }
    whole = [0] * start + [3, 4, 6, 8, 9, 11]
    first, _ = run(callbacks=[AskAt(save={8}, stop={cut})], **options)
    second, _ = run(resume=True, callbacks=[AskAt(save={8})], **options)
    assert first.evaluated + second.evaluated == whole


def test_resuming_a_finished_run_evaluates_nothing(run: Any) -> None:
    first, _ = run(save_steps=4, num_train_epochs=1, max_steps=-1)
    second, recorder = run(
        resume=True, save_steps=4, num_train_epochs=1, max_steps=-1, load_best_model_at_end=True
    )
    assert first.evaluated == [4, 8]
    assert not hasattr(second, "evaluated")
    assert recorder.steps("save") == []


# ---- order and others' callbacks


def test_log_evaluation_and_save_of_a_step_keep_the_stock_order(run: Any) -> None:
    _, recorder = run(
        logging_strategy="steps",
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=2,
        max_steps=6,
    )
    assert recorder.events == [
        ("evaluate", 2),
        ("save", 2),
        ("log", 3),
        ("evaluate", 3),
        ("evaluate", 4),
        ("save", 4),
        ("log", 6),
        ("evaluate", 6),
        ("save", 6),
    ]


@pytest.mark.parametrize("event", ["on_step_end", "on_log"])
def test_a_save_that_a_callback_asks_for_is_evaluated_too(run: Any, tmp_path: Path, event: str) -> None:
    trainer, recorder = run(
        callbacks=[AskAt(save={3}, when=event)], logging_strategy="steps", save_steps=4, eval_strategy="no"
    )
    assert trainer.evaluated == [3, 4, 8]
    assert recorder.steps("save") == [3, 4, 8]
    check_each_checkpoint_has_its_metrics(tmp_path / "out")


def test_a_save_asked_for_during_an_evaluation_needs_no_other(run: Any, tmp_path: Path) -> None:
    trainer, recorder = run(
        callbacks=[AskAt(save={3}, when="on_evaluate")], save_steps=4, eval_strategy="steps", eval_steps=3
    )
    assert trainer.evaluated == [3, 4, 6, 8]
    assert recorder.steps("save") == [3, 4, 8]
    check_each_checkpoint_has_its_metrics(tmp_path / "out")


def test_a_stop_during_a_log_lets_the_evaluation_and_the_save_of_the_step_take_place(
    run: Any, tmp_path: Path
) -> None:
    detector = DualTimeScaleDivergenceDetector(short_alpha=1.0, threshold=0.5, use_eval_loss=False)

    class Fault(AskAt):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3 and "loss" in logs:
                logs["loss"] += 5.0

    trainer, recorder = run(
        callbacks=[Fault(), detector],
        logging_strategy="steps",
        logging_steps=1,
        save_steps=8,
        eval_strategy="no",
        divguard_compare="off",  # a finding is acted on at once
    )
    assert trainer.state.global_step == 3
    assert trainer.evaluated == [3]
    assert recorder.events[-3:] == [("log", 3), ("evaluate", 3), ("save", 3)]
    check_each_checkpoint_has_its_metrics(tmp_path / "out")


PATIENCE = {
    "an evaluation without a save is the best": ({2: 0.5, 4: 0.6, 6: 0.55}, 6),
    "an evaluation with a save is the best": ({2: 0.5, 4: 0.4, 6: 0.6, 8: 0.7}, 8),
    "it heals in time": ({2: 0.5, 4: 0.6, 6: 0.4, 8: 0.7, 10: 0.3, 12: 0.3, 14: 0.3}, 14),
    "NaN all along": ({2: math.nan, 4: math.nan, 6: math.nan}, 6),
}


@pytest.mark.parametrize(("errors", "stops_at"), PATIENCE.values(), ids=PATIENCE)
@pytest.mark.parametrize("preserve", [False, True])
def test_early_stopping_counts_every_evaluation_saved_or_not(
    run: Any, errors: dict[int, float], stops_at: int, preserve: bool
) -> None:
    metric = MetricByStep(errors, "error")
    trainer, _ = run(
        callbacks=[metric, EarlyStoppingCallback(early_stopping_patience=2)],
        compute_metrics=metric,
        save_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=20,
        load_best_model_at_end=True,
        metric_for_best_model="error",
        greater_is_better=False,
        preserve_best_model=preserve,
        best_model_metric="error",
    )
    assert trainer.state.global_step == stops_at
    saved = {step: errors[step] for step in range(4, stops_at + 1, 4) if math.isfinite(errors[step])}
    if saved:
        assert trainer.state.best_metric == min(saved.values())
        assert trainer.state.best_global_step in saved


def test_early_stopping_keeps_its_memory_over_a_resume(run: Any) -> None:
    errors = {2: 0.5, 4: 0.6, 6: 0.55, 8: 0.58}
    for resume, stop in ((None, {4}), (True, ())):
        metric = MetricByStep(errors, "error")
        trainer, _ = run(
            resume=resume,
            callbacks=[metric, EarlyStoppingCallback(early_stopping_patience=2), AskAt(stop=stop)],
            compute_metrics=metric,
            save_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            max_steps=20,
            load_best_model_at_end=True,
            metric_for_best_model="error",
            greater_is_better=False,
            restore_callback_states_from_checkpoint=True,
        )
    assert trainer.state.global_step == 6


# ---- errors


def test_a_metric_that_no_evaluation_produced_is_an_error_naming_those_there_are(run: Any) -> None:
    with pytest.raises(
        MetricNotFoundError, match=r"no `eval_f1`. It produced \[.*'eval_loss'.*\]. Set"
    ) as error:
        run(preserve_best_model=True, best_model_metric="f1")
    assert "`best_model_metric='f1'`" in str(error.value)


def test_without_it_the_stock_steps_are_evaluated(run: Any) -> None:
    trainer, recorder = run(
        eval_on_save=False, eval_strategy="steps", eval_steps=3, save_steps=2, max_steps=6
    )
    assert trainer.evaluated == [3, 6]
    assert recorder.steps("save") == [2, 4, 6]
