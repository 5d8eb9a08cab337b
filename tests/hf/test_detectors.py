"""The two detectors as plain callbacks: without a trainer, with the stock one, and with ours."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_divguard import (
    DivergenceDetector,
    DivGuardTrainer,
    DivGuardTrainingArguments,
    DualTimeScaleDivergenceDetector,
    DualWindowDivergenceDetector,
)
from tests.conftest import AskAt, MetricByStep, Recorder
from tests.tiny import TokenRows, checkpoint_steps

pytestmark = pytest.mark.filterwarnings("ignore:mtime may not be reliable")

NAN, INF = math.nan, math.inf


def ema(**options: Any) -> DivergenceDetector:
    """Return a detector whose short average is the last value and whose long one stays near the first."""
    return DualTimeScaleDivergenceDetector(
        **{"short_alpha": 1.0, "long_alpha": 1e-6, "threshold": 1.0, **options}
    )


def window(**options: Any) -> DivergenceDetector:
    return DualWindowDivergenceDetector(**{"short_window": 1, "long_window": 3, "threshold": 1.0, **options})


DETECTORS = pytest.mark.parametrize("make", [ema, window])
TRAINERS = {"stock": (Trainer, TrainingArguments), "ours": (DivGuardTrainer, DivGuardTrainingArguments)}
BOTH_TRAINERS = pytest.mark.parametrize(("trainer_class", "arguments_class"), TRAINERS.values(), ids=TRAINERS)


def feed(detector: DivergenceDetector, values: list[Any], key: str = "eval_loss") -> TrainerControl:
    """Show evaluations to a detector that has neither arguments nor a state."""
    control = TrainerControl()
    for value in values:
        detector.on_evaluate(None, None, control, metrics={key: value})
    return control


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage()
        for r in log.records
        if r.name.startswith("hf_divguard") and r.levelno >= logging.WARNING
    ]


# ---- without a trainer


@DETECTORS
def test_a_lasting_jump_is_found_without_a_trainer(make: Any) -> None:
    detector = make()
    assert not feed(detector, [2.0] * 5).should_training_stop
    control = feed(detector, [4.0])
    assert control.should_training_stop
    assert control.should_save, "a stop has the step saved"
    assert (detector.findings[0].kind, detector.findings[0].value) == ("jump", 4.0)


def test_the_defaults_see_a_lasting_jump_of_three_and_not_one_of_2_8() -> None:
    # The gap after k values is J * (0.99**k - 0.9**k), at most 0.706 * J.
    assert feed(DualTimeScaleDivergenceDetector(), [2.0] * 50 + [5.0] * 40).should_training_stop
    assert not feed(DualTimeScaleDivergenceDetector(), [2.0] * 50 + [4.8] * 200).should_training_stop
    assert feed(DualWindowDivergenceDetector(), [2.0] * 100 + [5.0] * 10).should_training_stop
    assert not feed(DualWindowDivergenceDetector(), [2.0] * 100 + [4.1] * 10).should_training_stop


def test_the_window_detector_is_silent_until_its_long_window_is_full() -> None:
    detector = window(long_window=5)
    assert not feed(detector, [0.0, 100.0, 0.0, 100.0]).should_training_stop
    assert feed(detector, [100.0]).should_training_stop


@DETECTORS
@pytest.mark.parametrize("bad", [NAN, INF, -INF, np.float32("nan"), torch.tensor(INF)])
def test_a_value_that_is_not_finite_is_a_finding_and_enters_no_average(make: Any, bad: Any) -> None:
    detector = make()
    feed(detector, [2.0] * 5)
    before = detector.state_dict()
    assert feed(detector, [bad]).should_training_stop
    assert detector.findings[0].kind == "non_finite"
    assert detector.state_dict() == before


@DETECTORS
def test_a_nan_at_the_very_first_value_is_found_and_does_not_blind(make: Any) -> None:
    detector = make()
    assert feed(detector, [NAN]).should_training_stop
    feed(detector, [2.0] * 5)
    assert feed(detector, [9.0]).should_training_stop


@DETECTORS
@pytest.mark.parametrize("key", ["eval_accuracy", "eval_f1", "eval_rougeL"])
def test_a_drop_of_an_accuracy_is_the_trouble_and_a_rise_is_not(make: Any, key: str) -> None:
    detector = make(metric_key=key, threshold=0.3)
    assert not feed(detector, [0.5] * 4 + [0.95], key).should_training_stop
    detector = make(metric_key=key, threshold=0.3)
    assert feed(detector, [0.9] * 4 + [0.4], key).should_training_stop
    assert detector.findings[0].kind == "drop"


@DETECTORS
def test_the_direction_can_be_said_and_an_unknown_one_is_asked_for(
    make: Any, our_log: pytest.LogCaptureFixture
) -> None:
    assert feed(
        make(metric_key="eval_zork", greater_is_better=True), [3.0] * 4 + [1.0], "eval_zork"
    ).should_save
    assert "direction" not in our_log.text
    make(metric_key="eval_zork")
    assert "direction of `eval_zork` is not known" in our_log.text


@DETECTORS
def test_abort_asks_for_no_save_and_uses_the_switch_of_a_control_that_has_it(make: Any) -> None:
    Control = make_dataclass("Control", [("should_abort_without_save", bool, False)], bases=(TrainerControl,))
    for control in (TrainerControl(), Control()):
        control.should_save = control.should_evaluate = True
        make(action="abort").on_log(None, None, control, logs={"eval_loss": NAN})
        assert control.should_training_stop
        assert not control.should_save
        assert not control.should_evaluate
        assert getattr(control, "should_abort_without_save", True)
    stopping = Control()
    make(action="stop").on_log(None, None, stopping, logs={"eval_loss": NAN})
    assert not stopping.should_abort_without_save


@DETECTORS
def test_warn_only_tells_and_once_for_as_long_as_it_lasts(
    make: Any, our_log: pytest.LogCaptureFixture
) -> None:
    detector = make(action="warn", long_window=50) if make is window else make(action="warn")
    control = feed(detector, [2.0] * 50 + [9.0] * 5)
    assert not control.should_training_stop
    assert not control.should_save
    assert len(warnings_of(our_log)) == 1
    feed(detector, [2.0] * 50 + [9.0] * 5)
    assert len(warnings_of(our_log)) == 2


@pytest.mark.parametrize("cls", [DualTimeScaleDivergenceDetector, DualWindowDivergenceDetector])
def test_an_unknown_action_is_refused_naming_the_known_ones(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"`action` must be one of .*'stop', 'abort'.*, got 'halt'"):
        cls(action="halt")


@pytest.mark.parametrize(
    ("cls", "options", "sentence"),
    [
        (
            DualTimeScaleDivergenceDetector,
            {"short_alpha": 0.0},
            "`short_alpha` must be above 0 and at most 1",
        ),
        (DualTimeScaleDivergenceDetector, {"long_alpha": 1.5}, "`long_alpha` must be above 0 and at most 1"),
        (DualTimeScaleDivergenceDetector, {"short_alpha": NAN}, "`short_alpha` must be above 0"),
        (DualTimeScaleDivergenceDetector, {"threshold": NAN}, "`threshold` must be a finite number"),
        (DualWindowDivergenceDetector, {"short_window": 0}, "`short_window` must be at least 1"),
        (DualWindowDivergenceDetector, {"threshold": INF}, "`threshold` must be a finite number"),
    ],
)
def test_a_setting_out_of_range_is_refused(cls: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        cls(**options)


def test_a_short_average_that_is_not_faster_than_the_long_one_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="should be greater than `long_alpha=0.1`"):
        DualTimeScaleDivergenceDetector(short_alpha=0.1, long_alpha=0.1)
    with pytest.warns(UserWarning, match="should be smaller than `long_window=10`"):
        DualWindowDivergenceDetector(short_window=10, long_window=10)


def test_the_state_is_exactly_what_is_promised() -> None:
    detector = DualTimeScaleDivergenceDetector()
    assert detector.state_dict() == {"short_ema": None, "long_ema": None, "initialized": False}
    feed(detector, [2.0, 3.0])
    assert detector.state_dict() == {
        "short_ema": pytest.approx(2.1, abs=1e-15),
        "long_ema": pytest.approx(2.01, abs=1e-15),
        "initialized": True,
    }
    other = DualWindowDivergenceDetector(short_window=2, long_window=3)
    assert other.state_dict() == {"short_buffer": [], "long_buffer": []}
    feed(other, [1.0, 2.0, 3.0, 4.0])
    assert other.state_dict() == {"short_buffer": [3.0, 4.0], "long_buffer": [2.0, 3.0, 4.0]}


@DETECTORS
def test_a_state_goes_through_json_into_another_detector_which_goes_on_alike(make: Any) -> None:
    values = [2.0, 2.1, 1.9, 2.05, 2.3, 1.7, 9.0, NAN, 2.0]
    whole = make(action="warn")
    feed(whole, values)
    first, second = make(action="warn"), make(action="warn")
    feed(first, values[:5])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    feed(second, values[5:])
    assert second.state_dict() == whole.state_dict()
    assert [f.message.split(" at step")[0] for f in second.findings] == [
        f.message.split(" at step")[0] for f in whole.findings
    ]


@DETECTORS
def test_a_state_that_does_not_fit_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"state of Dual\w+Rule"):
        make().load_state_dict({"something": "else"})


@DETECTORS
@pytest.mark.parametrize("logs", [None, {}, {"eval_loss": None}, {"eval_loss": "high"}, {"loss": 1.0}])
def test_logs_without_a_number_under_the_key_are_passed_over(make: Any, logs: Any) -> None:
    detector, control = make(), TrainerControl()
    before = detector.state_dict()
    detector.on_log(None, None, control, logs=logs)
    detector.on_evaluate(None, None, control, metrics=logs)
    assert detector.state_dict() == before
    assert not control.should_training_stop


@DETECTORS
def test_numbers_of_other_libraries_count_as_numbers(make: Any) -> None:
    plain, mixed = make(), make()
    feed(plain, [2.0, 3.0, 2.0])
    feed(mixed, [np.float32(2.0), torch.tensor(3.0), 2])
    assert mixed.state_dict() == plain.state_dict()


def test_one_that_is_shown_a_value_by_on_log_and_on_evaluate_counts_it_once() -> None:
    detector, control = window(), TrainerControl()
    for value in (1.0, 1.0, 1.0):
        metrics = {"eval_loss": value}
        detector.on_log(None, None, control, logs=metrics)
        detector.on_evaluate(None, None, control, metrics=dict(metrics))
    assert detector.state_dict()["long_buffer"] == [1.0, 1.0, 1.0]


# ---- with a trainer


def in_the_order_of_values(values: list[float], name: str = "score") -> MetricByStep:
    """Return a metric that takes ``values`` at steps 1, 2, ..."""
    return MetricByStep(dict(enumerate(values, start=1)), name)


EACH_STEP = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 100,
    "logging_strategy": "no",
    "max_steps": 6,
}


@pytest.fixture
def train(make_trainer: Any) -> Any:
    def train(
        trainer_class: Any,
        arguments_class: Any,
        metric: Any,
        *detectors: Any,
        callbacks: Any = (),
        resume: Any = None,
        **options: Any,
    ) -> tuple[Any, Recorder, Any]:
        recorder = Recorder()
        trainer = make_trainer(
            trainer_class=trainer_class,
            arguments_class=arguments_class,
            callbacks=[metric, *detectors, *callbacks, recorder]
            if metric
            else [*detectors, *callbacks, recorder],
            compute_metrics=metric,
            **{**EACH_STEP, **options},
        )
        return trainer, recorder, trainer.train(resume_from_checkpoint=resume)

    return train


@BOTH_TRAINERS
@DETECTORS
def test_stop_lets_the_step_finish_and_saves_it_and_says_so_everywhere(
    train: Any, tmp_path: Path, our_log: Any, make: Any, trainer_class: Any, arguments_class: Any
) -> None:
    detector = make(metric_key="eval_error")
    metric = in_the_order_of_values([2.0, 2.0, 2.0, 2.0, 7.5, 2.0], "error")
    trainer, recorder, output = train(trainer_class, arguments_class, metric, detector)
    assert trainer.state.global_step == 5
    assert recorder.steps("evaluate") == [1, 2, 3, 4, 5]
    assert recorder.steps("save") == [5]
    assert checkpoint_steps(tmp_path / "out") == {5}
    assert trainer.state.divguard_stop_reason == f"stop: {detector.findings[0].message}"
    assert output.metrics["divguard/finished"] == 0
    assert output.metrics["divguard/stopped_at_step"] == 5
    line = warnings_of(our_log)[0]
    assert "`eval_error` = 7.5 at step 5" in line
    assert "limit 1" in line
    assert "Training stops after this step's log, evaluation and save." in line


@BOTH_TRAINERS
def test_a_run_that_finishes_normally_says_nothing(
    train: Any, our_log: Any, trainer_class: Any, arguments_class: Any
) -> None:
    metric = in_the_order_of_values([2.0] * 6, "error")
    trainer, _, output = train(trainer_class, arguments_class, metric, ema(metric_key="eval_error"))
    assert not any(key.startswith("divguard") for key in output.metrics)
    assert trainer.state.divguard_stop_reason is None
    assert warnings_of(our_log) == []


@BOTH_TRAINERS
def test_a_stop_on_the_training_loss_lets_log_evaluation_and_save_of_its_step_take_place(
    train: Any, trainer_class: Any, arguments_class: Any
) -> None:
    class Fault(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs and state.global_step == 3:
                logs["loss"] = 50.0

    detector = ema(use_eval_loss=False)
    trainer, recorder, _ = train(
        trainer_class,
        arguments_class,
        None,
        Fault(),
        detector,
        logging_strategy="steps",
        eval_steps=100,
        **({} if trainer_class is Trainer else {"divguard_compare": "off"}),  # acted on at once
    )
    assert trainer.state.global_step == 3
    assert recorder.events[-3:] == [("log", 3), ("evaluate", 3), ("save", 3)]


SAVES: dict[str, dict[str, Any]] = {
    "steps": {"save_steps": 4},
    "epoch": {"save_strategy": "epoch", "eval_strategy": "epoch"},
    "best": {"save_strategy": "best", "eval_steps": 4},
}


@pytest.mark.parametrize("save", SAVES)
@BOTH_TRAINERS
@DETECTORS
def test_abort_saves_nothing_more_not_even_a_save_due_at_that_very_step(
    train: Any, tmp_path: Path, make: Any, trainer_class: Any, arguments_class: Any, save: str
) -> None:
    # An epoch has four steps. The faulty evaluation comes third, as a save is due.
    metric = MetricByStep({4: 2.0, 8: 2.5, 12: NAN, 16: 2.0}, "error")
    detector = make(metric_key="eval_error", action="abort")
    trainer, recorder, output = train(
        trainer_class,
        arguments_class,
        metric,
        detector,
        train_dataset=TokenRows(16),
        eval_steps=4,
        max_steps=16,
        metric_for_best_model="error",
        greater_is_better=False,
        **{key: value for key, value in SAVES[save].items() if key != "eval_steps"},
    )
    assert trainer.state.global_step == 12
    assert recorder.steps("save") == ([4] if save == "best" else [4, 8])
    assert checkpoint_steps(tmp_path / "out") == ({4} if save == "best" else {4, 8})
    assert trainer.state.divguard_stop_reason.startswith("abort: ")
    assert output.metrics["divguard/finished"] == 0


@BOTH_TRAINERS
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_abort_on_the_training_loss_cancels_the_evaluation_and_the_save_of_its_step(
    train: Any, tmp_path: Path, trainer_class: Any, arguments_class: Any, strategy: str
) -> None:
    class Fault(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs and state.global_step == 8:
                logs["loss"] = NAN

    trainer, recorder, _ = train(
        trainer_class,
        arguments_class,
        None,
        Fault(),
        ema(use_eval_loss=False, action="abort"),
        logging_strategy="steps",
        train_dataset=TokenRows(32),
        save_strategy=strategy,
        eval_strategy=strategy,
        save_steps=8,
        eval_steps=8,
        max_steps=16,
    )
    assert trainer.state.global_step == 8
    assert recorder.steps("save") == []
    assert recorder.steps("evaluate") == []
    assert checkpoint_steps(tmp_path / "out") == set()


def test_abort_saves_nothing_even_if_another_callback_asks_for_it(train: Any, tmp_path: Path) -> None:
    metric = in_the_order_of_values([2.0, 2.0, NAN, 2.0, 2.0, 2.0], "error")
    train(
        *TRAINERS["ours"],
        metric,
        ema(metric_key="eval_error", action="abort"),
        callbacks=[AskAt(save={3}, when="on_evaluate"), AskAt(save={3}, when="on_epoch_end")],
    )
    assert checkpoint_steps(tmp_path / "out") == set()


@pytest.mark.parametrize("preserve", [False, True])
def test_a_stop_is_saved_with_save_strategy_best_too(train: Any, tmp_path: Path, preserve: bool) -> None:
    metric = in_the_order_of_values([2.0, 2.5, 2.2, 9.0, 1.0, 1.0], "error")
    train(
        *TRAINERS["ours"],
        metric,
        ema(metric_key="eval_error"),
        save_strategy="best",
        metric_for_best_model="error",
        greater_is_better=False,
        preserve_best_model=preserve,
        best_model_metric="error",
    )
    assert checkpoint_steps(tmp_path / "out") == {1, 4}


def test_a_stop_with_save_strategy_no_saves_nothing(train: Any, tmp_path: Path) -> None:
    metric = in_the_order_of_values([2.0, 9.0, 2.0, 2.0, 2.0, 2.0], "error")
    trainer, _, _ = train(*TRAINERS["stock"], metric, ema(metric_key="eval_error"), save_strategy="no")
    assert trainer.state.global_step == 2
    assert checkpoint_steps(tmp_path / "out") == set()


# ---- each value once


@BOTH_TRAINERS
def test_each_evaluation_counts_once_though_its_value_stays_the_same(
    train: Any, trainer_class: Any, arguments_class: Any
) -> None:
    detector = DualWindowDivergenceDetector(2, 50, metric_key="eval_error")
    train(trainer_class, arguments_class, in_the_order_of_values([1.5] * 6, "error"), detector)
    assert detector.state_dict()["long_buffer"] == [1.5] * 6


@BOTH_TRAINERS
def test_each_training_loss_counts_once(train: Any, trainer_class: Any, arguments_class: Any) -> None:
    detector = DualWindowDivergenceDetector(2, 50, use_eval_loss=False)
    _, recorder, _ = train(trainer_class, arguments_class, None, detector, logging_strategy="steps")
    assert detector.state_dict()["long_buffer"] == [log["loss"] for log in recorder.logs if "loss" in log]
    assert len(detector.state_dict()["long_buffer"]) == 6


@BOTH_TRAINERS
def test_of_several_eval_datasets_the_watched_one_counts_once_a_round(
    train: Any, our_log: Any, trainer_class: Any, arguments_class: Any
) -> None:
    detector = DualWindowDivergenceDetector(2, 50, metric_key="eval_books_loss")
    _, recorder, _ = train(
        trainer_class,
        arguments_class,
        None,
        detector,
        eval_dataset={"news": TokenRows(4, seed=1), "books": TokenRows(4, seed=2)},
        max_steps=4,
    )
    seen = [log["eval_books_loss"] for log in recorder.logs if "eval_books_loss" in log]
    assert detector.state_dict()["long_buffer"] == seen
    assert len(seen) == 4
    assert warnings_of(our_log) == []


@BOTH_TRAINERS
def test_a_trainer_that_copies_its_logs_or_logs_an_evaluation_again_is_counted_once(
    train: Any, trainer_class: Any, arguments_class: Any
) -> None:
    class Copying(trainer_class):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs}, *args, **kwargs)

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = super().evaluate(*args, **kwargs)
            self.log(metrics)
            return metrics

    detector = DualWindowDivergenceDetector(2, 50, metric_key="eval_error")
    train(Copying, arguments_class, in_the_order_of_values([1.5, 2.0, 2.0, 1.0, 1.0, 1.0], "error"), detector)
    assert detector.state_dict()["long_buffer"] == [1.5, 2.0, 2.0, 1.0, 1.0, 1.0]


@BOTH_TRAINERS
def test_an_evaluation_of_the_step_that_is_resumed_from_counts_no_second_time(
    train: Any, trainer_class: Any, arguments_class: Any
) -> None:
    buffers = []
    for resume, stop in ((None, {3}), (True, ())):
        detector = DualWindowDivergenceDetector(2, 50, metric_key="eval_error")
        metric = MetricByStep({0: 9.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0, 6: 6.0}, "error")
        callbacks = [AskAt(save=stop, stop=stop)]
        options = {"eval_on_start": True, "resume": resume, "callbacks": callbacks}
        train(trainer_class, arguments_class, metric, detector, **options)
        buffers.append(detector.state_dict()["long_buffer"])
    assert buffers == [[9.0, 1.0, 2.0, 3.0], [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]


@BOTH_TRAINERS
def test_an_evaluation_after_training_counts_no_more(
    train: Any, our_log: Any, trainer_class: Any, arguments_class: Any
) -> None:
    values = dict(enumerate([1.0] * 6, start=1))
    metric = MetricByStep(values, "error")
    detector = ema(metric_key="eval_error")
    trainer, _, _ = train(trainer_class, arguments_class, metric, detector)
    before = detector.state_dict()
    values[6] = 50.0
    trainer.evaluate()
    assert detector.state_dict() == before
    assert warnings_of(our_log) == []


# ---- a key that never comes


@BOTH_TRAINERS
def test_a_key_that_never_comes_is_told_once_with_the_keys_there_are(
    train: Any, our_log: Any, trainer_class: Any, arguments_class: Any
) -> None:
    metric = in_the_order_of_values([1.0] * 6, "error")
    train(trainer_class, arguments_class, metric, ema(metric_key="eval_eror", greater_is_better=False))
    (line,) = warnings_of(our_log)
    assert "watches `eval_eror`, but that key has not come in 3 rounds" in line
    assert "eval_error" in line
    assert "Set `metric_key`" in line


@BOTH_TRAINERS
def test_a_key_that_never_comes_in_a_very_short_run_is_told_at_its_end(
    train: Any, our_log: Any, trainer_class: Any, arguments_class: Any
) -> None:
    detector = ema(metric_key="eval_x", greater_is_better=False)
    train(trainer_class, arguments_class, None, detector, max_steps=2)
    (line,) = warnings_of(our_log)
    assert "watches `eval_x`" in line


@BOTH_TRAINERS
def test_watching_an_evaluation_that_is_never_made_is_told_at_the_start(
    train: Any, our_log: Any, trainer_class: Any, arguments_class: Any
) -> None:
    train(trainer_class, arguments_class, None, ema(), eval_strategy="no", max_steps=2)
    (line,) = warnings_of(our_log)
    assert "`eval_strategy` is 'no'" in line


# ---- several of them, ranks, the run's state


@BOTH_TRAINERS
def test_two_detectors_of_one_class_watch_two_metrics(
    train: Any, trainer_class: Any, arguments_class: Any
) -> None:
    loss = DualWindowDivergenceDetector(2, 50, metric_key="eval_loss", name="loss")
    error = DualWindowDivergenceDetector(2, 50, metric_key="eval_error", name="error")
    _, recorder, _ = train(
        trainer_class,
        arguments_class,
        in_the_order_of_values([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "error"),
        loss,
        error,
    )
    assert error.state_dict()["long_buffer"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert loss.state_dict()["long_buffer"] == [
        log["eval_loss"] for log in recorder.logs if "eval_loss" in log
    ]


@BOTH_TRAINERS
def test_when_one_detector_stops_and_another_aborts_nothing_is_saved(
    train: Any, tmp_path: Path, trainer_class: Any, arguments_class: Any
) -> None:
    metric = in_the_order_of_values([2.0, NAN, 2.0, 2.0, 2.0, 2.0], "error")
    trainer, _, _ = train(
        trainer_class,
        arguments_class,
        metric,
        ema(metric_key="eval_error", action="stop", name="first"),
        ema(metric_key="eval_error", action="abort", name="second"),
        ema(metric_key="eval_error", action="stop", name="third"),
        save_steps=2,
    )
    assert checkpoint_steps(tmp_path / "out") == set()
    assert trainer.state.divguard_stop_reason.startswith("abort: ")


@DETECTORS
def test_on_another_rank_it_acts_alike_and_says_nothing(make: Any, our_log: pytest.LogCaptureFixture) -> None:
    state, control = TrainerState(is_world_process_zero=False, global_step=7), TrainerControl()
    make().on_log(None, state, control, logs={"eval_loss": NAN})
    assert control.should_training_stop
    assert state.divguard_stop_reason.startswith("stop: ")
    assert warnings_of(our_log) == []


@BOTH_TRAINERS
def test_the_reason_of_a_stop_stays_out_of_trainer_state_json(
    train: Any, tmp_path: Path, trainer_class: Any, arguments_class: Any
) -> None:
    metric = in_the_order_of_values([2.0, NAN, 2.0, 2.0, 2.0, 2.0], "error")
    train(trainer_class, arguments_class, metric, ema(metric_key="eval_error"))
    saved = TrainerState.load_from_json(str(tmp_path / "out" / "checkpoint-2" / "trainer_state.json"))
    assert saved.global_step == 2
    assert not hasattr(saved, "divguard_stop_reason")


@BOTH_TRAINERS
def test_a_second_train_starts_clean(train: Any, trainer_class: Any, arguments_class: Any) -> None:
    detector = DualWindowDivergenceDetector(1, 50, metric_key="eval_error")
    values = dict(enumerate([2.0, NAN, 1.0, 1.0], start=1))
    trainer, _, _ = train(
        trainer_class, arguments_class, MetricByStep(values, "error"), detector, max_steps=4
    )
    assert trainer.state.global_step == 2
    values.update({1: 1.0, 2: 1.0})
    output = trainer.train()
    assert trainer.state.global_step == 4
    assert detector.state_dict()["long_buffer"] == [1.0] * 4
    assert detector.findings == []
    assert "divguard/finished" not in output.metrics


@DETECTORS
def test_rollback_is_refused_where_the_trainer_cannot_do_it(train: Any, make: Any) -> None:
    with pytest.raises(ValueError, match="`action='rollback'` needs `DivGuardTrainer`"):
        train(*TRAINERS["stock"], None, make(action="rollback"))
