"""The guards on a graphics card: half precision, compiled models, waits for the device, memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments
from tests.matrix.features import BreakAt, all_finite
from tests.tiny import RandomRows, TokenRows, base_arguments, gpt2, same_weights, tiny_model, weights

pytestmark = pytest.mark.filterwarnings("ignore")

ON_CARD = torch.cuda.is_available()
GUARDS = {"divguard_detector": "adaptive", "divguard_action": "rollback", "eval_on_save": True}


def make(
    output_dir: Path, *, is_guarded: bool = True, callbacks: Any = None, model: Any = None, **options: Any
) -> Any:
    """Return a trainer of a tiny model on the card."""
    arguments_class = DivGuardTrainingArguments if is_guarded else TrainingArguments
    args = arguments_class(**{**base_arguments(output_dir), "use_cpu": not ON_CARD, **options})
    return (DivGuardTrainer if is_guarded else Trainer)(
        model=model if model is not None else tiny_model(),
        args=args,
        train_dataset=TokenRows(),
        eval_dataset=TokenRows(rows=8, seed=1),
        callbacks=callbacks,
    )


# ---- half precision


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.cuda_only)])
def test_a_healthy_run_in_half_precision_is_the_stock_one(tmp_path: Path, precision: str) -> None:
    options = {precision: True, "max_steps": 12, "eval_strategy": "steps", "eval_steps": 2}
    stock = make(tmp_path / "stock", is_guarded=False, **options)
    stock.train()
    guarded = make(tmp_path / "out", **options, **GUARDS)
    guarded.train()
    assert guarded.state.divguard_finding is None
    assert same_weights(weights(stock.model), weights(guarded.model))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.cuda_only)])
def test_nan_in_half_precision_is_rolled_back(tmp_path: Path, precision: str) -> None:
    trainer = make(tmp_path, callbacks=[BreakAt("weights")], max_steps=12, **{precision: True}, **GUARDS)
    trainer.train()
    assert [event["event"] for event in trainer.divguard_events].count("rollback") == 1
    assert trainer.state.global_step == 12
    assert all_finite(trainer.model)


class Scale(TrainerCallback):
    """Notes the scale of the gradient scaler after each step."""

    def __init__(self) -> None:
        self.scales: list[float] = []
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scales.append(float(self.trainer.accelerator.scaler.get_scale()))


@pytest.mark.cuda_only
def test_a_gradient_scaler_that_looks_for_its_scale_is_no_finding(tmp_path: Path) -> None:
    scale = Scale()
    trainer = scale.trainer = make(tmp_path, callbacks=[scale], fp16=True, max_steps=12, **GUARDS)
    trainer.create_accelerator_and_postprocess() if trainer.accelerator.scaler is None else None
    trainer.accelerator.scaler._init_scale = 2.0**40  # so large that the first steps overflow
    trainer.train()
    assert scale.scales[0] > scale.scales[-1]
    assert trainer.state.divguard_finding is None
    assert not [event for event in trainer.divguard_events if event["event"] == "rollback"]


# ---- compiled models


def test_a_compiled_model_is_rolled_back(tmp_path: Path) -> None:
    trainer = make(tmp_path, callbacks=[BreakAt("weights")], torch_compile=True, max_steps=12, **GUARDS)
    trainer.train()
    assert [event["event"] for event in trainer.divguard_events].count("rollback") == 1
    assert all_finite(trainer.model)


# ---- waits for the device


def waits_of(trainer: Any) -> int:
    """Return how often the host waits for the device in a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


@pytest.mark.cuda_only
def test_the_host_waits_for_the_device_once_a_check_more_than_the_stock_trainer(tmp_path: Path) -> None:
    steps, check_steps = 60, 10
    options = {"max_steps": steps, "logging_steps": steps, "save_strategy": "no"}
    stock = waits_of(make(tmp_path / "stock", is_guarded=False, **options))
    watched = {
        "divguard_detector": "adaptive",
        "divguard_compare": "off",
        "divguard_check_steps": check_steps,
    }
    guarded = waits_of(make(tmp_path / "out", **options, **watched))
    assert stock > 0, "The mode that counts waits must count those of the stock trainer."
    assert guarded - stock <= 2 * steps // check_steps


# ---- memory


def large_model() -> Any:
    return gpt2(vocabulary=512, length=64, width=256, layers=6, heads=4)


def run_large(folder: Path, **options: Any) -> tuple[Any, int]:
    """Train a model of some million parameters; return the trainer and the peak of memory on the card."""
    args = DivGuardTrainingArguments(
        **{
            **base_arguments(folder),
            "use_cpu": not ON_CARD,
            "max_steps": 12,
            "learning_rate": 1e-4,
            **options,
        }
    )
    rows = RandomRows(32, 64, vocabulary=512)
    trainer = DivGuardTrainer(
        model=large_model(), args=args, train_dataset=rows, eval_dataset=rows, callbacks=[BreakAt("weights")]
    )
    if ON_CARD:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return trainer, torch.cuda.max_memory_allocated() if ON_CARD else 0


@pytest.mark.cuda_only
def test_a_rollback_takes_less_memory_on_the_card_than_the_weights(tmp_path: Path) -> None:
    _, without = run_large(tmp_path / "stock")
    trainer, with_rollback = run_large(tmp_path / "out", **GUARDS)
    assert [event["event"] for event in trainer.divguard_events].count("rollback") == 1
    size = sum(weight.numel() * weight.element_size() for weight in trainer.model.parameters())
    assert with_rollback - without < size


def test_snapshots_are_in_the_memory_of_the_host(tmp_path: Path) -> None:
    trainer, _ = run_large(
        tmp_path, divguard_snapshot_steps=2, save_strategy="no", **{**GUARDS, "eval_on_save": False}
    )
    assert [event["target"] for event in trainer.divguard_events if event["event"] == "rollback"] == [
        "memory"
    ]
    assert all_finite(trainer.model)
