"""Six faults that last a few steps, each in a run under an engine of its own, and the healthy run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.hf.engines.runs import GUARDS, digest, make_trainer
from tests.hf.faults import HighRate, NaNBatch
from tests.tiny import TokenRows, tiny_model

STEPS = 120
FIRST = 71


class OnParts(TrainerCallback):
    """Does something to this rank's part of each weight or gradient in some steps."""

    def __init__(self, steps: range, change: Callable[[torch.Tensor], object], *, gradients: bool) -> None:
        self.steps, self.change, self.gradients = steps, change, gradients

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Change weights before the forward pass."""
        if not self.gradients and state.global_step + 1 in self.steps:
            self._change([weight.detach() for weight in kwargs["model"].parameters()])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Change gradients before the update, after they were clipped."""
        if self.gradients and state.global_step + 1 in self.steps:
            self._change([weight.grad for weight in kwargs["model"].parameters() if weight.grad is not None])

    def _change(self, tensors: list[Any]) -> None:
        with torch.no_grad():
            for tensor in tensors:
                self.change(tensor.to_local() if hasattr(tensor, "to_local") else tensor)


def faults() -> dict[str, list[Any]]:
    """Return the callbacks of each fault, and none for the healthy run."""
    few, one = range(FIRST, FIRST + 4), range(FIRST, FIRST + 1)

    def add_noise(part: torch.Tensor) -> None:
        part += torch.randn(part.shape, generator=torch.Generator().manual_seed(1))

    return {
        "healthy": [],
        "rate x100": [HighRate(few, 100.0)],
        "rate x30": [HighRate(few, 30.0)],
        "noise on the weights": [OnParts(one, add_noise, gradients=False)],
        "weights x3": [OnParts(one, lambda part: part.mul_(3.0), gradients=False)],
        "weights lost": [OnParts(one, lambda part: part.zero_(), gradients=False)],
        "gradients of the wrong sign": [
            HighRate(few, 30.0),
            OnParts(few, lambda part: part.neg_(), gradients=True),
        ],
        "NaN": [],
    }


def train(rank: int, folder: str, engine: str) -> dict[str, Any]:
    """Train through each fault; return evaluation loss, digest and rollbacks of each run."""
    results = {}
    for name, callbacks in faults().items():
        model = tiny_model()
        watching = [NaNBatch(model, range(FIRST, FIRST + 3))] if name == "NaN" else callbacks
        options: dict[str, Any] = {
            "max_steps": STEPS,
            "save_steps": 20,
            "logging_steps": 10,
            "learning_rate": 1e-3,
        }
        options |= {**GUARDS, "eval_on_save": False, "preserve_best_model": False}
        options["divguard_skip_nonfinite"] = True
        trainer = make_trainer(engine, Path(folder, name), model=model, callbacks=tuple(watching), **options)
        trainer.train_dataset = TokenRows(rows=64)
        trainer.train()
        events = [(event["event"], event["step"]) for event in trainer.divguard_events]
        loss = trainer.evaluate()["eval_loss"]
        results[name] = {"loss": loss, "digest": digest(trainer), "events": events}
    return results
