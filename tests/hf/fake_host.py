"""A host without a trainer: enough of one to roll a linear model back and to save it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState

from hf_divguard import DivGuardTrainingArguments
from hf_divguard.hf.host import Host, SaveInProgress
from hf_divguard.storage.names import checkpoint_name


class FakeHost(Host):
    """Trains a linear model step by step, as a test says.

    Args:
        output_dir: Folder that gets the checkpoints.
        options: Options of the arguments.
    """

    state: Any = None
    control: Any = None
    args: Any = None
    model: Any = None
    optimizer: Any = None
    scheduler: Any = None
    callbacks: Any = None
    scaler = None
    scales_losses = False
    trainer = None
    distributed_type = "NO"
    last_logged_step = 0
    total_loss = 0.0

    def __init__(self, output_dir: Path, **options: Any) -> None:
        self.args = DivGuardTrainingArguments(
            str(output_dir), use_cpu=True, report_to="none", save_steps=1, **options
        )
        self.state, self.control, self.callbacks = TrainerState(max_steps=100), TrainerControl(), []
        self.model = torch.nn.Linear(2, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        self.logs: list[dict[str, float]] = []
        self.rotations = 0
        self._stand_in: str | None = None

    def train_step(self) -> None:
        """Take one optimizer step on random data."""
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 2)).square().mean().backward()
        self.optimizer.step()
        self.state.global_step += 1

    def write(self) -> None:
        """Save as the Trainer does: weights, optimizer, schedule, random state, trainer state."""
        folder = Path(self._stand_in or self.args.output_dir, checkpoint_name(self.state.global_step))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), folder / "pytorch_model.bin")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        torch.save(self.scheduler.state_dict(), folder / "scheduler.pt")
        torch.save({}, folder / "rng_state.pth")
        self.state.save_to_json(os.path.join(folder, "trainer_state.json"))

    def log(self, logs: dict[str, float]) -> None:
        self.logs.append(logs)

    def load_weights(self, checkpoint: str) -> None:
        self.model.load_state_dict(torch.load(Path(checkpoint, "pytorch_model.bin"), weights_only=True))

    @contextlib.contextmanager
    def saving_to(self, folder: str | None) -> Iterator[SaveInProgress]:
        self._stand_in = folder
        try:
            yield SaveInProgress(folder, self.args.save_total_limit)
        finally:
            self._stand_in = None

    def rotate(self, run_dir: str) -> None:
        self.rotations += 1

    def rewrite_best(self, path: str) -> None:
        self.state.save_to_json(path)
