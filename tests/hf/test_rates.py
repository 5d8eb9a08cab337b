"""The learning rate after a rollback: what a cut lowers, and what the logs say of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from hf_divguard import NonFiniteDetector
from tests.hf.faults import NaNBatch, RatesUsed
from tests.tiny import tiny_model

MakeTrainer = Callable[..., Any]

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 24, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, 5, eta_min=1e-3
    ),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5),
            lr_scheduler.CosineAnnealingLR(optimizer, 19, eta_min=1e-3),
        ],
        [5],
    ),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=30),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, 5, cycle_momentum=False),
}


def run(make_trainer: MakeTrainer, fault: range, schedule: str | None = None, **options: Any) -> Any:
    """Return a trainer whose loss is NaN in ``fault``, and the rates that it will have used."""
    model, used = tiny_model(), RatesUsed()
    trainer = make_trainer(
        options.pop("folder", None),
        model=model,
        callbacks=[NaNBatch(model, fault), NonFiniteDetector(action="rollback"), used],
        max_steps=24,
        save_steps=4,
        divguard_check_steps=1,
        divguard_cooldown_steps=4,
        divguard_skip_nonfinite=False,
        **options,
    )
    if schedule is not None:
        trainer.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        trainer.lr_scheduler = SCHEDULES[schedule](trainer.optimizer)
    return trainer, used


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_cut_lowers_the_whole_schedule_down_to_its_floor_and_over_a_resume(
    make_trainer: MakeTrainer, tmp_path: Path, schedule: str
) -> None:
    """From the rollback on every update has half the rate that the schedule would have given it."""
    healthy, whole = run(make_trainer, range(0), schedule, folder=tmp_path / "healthy")
    healthy.train()
    trainer, used = run(make_trainer, range(10, 11), schedule, divguard_rollback_lr_factor=0.5)
    trainer.train()
    assert len(trainer.divguard_events) == 1
    expected = {step: rate * (0.5 if step > 10 else 1.0) for step, rate in whole.rates.items()}
    assert used.rates == pytest.approx(expected)
    resumed, again = run(make_trainer, range(0), schedule, divguard_rollback_lr_factor=0.5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-16"))
    assert again.rates == pytest.approx({step: expected[step] for step in range(17, 25)})


def test_while_the_rate_rises_again_the_logs_say_what_was_used(make_trainer: MakeTrainer) -> None:
    """The schedule goes on unseen; the event says where it is."""
    trainer, used = run(
        make_trainer, range(10, 11), lr_scheduler_type="constant", divguard_rewarm_steps=4, learning_rate=0.01
    )
    trainer.train()
    logged = {
        entry["step"]: entry["learning_rate"]
        for entry in trainer.state.log_history
        if "learning_rate" in entry
    }
    assert [logged[step] for step in range(11, 16)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert logged == pytest.approx({step: used.rates[step] for step in logged})
    (told,) = [entry for entry in trainer.state.log_history if "divguard/learning_rate" in entry]
    assert told["divguard/learning_rate"] == pytest.approx(0.0025)
    assert trainer.divguard_events[0]["learning_rate_after"] == pytest.approx(0.01)
