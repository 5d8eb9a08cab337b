"""Runs that get a signal: what the processes of ``test_signals.py`` do."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.hf import scenarios
from tests.tiny import weights


class Send(TrainerCallback):
    """Sends this process a signal in the middle of a step, as if it came from outside."""

    def __init__(self, name: str, at_step: int, event: str = "on_step_begin") -> None:
        self._signal, self._at_step = getattr(signal, name), at_step
        setattr(self, event, self._send)

    def _send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._at_step:
            os.kill(os.getpid(), self._signal)


def train(
    rank: int,
    output_dir: str,
    name: str = "SIGTERM",
    at_step: int = 0,
    on_rank: int = 0,
    event: str = "on_step_begin",
    **options: Any,
) -> dict[str, Any]:
    """Train; the signal ``name`` comes during step ``at_step``, if that is not 0."""
    callbacks = [Send(name, at_step, event)] if at_step and rank == on_rank else []
    options.setdefault("divguard_save_on_signal", "SIGTERM,SIGUSR1")
    resume = options.pop("resume", None)
    trainer = scenarios.trainer_of(output_dir, callbacks=callbacks, **options)
    trainer.train(resume_from_checkpoint=resume)
    values = {key: value.double().sum().item() for key, value in weights(trainer.model).items()}
    clocks = ("_runtime", "_per_second")
    history = [
        {key: value for key, value in entry.items() if not key.endswith(clocks)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    return {"step": trainer.state.global_step, "weights": values, "history": history}


class SayStep(TrainerCallback):
    """Says which step has begun, and takes its time."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        import time

        Path(f"{args.output_dir}-step-{state.global_step}-{args.process_index}").write_text(str(os.getpid()))
        time.sleep(0.1)


def main(output_dir: str, resume: str, max_steps: str) -> None:
    """Be a script that a scheduler starts."""
    options = {"divguard_save_on_signal": "SIGTERM,SIGUSR1", "max_steps": int(max_steps), "save_steps": 1000}
    trainer = scenarios.trainer_of(output_dir, callbacks=[SayStep()], **options)
    trainer.train(resume_from_checkpoint=resume == "resume")


if __name__ == "__main__":
    main(*sys.argv[1:])
