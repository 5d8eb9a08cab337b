"""What each feature promises, on any kind of trainer: one function for each, run in one process or on every rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_divguard import find_checkpoints
from tests.matrix.kinds import KINDS, Kind, make
from tests.tiny import checkpoint_steps, same_weights, weights

STEPS = 8
BAD_STEP = 5


class BreakAt(TrainerCallback):
    """Makes the weights of a layer NaN, or its gradients: of one step, or of all that follow."""

    def __init__(self, what: str, *, steps: int = 1) -> None:
        self.what, self.steps = what, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step != BAD_STEP - 1:
            return
        weight = next(each for each in model.parameters() if each.requires_grad)
        if self.what == "weights":
            weight.data.fill_(float("nan"))
        else:
            last = BAD_STEP + self.steps - 1
            weight.register_hook(
                lambda gradient: gradient * float("nan") if state.global_step < last else None
            )


class StopAt(TrainerCallback):
    """Ends training in the middle."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 4


def all_finite(model: Any) -> bool:
    return all(bool(torch.isfinite(each).all()) for each in model.parameters())


BEST = {"eval_on_save": True, "preserve_best_model": True}
GUARDS = {**BEST, "divguard_detector": "adaptive"}


def healthy_run_is_the_stock_one(kind: Kind, folder: Path) -> str:
    """All guards on, nothing found: the weights of the stock trainer to the last bit."""
    stock = make(kind, folder / "stock", is_guarded=False, max_steps=STEPS, eval_strategy="steps")
    stock.train()
    guarded = make(kind, folder / "out", max_steps=STEPS, divguard_action="rollback", **GUARDS)
    guarded.train()
    assert same_weights(weights(stock.model), weights(guarded.model))
    assert guarded.state.divguard_finding is None
    return "same weights"


def best_checkpoints_stay(kind: Kind, folder: Path) -> str:
    """The last one and the best two stay, each evaluated at its own step."""
    trainer = make(kind, folder / "out", max_steps=STEPS, save_total_limit=1, preserve_n_best=2, **BEST)
    trainer.train()
    best = {each.step for each in trainer.best_checkpoints()}
    assert len(best) == 2
    assert checkpoint_steps(folder / "out") == best | {STEPS}
    assert all(math.isfinite(each.metric) for each in trainer.best_checkpoints())
    assert {each.verdict.status for each in find_checkpoints(folder / "out")} == {"complete"}
    return "last and best two"


def stops_at_nan(kind: Kind, folder: Path) -> str:
    """NaN in the weights, or in gradients again and again: training ends, the last good checkpoint is from before."""
    trainer = make(
        kind,
        folder / "out",
        callbacks=[BreakAt(kind.fault, steps=STEPS)],
        max_steps=STEPS,
        divguard_action="stop",
        divguard_max_skipped_in_a_row=1,
        divguard_check_steps=1,
        **GUARDS,
    )
    trainer.train()
    assert trainer.state.divguard_finding is not None
    assert trainer.state.global_step < STEPS
    assert Path(trainer.load_last_good()).name in ("checkpoint-2", "checkpoint-4")
    return f"stopped at step {trainer.state.global_step}"


def rolls_back_and_finishes(kind: Kind, folder: Path) -> str:
    """NaN in the weights: rolled back, and trained to the end; a NaN gradient never reaches the weights."""
    trainer = make(
        kind,
        folder / "out",
        callbacks=[BreakAt(kind.fault)],
        max_steps=STEPS,
        divguard_action="rollback",
        **GUARDS,
    )
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert all_finite(trainer.model)
    wanted = "rollback" if kind.fault == "weights" else "update_skipped"
    assert [event["event"] for event in trainer.divguard_events].count(wanted) == 1
    return wanted


def resumes(kind: Kind, folder: Path) -> str:
    """Interrupted and resumed: it ends as a run without the interruption."""
    whole = make(kind, folder / "whole", max_steps=STEPS, **GUARDS)
    whole.train()
    make(kind, folder / "out", callbacks=[StopAt()], max_steps=STEPS, **GUARDS).train()
    resumed = make(kind, folder / "out", max_steps=STEPS, **GUARDS)
    resumed.train(resume_from_checkpoint="latest")
    assert resumed.state.global_step == STEPS
    if kind.resumes_exactly:
        assert same_weights(weights(whole.model), weights(resumed.model))
        return "same weights"
    return "finished"


FEATURES = {
    "healthy run is the stock one": healthy_run_is_the_stock_one,
    "best N, evaluation on save": best_checkpoints_stay,
    "stop": stops_at_nan,
    "rollback": rolls_back_and_finishes,
    "resume": resumes,
}


def on_rank(rank: int, kind: str, feature: str, folder: str) -> str:
    """Run one cell of the table on one rank."""
    return FEATURES[feature](KINDS[kind], Path(folder))
