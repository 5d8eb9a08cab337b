"""The detectors that need no tuning, under ``DivGuardTrainer`` and under the stock Trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_divguard import (
    AdaptiveDivergenceDetector,
    DivGuardTrainer,
    NonFiniteDetector,
    verify_checkpoint,
)
from hf_divguard.core.findings import Finding
from hf_divguard.hf.resume_conditions import changed_conditions
from hf_divguard.storage.sidecar import read_sidecar
from tests.tiny import TokenRows, base_arguments, checkpoint_steps, tiny_model

NAN = float("nan")


class Faulty:
    """Multiplies the loss of the steps in ``faults``; mixed into a Trainer."""

    faults: ClassVar[dict[int, float]] = {}
    from_step: tuple[int, float] | None = None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        step = self.state.global_step + 1  # type: ignore[attr-defined]
        if self.from_step is not None and step >= self.from_step[0]:
            loss = loss * self.from_step[1]
        return loss * self.faults[step] if step in self.faults and self.model.training else loss  # type: ignore[attr-defined]


class FaultyTrainer(Faulty, DivGuardTrainer):
    pass


class FaultyStockTrainer(Faulty, Trainer):
    pass


class SpoilGradient(TrainerCallback):
    """Makes the gradient of one step NaN beside a good loss."""

    def __init__(self, step: int) -> None:
        self.step = step

    def hook(self, model: torch.nn.Module, state: TrainerState) -> None:
        parameter = next(model.parameters())
        parameter.register_hook(
            lambda gradient: gradient * NAN if state.global_step + 1 == self.step else gradient
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.hook(model, state)


def faulty(make_trainer: Callable[..., Any], detector: Any = None, **options: Any) -> Any:
    faults = options.pop("faults", {})
    from_step = options.pop("from_step", None)
    options = {"trainer_class": FaultyTrainer, "save_strategy": "no", "max_steps": 40, **options}
    if "arguments_class" not in options:
        options.setdefault("divguard_skip_nonfinite", False)  # what is not finite reaches the weights
        options.setdefault("divguard_compare", "off")  # a finding is acted on at once
    trainer = make_trainer(callbacks=[detector] if detector is not None else None, **options)
    trainer.faults, trainer.from_step = faults, from_step
    return trainer


def finding(severity: str, step: int = 1, kind: str = "jump", metric: str = "loss") -> Finding:
    return Finding(
        step=step,
        onset_step=step,
        kind=kind,
        severity=severity,  # type: ignore[arg-type]
        metric=metric,
        value=9.0,
        limit=1.0,
        message=f"`{metric}` = 9 at step {step}.",
    )


class ScriptedRule:
    """A rule that finds what it was told to find."""

    metric_key = "loss"
    scaler_patience = 17

    def __init__(self, script: dict[int, Finding], evaluations: dict[str, Finding] | None = None) -> None:
        self.script = script
        self.evaluations = evaluations or {}
        self.graces = 0
        self.seen: list[tuple[int, float]] = []
        self.seen_evaluations: list[tuple[int, str]] = []

    def observe(self, step: int, value: float, grad_norm: float | None = None) -> Finding | None:
        self.seen.append((step, value))
        return self.script.get(step)

    def observe_eval(self, step: int, value: float, *, metric_key: str = "eval_loss") -> Finding | None:
        self.seen_evaluations.append((step, metric_key))
        return self.evaluations.get(metric_key)

    def start_grace(self, n_values: int | None = None) -> None:
        self.graces += 1

    def reset(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def scripted(
    action: str = "stop", evaluations: dict[str, Finding] | None = None, **script: Finding
) -> AdaptiveDivergenceDetector:
    detector = AdaptiveDivergenceDetector(action=action)
    detector.rule = ScriptedRule({int(step[1:]): found for step, found in script.items()}, evaluations)  # type: ignore[assignment]
    return detector


# ---- NaN under the stock filter


@pytest.mark.parametrize("name", ["adaptive", "nonfinite"])
def test_a_nan_loss_is_found_at_the_next_check_while_the_stock_trainer_logs_zeros_to_the_end(
    name: str, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"max_steps": 40, "faults": {13: NAN}}
    stock = faulty(
        make_trainer,
        trainer_class=FaultyStockTrainer,
        arguments_class=TrainingArguments,
        output_dir=tmp_path / "stock",
        **options,
    )
    stock.train()
    logged = [entry["loss"] for entry in stock.state.log_history if "loss" in entry]
    assert stock.args.logging_nan_inf_filter
    assert stock.state.global_step == 40
    assert logged[12:] == [0.0] * 28
    assert all(loss > 0 for loss in logged[:12])

    guarded = faulty(make_trainer, logging_steps=50, divguard_detector=name, **options)
    guarded.train()
    assert guarded.state.global_step == 20
    assert guarded.state.divguard_finding.step == guarded.state.divguard_finding.onset_step == 13
    assert guarded.state.divguard_finding.kind == "non_finite"


def test_a_nan_gradient_beside_a_good_loss_is_found_at_the_next_check(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    stock = faulty(
        make_trainer,
        SpoilGradient(13),
        trainer_class=FaultyStockTrainer,
        arguments_class=TrainingArguments,
        output_dir=tmp_path / "stock",
    )
    stock.train()
    logged = [entry for entry in stock.state.log_history if "loss" in entry]
    assert logged[12]["loss"] > 0
    assert math.isnan(logged[12]["grad_norm"])
    assert [entry["loss"] for entry in logged[13:]] == [0.0] * 27

    guarded = faulty(make_trainer, SpoilGradient(13), logging_steps=50, divguard_detector="adaptive")
    guarded.train()
    assert guarded.state.global_step == 20
    found = guarded.state.divguard_finding
    assert (found.step, found.metric, found.kind) == (13, "grad_norm", "non_finite")


@pytest.mark.parametrize("check_steps", [1, 7, 10])
def test_the_check_that_follows_is_at_most_check_steps_away(
    check_steps: int, make_trainer: Callable[..., Any]
) -> None:
    trainer = faulty(
        make_trainer,
        faults={13: NAN},
        logging_steps=100,
        divguard_detector="nonfinite",
        divguard_check_steps=check_steps,
    )
    trainer.train()
    assert trainer.state.global_step == {1: 13, 7: 14, 10: 20}[check_steps]


@pytest.mark.parametrize("name", [AdaptiveDivergenceDetector, NonFiniteDetector], ids=lambda c: c.__name__)
def test_under_the_stock_trainer_a_masked_zero_is_seen_in_the_log(
    name: Any, make_trainer: Callable[..., Any]
) -> None:
    detector = name()
    trainer = faulty(
        make_trainer,
        detector,
        trainer_class=FaultyStockTrainer,
        arguments_class=TrainingArguments,
        faults={13: NAN},
    )
    trainer.train()
    assert trainer.state.global_step == 13
    assert [(f.step, f.kind, f.value) for f in detector.findings if f.severity == "error"] == [
        (13, "nan_filtered", 0.0)
    ]


# ---- what a finding does


def test_a_note_is_kept_and_nothing_else(make_trainer: Callable[..., Any], our_log: Any) -> None:
    detector = scripted("abort", s5=finding("note", 5))
    trainer = faulty(make_trainer, detector, max_steps=8)
    trainer.train()
    assert trainer.state.global_step == 8
    assert [f.severity for f in detector.findings] == ["note"]
    assert "at step 5" not in our_log.text


def test_a_warning_is_told_and_training_goes_on_whatever_the_action(
    make_trainer: Callable[..., Any], our_log: Any
) -> None:
    trainer = faulty(make_trainer, scripted("abort", s5=finding("warning", 5)), max_steps=8)
    trainer.train()
    assert trainer.state.global_step == 8
    assert our_log.text.count("at step 5. Training goes on.") == 1


def test_a_warning_after_a_note_is_told(make_trainer: Callable[..., Any], our_log: Any) -> None:
    detector = scripted("warn", s5=finding("note", 5), s6=finding("error", 6))
    faulty(make_trainer, detector, max_steps=8).train()
    assert "at step 6. Training goes on." in our_log.text


def test_a_warning_that_lasts_is_told_once(make_trainer: Callable[..., Any], our_log: Any) -> None:
    detector = scripted("warn", **{f"s{step}": finding("error", step) for step in (4, 5, 6)})
    faulty(make_trainer, detector, max_steps=8).train()
    assert our_log.text.count("Training goes on.") == 1


def test_stop_logs_evaluates_and_saves_at_the_step_that_found_it(make_trainer: Callable[..., Any]) -> None:
    trainer = faulty(
        make_trainer,
        scripted("stop", s13=finding("error", 13)),
        logging_steps=100,
        save_strategy="steps",
        save_steps=100,
        eval_strategy="steps",
        eval_steps=100,
    )
    trainer.train()
    assert checkpoint_steps(trainer.args.output_dir) == {20}
    entries = [entry for entry in trainer.state.log_history if entry["step"] == 20]
    assert any("loss" in entry for entry in entries)
    assert any("eval_loss" in entry for entry in entries)


def test_abort_saves_nothing_not_even_what_is_due(make_trainer: Callable[..., Any]) -> None:
    trainer = faulty(
        make_trainer,
        scripted("abort", s5=finding("error", 5)),
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=8,
        logging_steps=100,
    )
    trainer.train()
    assert trainer.state.global_step == 8
    assert checkpoint_steps(trainer.args.output_dir) == {4}
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("first", ["stop", "abort"])
def test_of_two_detectors_that_fire_at_one_step_the_one_that_saves_nothing_wins(
    first: str, make_trainer: Callable[..., Any]
) -> None:
    trainer = faulty(make_trainer, max_steps=12, save_strategy="steps", save_steps=4)
    for name, action in enumerate(sorted(["stop", "abort"], key=lambda action: action != first)):
        detector = scripted(action, s8=finding("error", 8))
        detector.name = str(name)
        trainer.add_callback(detector)
    trainer.train()
    assert checkpoint_steps(trainer.args.output_dir) == {4}
    assert trainer.state.divguard_stop_reason.startswith("abort")


def test_a_rising_evaluation_loss_is_a_warning_by_default() -> None:
    detector, control = AdaptiveDivergenceDetector(action="abort"), TrainerControl()
    state = TrainerState()
    for step in range(1, 401):
        state.global_step = step
        logs = {"loss": 2.0 * math.exp(-step / 100) + 0.01 * (step % 3), "grad_norm": 1.0}
        detector.on_log(None, state, control, logs=logs)
        if step % 10 == 0:
            evaluation = 2.0 + abs(step - 100) / 100 + 0.01 * (step % 3)
            detector.on_evaluate(None, state, control, metrics={"eval_loss": evaluation})
    assert not control.should_training_stop
    on_evaluation = [f for f in detector.findings if f.metric == "eval_loss"]
    assert {f.severity for f in on_evaluation} <= {"warning", "note"}
    assert not [f for f in detector.findings if f.severity == "error"]


# ---- several evaluation sets


def test_each_of_several_evaluation_sets_is_watched_by_itself(
    make_trainer: Callable[..., Any], our_log: Any
) -> None:
    detector = scripted(evaluations={"eval_code_loss": finding("warning", 4, "eval_climb", "eval_code_loss")})
    trainer = faulty(
        make_trainer,
        detector,
        eval_dataset={"web": TokenRows(8, 1), "code": TokenRows(8, 2)},
        eval_strategy="steps",
        eval_steps=4,
        max_steps=8,
    )
    trainer.train()
    assert detector.rule.seen_evaluations == [
        (step, f"eval_{name}_loss") for step in (4, 8) for name in ("web", "code")
    ]
    assert "`eval_code_loss` = 9 at step 4" in our_log.text
    assert trainer.state.global_step == 8


def test_a_set_whose_loss_is_not_finite_is_named_once_each(make_trainer: Callable[..., Any]) -> None:
    detector, control, state = NonFiniteDetector(action="warn"), TrainerControl(), TrainerState()
    for step in (1, 2):
        state.global_step = step
        for name, loss in (("web", 1.0), ("code", NAN), ("math", NAN)):
            metrics = {f"eval_{name}_loss": loss, f"eval_{name}_runtime": 0.1}
            detector.on_evaluate(None, state, control, metrics=metrics)
    assert [f.metric for f in detector.findings] == ["eval_code_loss", "eval_math_loss"]


def test_an_evaluation_after_training_is_not_of_the_run(make_trainer: Callable[..., Any]) -> None:
    detector = scripted(evaluations={"eval_loss": finding("error", 8, metric="eval_loss")})
    trainer = faulty(make_trainer, detector, max_steps=4)
    trainer.train()
    trainer.evaluate()
    assert detector.findings == []


# ---- what cannot be seen


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"logging_steps": 5}, "single steps (a log is the mean of 5 steps)"),
        ({"logging_steps": 0.25}, "single steps (a log is the mean of 10 steps)"),
        ({"logging_strategy": "epoch"}, "single steps (a log is the mean of an epoch)"),
        ({}, "NaN losses that `logging_nan_inf_filter` hides"),
        ({"logging_strategy": "no"}, "any training loss"),
        ({"logging_nan_inf_filter": False}, None),
    ],
    ids=str,
)
def test_under_the_stock_trainer_it_is_said_what_logs_cannot_show(
    options: dict[str, Any], said: str | None, make_trainer: Callable[..., Any], our_log: Any
) -> None:
    stock = {"trainer_class": FaultyStockTrainer, "arguments_class": TrainingArguments}
    faulty(make_trainer, AdaptiveDivergenceDetector(), **stock, **options).train()
    assert ("cannot see" in our_log.text) is (said is not None)
    assert (said or "") in our_log.text


def test_with_raw_losses_nothing_is_said_to_be_unseen(make_trainer: Callable[..., Any], our_log: Any) -> None:
    faulty(make_trainer, AdaptiveDivergenceDetector(), logging_steps=5).train()
    assert "cannot see" not in our_log.text


def test_a_detector_goes_back_to_logs_when_a_stock_trainer_takes_it_over(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    detector = NonFiniteDetector()
    faulty(make_trainer, detector, max_steps=2).train()
    stock = faulty(
        make_trainer,
        detector,
        trainer_class=FaultyStockTrainer,
        arguments_class=TrainingArguments,
        output_dir=tmp_path / "stock",
        faults={3: NAN},
    )
    stock.train()
    assert stock.state.global_step == 3


def test_a_detector_of_evaluations_without_any_says_so(
    make_trainer: Callable[..., Any], our_log: Any
) -> None:
    faulty(make_trainer, max_steps=2, divguard_detector="ema").train()
    assert "watches `eval_loss`, but `eval_strategy` is 'no'" in our_log.text


# ---- what a stop saves after NaN


@pytest.mark.parametrize("name", ["adaptive", "nonfinite"])
def test_a_stop_after_nan_saves_a_checkpoint_that_no_resume_takes(
    name: str, make_trainer: Callable[..., Any], our_log: Any
) -> None:
    options = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 1, "divguard_detector": name}
    trainer = faulty(make_trainer, faults={13: NAN}, logging_steps=100, **options)
    trainer.train()
    output_dir = Path(trainer.args.output_dir)
    assert trainer.state.global_step == 15
    # The limit is 1: the good one stays, and the one that was asked for is there to be looked into.
    assert checkpoint_steps(output_dir) == {10, 15}
    verdict = verify_checkpoint(output_dir / "checkpoint-15")
    assert (verdict.status, verdict.resumable) == ("quarantined", False)
    assert read_sidecar(output_dir / "checkpoint-15").quarantine["onset_step"] == 13

    our_log.clear()
    resumed = faulty(make_trainer, logging_steps=100, **{**options, "save_steps": 10}, max_steps=22)
    started = []

    class NoteStart(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            started.append(state.global_step)

    resumed.add_callback(NoteStart())
    resumed.train(resume_from_checkpoint=True)
    assert started == [10]
    assert resumed.state.global_step == 22
    assert "checkpoint-10; passed over checkpoint-15" in our_log.text
    assert "from step 13 on" in our_log.text
    assert "`loss` = nan at step 13" in our_log.text


def test_what_a_stop_after_nan_saves_is_never_the_best(make_trainer: Callable[..., Any]) -> None:
    trainer = faulty(
        make_trainer,
        faults={13: NAN},
        logging_steps=100,
        save_strategy="steps",
        save_steps=5,
        eval_on_save=True,
        preserve_best_model=True,
        divguard_detector="nonfinite",
    )
    trainer.train()
    assert trainer.state.global_step == 15
    assert {entry.step for entry in trainer.best_checkpoints(9)} == {5, 10}
    assert trainer.state.best_global_step in {5, 10}


def test_with_the_stock_trainer_too_what_a_stop_after_nan_saves_is_marked(
    make_trainer: Callable[..., Any],
) -> None:
    trainer = faulty(
        make_trainer,
        NonFiniteDetector(),
        trainer_class=FaultyStockTrainer,
        arguments_class=TrainingArguments,
        faults={7: NAN},
        save_strategy="steps",
        save_steps=5,
    )
    trainer.train()
    output_dir = Path(trainer.args.output_dir)
    assert checkpoint_steps(output_dir) == {5, 7}
    assert verify_checkpoint(output_dir / "checkpoint-5").status == "complete"
    assert verify_checkpoint(output_dir / "checkpoint-7").status == "quarantined"


def test_a_stop_for_a_jump_saves_a_suspect_checkpoint(make_trainer: Callable[..., Any]) -> None:
    detector = scripted("stop", s5=finding("error", 5))
    trainer = faulty(make_trainer, detector, save_strategy="steps", save_steps=100)
    trainer.train()
    assert verify_checkpoint(Path(trainer.args.output_dir) / "checkpoint-5").status == "suspect"


# ---- cut and resumed


class Cut(TrainerCallback):
    """Ends training at a step, as a preempted job does after its last save."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def story(detector: Any) -> list[tuple[int, int, str, str]]:
    return [(f.step, f.onset_step, f.kind, f.severity) for f in detector.findings]


