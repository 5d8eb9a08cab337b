"""One rank of a run under an engine that times its saves and rollbacks, and counts their bytes."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_divguard.hf.engines import engine_of
from hf_divguard.hf.host import Host
from tests.hf.engines.launch import become_the_only_rank
from tests.hf.engines.trainers import make_trainer
from tests.tiny import RandomRows, gpt2

VOCABULARY, LENGTH = 256, 8
SIZES = {"small": (128, 2), "large": (512, 3)}
"""Width and layers of a GPT-2."""

Seconds = dict[str, list[float]]


def new_model(size: str) -> Any:
    """Return the model of a size."""
    width, layers = SIZES[size]
    return gpt2(vocabulary=VOCABULARY, length=LENGTH, width=width, layers=layers, heads=4)


def wait_for_all() -> None:
    """Wait for the other ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def bytes_in(value: Any) -> int:
    """Return the bytes of all tensors in a nested state."""
    if isinstance(value, torch.Tensor):
        part = value.to_local() if hasattr(value, "to_local") else value
        return part.numel() * part.element_size()
    entries: Iterator[Any] = iter(())
    if isinstance(value, dict):
        entries = iter(value.values())
    elif isinstance(value, (list, tuple)):
        entries = iter(value)
    return sum(map(bytes_in, entries))


class Measure(TrainerCallback):
    """Saves and rolls back by hand at the end of a step, again and again."""

    trainer: Any = None

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.seconds: Seconds = {}
        self.worked: Seconds = {}
        self.kept_bytes = 0

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Do it on all ranks at the same time; note the seconds of this rank's processor, and those by the clock."""
        gc.collect()
        wait_for_all()
        began, worked = time.perf_counter(), time.process_time()
        result = work()
        worked = time.process_time() - worked
        wait_for_all()
        self.worked.setdefault(name, []).append(worked)
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        return result

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the end of the second step, when the optimizer has a state."""
        if state.global_step != 2:
            return
        checkpoint = str(Path(args.output_dir, f"checkpoint-{state.global_step}"))
        for repeat in range(self.repeats + 1):
            os.sync()
            self.once(engine_of(Host(self.trainer)), checkpoint)
            if repeat == 0:
                self.seconds.clear(), self.worked.clear()  # everything is slower the first time

    def once(self, engine: Any, checkpoint: str) -> None:
        """Save, roll back from disk, keep a state, roll back to it."""
        self.timed("save", lambda: self.trainer._save_checkpoint(self.trainer.model, None))
        put = self.timed("read", lambda: engine.read(checkpoint))
        self.timed("put", put)
        kept = self.timed("keep", engine.keep)
        self.kept_bytes = bytes_in([kept.tensors, kept.optimizer])
        self.timed("put back", lambda: engine.put_back(kept))


def measure(rank: int, folder: str, engine: str, size: str, repeats: int) -> dict[str, Any]:
    """Return the seconds of each action, the bytes of a state in memory, and those on disk.

    The seconds are the median of the processor's and the least by the clock: other work on the machine changes the
    former little.
    """
    if "RANK" not in os.environ and engine != "ddp":
        become_the_only_rank()
    seen = Measure(repeats)
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "no", "logging_strategy": "no"}
    options["divguard_snapshot_steps"] = 1000  # rollback needs a source
    trainer = make_trainer(engine, folder, callbacks=(seen,), model=new_model(size), **options)
    trainer.train_dataset = RandomRows(16, LENGTH, vocabulary=VOCABULARY)
    trainer.train()
    files = [path for path in Path(folder, "checkpoint-2").rglob("*") if path.is_file()]
    return {
        "worked": {name: statistics.median(each) for name, each in seen.worked.items()},
        "seconds": {name: min(each) for name, each in seen.seconds.items()},
        "kept_bytes": seen.kept_bytes,
        "disk_bytes": sum(path.stat().st_size for path in files),
        "largest_file_bytes": max(path.stat().st_size for path in files),
    }
