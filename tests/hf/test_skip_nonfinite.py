"""A loss or a gradient that is not finite never reaches the weights, and the host does not wait for that."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_divguard import AdaptiveDivergenceDetector, NonFiniteDetector, TrainingDivergedError, find_checkpoints
from hf_divguard.hf import skipping
from tests.hf.faults import QUICK, NaNBatch, moves
from tests.tiny import same_weights, tiny_model, weights

MakeTrainer = Callable[..., Any]

OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1},
    "fused adamw": {"optim": "adamw_torch_fused", "weight_decay": 0.1},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1},
    "adafactor": {"optim": "adafactor", "weight_decay": 0.1},
}


class WeightsByStep(TrainerCallback):
    """Keeps the weights of every step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = weights(kwargs["model"])


class NaNGradient(TrainerCallback):
    """A gradient that is infinite in one place, with a good loss."""

    def __init__(self, model: torch.nn.Module, steps: range) -> None:
        self.steps, self.is_on = steps, False
        next(model.parameters()).register_hook(self._poison)

    def _poison(self, gradient: torch.Tensor) -> torch.Tensor:
        if not self.is_on:
            return gradient
        bad = gradient.clone()
        bad.view(-1)[0] = math.inf
        return bad

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_on = state.global_step + 1 in self.steps


class WithoutUpdates(TrainerCallback):
    """Leaves out the updates of some steps by hand."""

    def __init__(self, steps: range) -> None:
        self.steps = steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self.steps:
            for weight in kwargs["model"].parameters():
                weight.grad = None


def run(
    make_trainer: MakeTrainer,
    fault: Any,
    steps: range,
    *,
    action: str = "stop",
    detector: Any = None,
    **options: Any,
) -> tuple[Any, WeightsByStep]:
    """Train with a fault in ``steps``."""
    model, by_step = tiny_model(), WeightsByStep()
    detector = detector or NonFiniteDetector(action=action)
    options = {"max_steps": 24, "save_steps": 4, **options}
    trainer = make_trainer(model=model, callbacks=[fault(model, steps), by_step, detector], **options)
    trainer.train()
    return trainer, by_step


@pytest.mark.parametrize("fault", [NaNBatch, NaNGradient], ids=["loss", "gradient"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_no_bit_of_the_weights(
    make_trainer: MakeTrainer, optimizer: dict[str, Any], fault: Any
) -> None:
    """Neither momentum nor weight decay act in it, and training goes on."""
    trainer, by_step = run(make_trainer, fault, range(10, 12), **optimizer)
    assert trainer.state.global_step == 24
    assert same_weights(by_step.weights[9], by_step.weights[11])
    assert not same_weights(by_step.weights[11], by_step.weights[12])


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}], ids=str)
def test_the_run_is_the_one_without_exactly_these_updates(
    make_trainer: MakeTrainer, tmp_path: Path, options: dict[str, Any]
) -> None:
    trainer, _ = run(make_trainer, NaNBatch, range(10, 12), **options)
    by_hand = make_trainer(
        tmp_path / "by hand", callbacks=[WithoutUpdates(range(10, 12))], max_steps=24, **options
    )
    by_hand.train()
    assert same_weights(weights(trainer.model), weights(by_hand.model))


def test_without_the_option_the_update_is_made(make_trainer: MakeTrainer) -> None:
    _, by_step = run(make_trainer, NaNBatch, range(10, 11), divguard_skip_nonfinite=False, action="warn")
    assert all(torch.isnan(each).any() for each in by_step.weights[10].values())


def test_without_a_detector_nothing_is_skipped(make_trainer: MakeTrainer) -> None:
    model, by_step = tiny_model(), WeightsByStep()
    make_trainer(model=model, callbacks=[NaNBatch(model, range(10, 11)), by_step], max_steps=12).train()
    assert torch.isnan(by_step.weights[10]["transformer.wte.weight"]).any()


