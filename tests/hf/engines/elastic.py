"""A training script that a launcher starts, and starts again after a kill: ``python -m tests.hf.engines.elastic``.

With ``--engine=launched-fsdp2`` and such it does not say what it trains under: that comes from the launcher's file.

It has one line for that: ``resume_from_checkpoint="auto"``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.hf.engines import trainers
from tests.hf.scenarios import write_the_model_on_each_node
from tests.processes import kill_self, let_ranks_resume_on_cpu


class KillOnce(TrainerCallback):
    """Kills this process once, at the end of a step; a file notes that it was done."""

    def __init__(self, step: int, mark: Path) -> None:
        self.step, self.mark = step, mark

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Kill it, unless it was killed before."""
        if state.global_step == self.step and not self.mark.exists():
            self.mark.touch()
            kill_self()


def main() -> None:
    """Train; be killed at ``--kill_at`` on ``--kill_rank``; write how it ended on each rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill_at", type=int, default=0)
    parser.add_argument("--kill_rank", type=int, default=1)
    parser.add_argument("--own_folders", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--nan_at", type=int, default=0)
    parser.add_argument("--engine", default="ddp")
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    let_ranks_resume_on_cpu()
    own: dict[str, Any] = {}
    output = options.folder / "out"
    if options.own_folders:
        write_the_model_on_each_node()
        output, own = options.folder / f"node{os.environ['GROUP_RANK']}" / "out", {"save_on_each_node": True}
    how = {"max_steps": 12, "save_steps": 3, "logging_steps": 1, "eval_on_save": True, "save_total_limit": 2}
    fault = range(options.nan_at, options.nan_at + 1) if options.nan_at else range(0)
    trainer = trainers.make_trainer(options.engine, output, fault=fault, bf16=options.bf16, **how, **own)
    if options.kill_at and rank == options.kill_rank:
        trainer.add_callback(KillOnce(options.kill_at, options.folder / "killed"))
    trainer.train(resume_from_checkpoint="auto")
    ended = {
        "weights": trainers.digest(trainer),
        "step": trainer.state.global_step,
        "restarts": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
        "losses": trainers.losses(trainer),
        "rollbacks": [
            [event["step"], event["target_step"]]
            for event in trainer.divguard_events
            if event["event"] == "rollback"
        ],
    }
    (options.folder / f"rank{rank}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
