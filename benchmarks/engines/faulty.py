"""One rank of a run under an engine: healthy, through a fault that lasts a few steps, or as an oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_divguard import DivGuardTrainingArguments
from tests.hf.engines.trainers import live_parts, make_trainer, new_model
from tests.hf.faults import HighRate, NaNBatch
from tests.tiny import VOCABULARY, TokenRows

STEPS = 140
SAVE_EVERY = 10
LASTS = 4
ORACLE_OF = {
    "learning rate x 100": "without the updates",
    "updates x 30 in the wrong direction": "without the updates",
    "NaN in the forward pass": "without the updates",
    "noise on all weights": "healthy",
    "all weights x 3": "healthy",
    "all weights lost": "healthy",
}
"""The six faults; with each the run that is what a guard can reach at best."""


class NoisyRows(TokenRows):
    """Rows that count upwards, with one token of four drawn at random: no model can get below some loss."""

    def __init__(self, rows: int, seed: int) -> None:
        super().__init__(rows, seed)
        lot = torch.Generator().manual_seed(seed + 1)
        drawn = torch.randint(0, VOCABULARY, self.rows.shape, generator=lot)
        self.rows = torch.where(torch.rand(self.rows.shape, generator=lot) < 0.25, drawn, self.rows)


class OnWeights(TrainerCallback):
    """Changes this rank's part of every weight once, before a step."""

    trainer: Any = None

    def __init__(self, step: int, change: Callable[[torch.Tensor, torch.Generator], object]) -> None:
        self.step, self.change = step, change

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Change them."""
        if state.global_step + 1 == self.step:
            lot = torch.Generator().manual_seed(args.process_index)
            with torch.no_grad():
                for part in live_parts(self.trainer):
                    self.change(part, lot)


def first_bad_step(seed: int) -> int:
    """Return the step in which the faults begin: another place between two saves for each seed."""
    return 75 + 7 * seed % SAVE_EVERY


def add_noise(part: torch.Tensor, lot: torch.Generator) -> None:
    """Add noise that is larger than the weights."""
    part += torch.randn(part.shape, generator=lot)


def causes(name: str, seed: int, model: torch.nn.Module) -> list[TrainerCallback]:
    """Return the callbacks that make the run what its name says."""
    first = first_bad_step(seed)
    few = range(first, first + LASTS)
    made: dict[str, Callable[[], TrainerCallback]] = {
        "without the updates": lambda: HighRate(few, 0.0),
        "learning rate x 100": lambda: HighRate(few, 100.0),
        "updates x 30 in the wrong direction": lambda: HighRate(few, -30.0),
        "NaN in the forward pass": lambda: NaNBatch(model, few),
        "noise on all weights": lambda: OnWeights(first, add_noise),
        "all weights x 3": lambda: OnWeights(first, lambda part, lot: part.mul_(3.0)),
        "all weights lost": lambda: OnWeights(first, lambda part, lot: part.zero_()),
    }
    return [made[name]()] if name in made else []


def guarded(engine: str, folder: Path, name: str, seed: int) -> Any:
    """Return the trainer of a run, with all other options of the guard at their defaults."""
    model = new_model(engine, folder)
    how: dict[str, Any] = {
        "seed": seed,
        "max_steps": STEPS,
        "save_steps": SAVE_EVERY,
        "save_total_limit": 3,
        "logging_steps": 10,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 128,
        "divguard_detector": "adaptive",
        "divguard_action": "rollback",
    }
    for option in ("divguard_check_steps", "divguard_cooldown_steps", "divguard_skip_nonfinite"):
        how[option] = DivGuardTrainingArguments.__dataclass_fields__[option].default
    trainer = make_trainer(
        engine, folder / name, model=model, callbacks=tuple(causes(name, seed, model)), **how
    )
    trainer.train_dataset = NoisyRows(4096, seed)
    trainer.eval_dataset = NoisyRows(512, 10_000)
    return trainer


def train(rank: int, folder: str, engine: str, seed: int) -> dict[str, Any]:
    """Train the healthy run, the oracle and one run for each fault; return how each ended on this rank."""
    results = {}
    for name in ("healthy", "without the updates", *ORACLE_OF):
        trainer, error = guarded(engine, Path(folder), name, seed), ""
        try:
            trainer.train()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"[:300]
        events = trainer.divguard_events
        results[name] = {
            "loss": float("nan") if error else trainer.evaluate()["eval_loss"],
            "error": error,
            "events": [[event["event"], event["step"], event.get("target_step")] for event in events],
        }
    return results
