"""Trains tiny models, healthy and faulty, stock and guarded, and leaves their runs in the folder given."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments, TrainingDivergedError
from tests.tiny import TokenRows, base_arguments, tiny_model

torch.set_num_threads(1)


class BreakWeights(TrainerCallback):
    """Makes the weights NaN before a step, once, or before every step from it on."""

    def __init__(self, step: int, *, stays: bool = False) -> None:
        self.step, self.stays = step, stays

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Break the weights."""
        next_step = state.global_step + 1
        if next_step == self.step or (self.stays and next_step > self.step):
            next(model.parameters()).data.fill_(float("nan"))


class EndAt(TrainerCallback):
    """Ends the process in the middle of training, as a kill does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise at the step."""
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(folder: Path, *callbacks: TrainerCallback, guarded: bool, **options: Any) -> None:
    """Train a tiny model in ``folder``; save the Trainer's state at the end."""
    arguments, trainer = (
        (DivGuardTrainingArguments, DivGuardTrainer) if guarded else (TrainingArguments, Trainer)
    )
    defaults: dict[str, Any] = {"max_steps": 24, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    args = arguments(**base_arguments(folder, **defaults | options))
    run = trainer(
        model=tiny_model(),
        args=args,
        train_dataset=TokenRows(),
        eval_dataset=TokenRows(rows=8, seed=1),
        callbacks=list(callbacks),
    )
    with contextlib.suppress(KeyboardInterrupt, TrainingDivergedError):
        run.train()
        run.save_state()


def main(root: Path) -> None:
    """Make all runs."""
    checks = {"divguard_detector": "adaptive", "divguard_check_steps": 1}
    train(root / "healthy", guarded=True, eval_on_save=True, **checks)
    train(root / "stopped", BreakWeights(14), guarded=True, **checks)
    train(
        root / "rolled",
        BreakWeights(14),
        guarded=True,
        divguard_action="rollback",
        divguard_cooldown_steps=2,
        **checks,
    )
    train(
        root / "given_up",
        BreakWeights(14, stays=True),
        guarded=True,
        divguard_action="rollback",
        divguard_max_rollbacks=1,
        divguard_cooldown_steps=0,
        **checks,
    )
    train(root / "killed", EndAt(18), guarded=True, **checks)
    train(root / "stock", guarded=False)
    train(root / "stock_nan", BreakWeights(14), guarded=False, logging_nan_inf_filter=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
