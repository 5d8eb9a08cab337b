"""Runs whose record is looked at: what the processes of ``test_events.py`` do."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from hf_divguard import NonFiniteDetector
from tests.hf import scenarios, signalled
from tests.hf.faults import QUICK, NaNBatch
from tests.tiny import tiny_model


def interrupted(rank: int, output_dir: str) -> None:
    """Train until a signal comes in the third step; there is no detector."""
    options = {"divguard_save_on_signal": "SIGTERM", "save_steps": 100}
    scenarios.trainer_of(output_dir, callbacks=[signalled.Send("SIGTERM", 3)], **options).train()


def resumed(rank: int, output_dir: str) -> dict[str, Any]:
    """Resume the same run to its end."""
    options = {"divguard_save_on_signal": "SIGTERM", "save_steps": 100}
    trainer = scenarios.trainer_of(output_dir, **options)
    trainer.train(resume_from_checkpoint="latest")
    return {"events": trainer.divguard_events}


def found_on_rank_one(rank: int, output_dir: str) -> dict[str, Any]:
    """Train; the metric of rank 1 alone is NaN at step 4."""
    trainer = scenarios.trainer_of(
        output_dir,
        callbacks=[NonFiniteDetector(action="stop", metric_key="eval_score")],
        eval_strategy="steps",
        eval_steps=2,
        compute_metrics=lambda prediction: {
            "score": np.nan if rank == 1 and trainer.state.global_step == 4 else 1.0
        },
    )
    trainer.train()
    return {"events": trainer.divguard_events}


def diverged(rank: int, output_dir: str, action: str, code: int | None = None, **more: Any) -> dict[str, Any]:
    """Train with a loss that is NaN from the seventh step on; rollbacks do not help."""
    model = tiny_model()
    options = {**QUICK, "divguard_skip_nonfinite": False, "divguard_max_rollbacks": 1, **more}
    trainer = scenarios.trainer_of(
        output_dir,
        model=model,
        callbacks=[NaNBatch(model, range(7, 25)), NonFiniteDetector(action=action)],
        eval_on_save=False,
        divguard_exit_code=code,
        **options,
    )
    trainer.train()
    return {"step": trainer.state.global_step}


def alerting(rank: int, output_dir: str, url: str, action: str) -> dict[str, Any]:
    """Train as :func:`diverged` does, with alerts to ``url``."""
    os.environ["DIVGUARD_WEBHOOK_URL"] = url
    return diverged(rank, output_dir, action, 79, divguard_alerts="webhook")