@pytest.mark.parametrize(
    ("stock", "cut"),
    [
        pytest.param(False, 62, id="guarded-in the rise"),
        pytest.param(False, 30, id="guarded-long before", marks=pytest.mark.slow),
        pytest.param(False, 59, id="guarded-just before", marks=pytest.mark.slow),
        pytest.param(True, 62, id="stock-in the rise", marks=pytest.mark.slow),
        pytest.param(True, 30, id="stock-long before", marks=pytest.mark.slow),
        pytest.param(True, 59, id="stock-just before", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_cut_and_resumed_finds_what_the_uncut_one_finds(
    stock: bool, cut: int, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_steps": 90, "from_step": (60, 8.0)}
    options |= {"save_strategy": "steps", "save_steps": 1000}
    if stock:
        options |= {"trainer_class": FaultyStockTrainer, "arguments_class": TrainingArguments}
    else:
        options |= {"logging_steps": 15}
    uncut = AdaptiveDivergenceDetector(action="warn")
    faulty(make_trainer, uncut, output_dir=tmp_path / "uncut", **options).train()
    assert [f for f in uncut.findings if f.severity == "error"]

    before, after = AdaptiveDivergenceDetector(action="warn"), AdaptiveDivergenceDetector(action="warn")
    first = faulty(make_trainer, before, output_dir=tmp_path / "cut", **options)
    first.add_callback(Cut(cut))
    first.train()
    assert first.state.global_step == cut
    second = faulty(make_trainer, after, output_dir=tmp_path / "cut", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{cut}"))
    assert story(before) + story(after) == story(uncut)
    assert all(f.step <= cut for f in before.findings)


@pytest.mark.parametrize(
    ("changes", "graces"),
    [
        ({}, 0),
        ({"learning_rate": 3e-2}, 1),
        ({"per_device_train_batch_size": 8}, 1),
        ({"max_steps": 12}, 1),
        ({"ignore_data_skip": True}, 1),
        ({"logging_steps": 3, "report_to": "none"}, 0),
    ],
    ids=str,
)
def test_a_grace_follows_a_resume_only_where_the_loss_may_be_higher_for_a_good_reason(
    changes: dict[str, Any], graces: int, make_trainer: Callable[..., Any]
) -> None:
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    faulty(make_trainer, scripted(), **options).train()
    detector = scripted()
    resumed = faulty(make_trainer, detector, **{**options, **changes})
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-4"))
    assert detector.rule.graces == graces


def test_a_checkpoint_without_an_optimizer_is_followed_by_a_grace() -> None:
    saved = {"optimizer_saved": False, "learning_rate": 0.1}
    assert "no optimizer" in changed_conditions(saved, {**saved, "optimizer_saved": True})
    assert changed_conditions({**saved, "optimizer_saved": True}, saved) == ""


def test_a_higher_loss_after_a_change_is_not_taken_for_a_divergence(
    make_trainer: Callable[..., Any],
) -> None:
    options = {"max_steps": 60, "save_strategy": "steps", "save_steps": 40, "lr_scheduler_type": "constant"}
    faulty(make_trainer, AdaptiveDivergenceDetector(), **options, learning_rate=1e-3).train()
    detector = AdaptiveDivergenceDetector()
    bump = dict.fromkeys(range(41, 46), 4.0)
    resumed = faulty(make_trainer, detector, **options, learning_rate=1.1e-3, faults=bump)
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-40"))
    assert resumed.state.global_step == 60
    assert not [f for f in detector.findings if f.severity == "error"]


# ---- the loss scaler of fp16


class ScaledTrainer(DivGuardTrainer):
    """Trains on the CPU under fp16 with a real gradient scaler that begins far too high."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=20)


@pytest.fixture
def plain_accelerator_afterwards() -> Any:
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("plain_accelerator_afterwards")
@pytest.mark.parametrize(
    "detector", [AdaptiveDivergenceDetector, NonFiniteDetector], ids=lambda c: c.__name__
)
def test_the_first_infinite_gradients_of_a_loss_scaler_are_no_trouble(
    detector: Any, make_trainer: Callable[..., Any]
) -> None:
    watching = detector(action="abort")
    trainer = make_trainer(
        trainer_class=ScaledTrainer, callbacks=[watching], max_steps=60, save_strategy="no", logging_steps=1
    )
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    skipped = sum(not math.isfinite(norm) for norm in norms)
    assert skipped >= 5
    assert trainer.accelerator.scaler.get_scale() < 2.0**30
    assert trainer.state.global_step == 60
    assert not [f for f in watching.findings if f.severity == "error"]


@pytest.mark.parametrize(("has_scaler", "stops"), [(False, True), (True, False)])
def test_one_infinite_gradient_is_an_error_only_where_no_scaler_searches_its_scale(
    has_scaler: bool, stops: bool
) -> None:
    from hf_divguard.core.detection.detector import StepValues

    detector, control, state = AdaptiveDivergenceDetector(), TrainerControl(), TrainerState()
    detector.use_raw_losses(has_loss_scaler=has_scaler)
    detector.on_raw_losses([StepValues(1, 2.0, math.inf), StepValues(2, 2.0, 1.0)], None, state, control)
    assert control.should_training_stop is stops


# ---- size and show


def test_the_memory_in_a_checkpoint_stays_small_however_long_a_run_is() -> None:
    detector, control, state = AdaptiveDivergenceDetector(action="warn"), TrainerControl(), TrainerState()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20000, generator=generator).tolist()
    for step, value in enumerate(noise, start=1):
        state.global_step = step
        spike = 50.0 if step % 97 == 0 else 0.0
        drift = 0.002 * max(0, step - 15000)
        detector.on_log(None, state, control, logs={"loss": 3.0 + value + spike + drift, "grad_norm": 1.0})
    assert len(json.dumps(detector.state_dict())) < 64_000
    assert len(detector.findings) <= 1000


def test_a_list_of_callbacks_names_the_detectors(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(callbacks=[NonFiniteDetector(name="a"), NonFiniteDetector(name="b")])
    assert trainer.callback_handler.callback_list.count("NonFiniteDetector") == 2


def test_a_stock_trainer_trains_the_same_weights_with_a_detector_that_finds_nothing(tmp_path: Path) -> None:
    results = []
    for callbacks in ([], [AdaptiveDivergenceDetector()]):
        args = TrainingArguments(**base_arguments(tmp_path, save_strategy="no"))
        trainer = Trainer(model=tiny_model(), args=args, train_dataset=TokenRows(), callbacks=callbacks)
        trainer.train()
        results.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_after_a_rollback_skipped_updates_are_counted_from_0_where_no_memory_was_kept() -> None:
    """Else a fault that lasts would be beyond the one count at which it is reported."""
    detector = AdaptiveDivergenceDetector()
    memory = detector.state_dict()
    for state in (None, memory):
        for step in range(3):
            detector._skipped.judge(step, math.nan, None, None)
        assert detector._skipped.in_a_row == 3
        detector.rewind(state)
        assert detector._skipped.in_a_row == 0