@pytest.mark.parametrize("action", ["stop", "abort", "rollback"])
def test_a_skipped_update_is_a_warning_with_an_event_and_nothing_is_undone(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture, action: str
) -> None:
    detector = AdaptiveDivergenceDetector(action=action)
    trainer, _ = run(make_trainer, NaNBatch, range(10, 12), detector=detector)
    assert trainer.state.global_step == 24
    (finding,) = [each for each in detector.findings if each.kind == "non_finite"]
    assert (finding.severity, finding.onset_step) == ("warning", 10)
    assert "so the weights are unharmed" in finding.message
    assert moves(trainer) == []
    skipped = [(event["event"], event["step"], event["in_a_row"]) for event in trainer.divguard_events]
    assert skipped == [("update_skipped", 10, 1), ("update_skipped", 11, 2)]
    assert our_log.text.count("The update of step 10 was skipped") == 1


@pytest.mark.parametrize(("steps", "found_at"), [(range(10, 15), 13), (range(10, 13), None)], ids=["4", "3"])
def test_more_than_so_many_in_a_row_are_an_error(
    make_trainer: MakeTrainer, tmp_path: Path, steps: range, found_at: int | None
) -> None:
    options = {"divguard_max_skipped_in_a_row": 3, "divguard_check_steps": 1}
    trainer, _ = run(make_trainer, NaNBatch, steps, **options)
    finding = trainer.state.divguard_finding
    assert (finding.step if finding else None) == found_at
    assert trainer.state.global_step == (found_at or 24)
    # No update was made, so what is saved at the end is good.
    assert all(info.verdict.status == "complete" for info in find_checkpoints(tmp_path / "out"))


def test_weights_that_are_not_finite_are_an_error_at_once(make_trainer: MakeTrainer) -> None:
    """To leave out updates does not help them."""

    class NaNWeight(TrainerCallback):
        def __init__(self, model: Any, steps: range) -> None:
            self.steps = steps

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 in self.steps:
                with torch.no_grad():
                    next(kwargs["model"].parameters()).view(-1)[0] = math.nan

    trainer, by_step = run(make_trainer, NaNWeight, range(10, 11), action="rollback", **QUICK)
    assert moves(trainer) == [(10, 8)]
    assert all(torch.isfinite(each).all() for each in by_step.weights[24].values())


def test_a_fault_without_end_ends_the_run(make_trainer: MakeTrainer) -> None:
    with pytest.raises(TrainingDivergedError):
        run(make_trainer, NaNBatch, range(10, 1000), action="rollback", **{**QUICK, "max_steps": 200})


def test_the_count_of_updates_in_a_row_survives_a_resume(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    options = {"divguard_max_skipped_in_a_row": 6, "divguard_check_steps": 1}
    run(make_trainer, NaNBatch, range(9, 13), max_steps=12, **options)
    model = tiny_model()
    detector = NonFiniteDetector()
    trainer = make_trainer(
        model=model, callbacks=[NaNBatch(model, range(9, 100)), detector], max_steps=24, **options
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-12"))
    assert trainer.state.divguard_finding.step == 15
    skipped = [event["step"] for event in trainer.divguard_events if event["event"] == "update_skipped"]
    assert skipped == [9, 10, 11, 12, 13, 14]


def test_on_a_device_that_the_host_does_not_wait_for_gradients_become_zero(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``logging_nan_inf_filter=False`` on a GPU; momentum and weight decay act as in any step."""
    monkeypatch.setattr(skipping.NonFiniteUpdates, "_host_sees_the_flag", lambda self, flag: False)
    trainer, by_step = run(make_trainer, NaNGradient, range(10, 11), optim="sgd")
    assert trainer.state.global_step == 24
    assert same_weights(by_step.weights[9], by_step.weights[10])
    assert [event["step"] for event in trainer.divguard_events] == [10]


def test_a_gradient_scaler_decides_for_itself(make_trainer: MakeTrainer) -> None:
    """It leaves out the update, and lowers its scale."""
    model, by_step = tiny_model(), WeightsByStep()
    trainer = make_trainer(
        model=model, callbacks=[NaNBatch(model, range(10, 11)), by_step, NonFiniteDetector()], max_steps=24
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    trainer.accelerator.scaler = scaler
    trainer.accelerator.native_amp = True
    trainer.train()
    assert trainer.state.global_step == 24
    assert scaler.get_scale() == 32.0
    assert all(torch.isfinite(each).all() for each in by_step.weights[24].values())
