"""A sharded run that is resumed on another number of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.hf.engines.launch import become_the_only_rank
from tests.hf.engines.sharded_models import sharded_llama
from tests.hf.engines.trainers import losses, make_trainer

STOP = 8
OUT = "out"


def train(rank: int, folder: str, engine: str, resumes: bool = False) -> dict[str, Any]:
    """Train to the step of the checkpoint, or resume from it, evaluate at once, and train on.

    Args:
        rank: This rank.
        folder: Gets the folder of the run.
        engine: What the run trains under.
        resumes: Whether it resumes.
    """
    model = None
    if "RANK" not in os.environ and engine == "distributed-config":
        engine, model = "ddp", sharded_llama(Path(folder, OUT))  # one process has the model as a whole
    elif "RANK" not in os.environ:
        become_the_only_rank()
    options: dict[str, Any] = {
        "max_steps": 2 * STOP if resumes else STOP,
        "logging_steps": 1,
        "save_steps": STOP,
        "eval_strategy": "steps",
        "eval_steps": STOP,
        "eval_on_start": resumes,
        "learning_rate": 3e-3,
    }
    trainer = make_trainer(engine, Path(folder, OUT), model=model, **options)
    trainer.train(resume_from_checkpoint="latest" if resumes else None)
    history = trainer.state.log_history
    return {
        "evaluated": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "losses": losses(trainer),
        "step": trainer.state.global_step,
        "updates": [int(each["step"]) for each in trainer.optimizer.state_dict()["state"].values()],
    }
