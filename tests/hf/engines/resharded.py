"""A run under FSDP2 that is resumed on another number of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.hf.engines.runs import losses, make_trainer
from tests.processes import free_port

STOP = 8


def train(rank: int, folder: str, engine: str, resumes: bool = False, alone: bool = False) -> dict[str, Any]:
    """Train to the step of the checkpoint, or resume from it, evaluate at once, and train on.

    Args:
        rank: This rank.
        folder: The run folder.
        engine: What the run trains under.
        resumes: Whether it resumes.
        alone: Whether it is the only rank of a run that is distributed all the same.
    """
    if alone:
        port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", **port)
    options: dict[str, Any] = {
        "max_steps": 2 * STOP if resumes else STOP,
        "logging_steps": 1,
        "save_steps": STOP,
    }
    options |= {"eval_strategy": "steps", "eval_steps": STOP, "eval_on_start": resumes, "learning_rate": 3e-3}
    trainer = make_trainer(engine, folder, **options)
    trainer.train(resume_from_checkpoint=str(Path(folder, f"checkpoint-{STOP}")) if resumes else None)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"evaluated": evaluated, "losses": losses(trainer), "step": trainer.state.global_step}
