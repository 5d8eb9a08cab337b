"""What the processes of the tests do: each function runs on every rank of a run of its own."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import random
import resource
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments, NonFiniteDetector
from hf_divguard.errors import INTERRUPTED_EXIT_CODE
from hf_divguard.storage.failpoints import watch_failpoints
from hf_divguard.storage.names import STAGING_NAME
from tests.processes import kill_at, kill_self
from tests.tiny import TokenRows, base_arguments, checkpoint_steps, names_in, tiny_model


def trainer_of(
    output_dir: str,
    *,
    model: Any = None,
    compute_metrics: Any = None,
    callbacks: Any = None,
    **options: Any,
) -> Any:
    options.setdefault("eval_on_save", True)
    if "RANK" in os.environ:
        options.setdefault("ddp_backend", "gloo")
    if options.pop("repair_each_node", False):
        write_the_model_on_each_node()
    return DivGuardTrainer(
        model=tiny_model(dropout=0.1) if model is None else model,
        args=DivGuardTrainingArguments(**base_arguments(output_dir, **options)),
        train_dataset=TokenRows(),
        eval_dataset=TokenRows(rows=8, seed=1),
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )


def write_the_model_on_each_node() -> None:
    """Let Transformers 5.x do what `save_on_each_node` promises: by itself it writes the model on rank 0 alone."""
    if hasattr(transformers.PreTrainedModel, "should_save_on_this_rank"):
        transformers.PreTrainedModel.should_save_on_this_rank = lambda self, is_main_process: is_main_process


def report(trainer: Any) -> dict[str, Any]:
    total = sum(float(parameter.detach().double().sum()) for parameter in trainer.model.parameters())
    return {
        "step": trainer.state.global_step,
        "weights": total,
        "best": [entry.step for entry in trainer.best_checkpoints()],
        "evaluated": sorted(entry.step for entry in trainer.best_checkpoints(1000)),
    }


def own_folder(output_dir: str, rank: int) -> str:
    return os.path.join(output_dir, f"node{rank}")


# ---- training in different surroundings


def train(
    rank: int,
    output_dir: str,
    resume: Any = None,
    own: bool = False,
    at_moment: Callable[[str], None] = lambda moment: None,
    **options: Any,
) -> dict[str, Any]:
    trainer = trainer_of(own_folder(output_dir, rank) if own else output_dir, **options)
    started = []

    class NoteStart(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            started.append(state.global_step)

    modes = set()

    def listen(moment: str) -> None:
        at_moment(moment)
        if moment == "save begun":
            is_staged = os.path.isdir(os.path.join(trainer.args.output_dir, STAGING_NAME))
            modes.add("staged" if is_staged else "in_place")

    trainer.add_callback(NoteStart())
    with watch_failpoints(listen):
        trainer.train(resume_from_checkpoint=resume)
    return {**report(trainer), "started": started[0], "modes": sorted(modes)}


def train_with_delays(rank: int, output_dir: str, **options: Any) -> dict[str, Any]:
    """Train with a random pause before every change of a file, other ones on every rank."""
    generator = random.Random(rank)
    changing = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}

    def pause(event: str, details: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in changing or writes) and str(details[0]).startswith(output_dir):
            time.sleep(generator.uniform(0.0, 0.004))

    sys.addaudithook(pause)
    save = torch.save

    def slow_save(*args: Any, **kwargs: Any) -> None:
        time.sleep(generator.uniform(0.0, 0.02))
        save(*args, **kwargs)
        time.sleep(generator.uniform(0.0, 0.02))

    torch.save = slow_save
    trainer = trainer_of(output_dir, **options)
    trainer.train()
    return report(trainer)


def train_where_renaming_folders_fails(
    rank: int, output_dir: str, code: int, **options: Any
) -> dict[str, Any]:
    for name in ("rename", "replace"):
        real = getattr(os, name)

        def refuse(source: Any, target: Any, *args: Any, real: Any = real, **kwargs: Any) -> None:
            if os.path.isdir(source):
                raise OSError(code, os.strerror(code), os.fspath(source))
            real(source, target, *args, **kwargs)

        setattr(os, name, refuse)
    return train(rank, output_dir, **options)


def train_where_folders_cannot_be_flushed(rank: int, output_dir: str, **options: Any) -> dict[str, Any]:
    real, files = os.fsync, []

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        files.append(descriptor)
        real(descriptor)

    os.fsync = refuse
    result = train(rank, output_dir, divguard_fsync=True, **options)
    return {**result, "files_flushed": len(files)}


# ---- errors on one rank


def fail_to_seal(rank: int, output_dir: str, at_save: int, on_rank: int, **options: Any) -> dict[str, Any]:
    """Let the ``at_save``-th save fail on rank ``on_rank`` before its checkpoint is published."""
    moments = []

    def fail(moment: str) -> None:
        moments.append(moment)
        if rank == on_rank and moment == "manifest written" and moments.count(moment) == at_save:
            raise OSError(errno.EIO, "an injected error")

    return train(rank, output_dir, at_moment=fail, **options)


def fail_to_write(rank: int, output_dir: str, at_call: int, on_rank: int, **options: Any) -> dict[str, Any]:
    """Let the save of a random state fail, the ``at_call``-th on rank ``on_rank``."""
    real, calls = torch.save, []

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "rng_state" in str(path):
            calls.append(path)
            if rank == on_rank and len(calls) == at_call:
                raise OSError(errno.EIO, "an injected error")
        real(value, path, *args, **kwargs)

    torch.save = save
    return train(rank, output_dir, **options)


def die_while_writing(
    rank: int, output_dir: str, at_call: int, on_rank: int, **options: Any
) -> dict[str, Any]:
    real, calls = torch.save, []

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "rng_state" in str(path):
            calls.append(path)
            if rank == on_rank and len(calls) == at_call:
                kill_self()
        real(value, path, *args, **kwargs)

    torch.save = save
    return train(rank, output_dir, **options)


def rank_with_a_nan(
    rank: int, output_dir: str, on_rank: int, own: bool = False, **options: Any
) -> dict[str, Any]:
    class Score:
        """Counts its calls; an object, so that the trial evaluation counts on a copy."""

        calls = 0

        def __call__(self, prediction: Any) -> dict[str, float]:
            self.calls += 1
            return {"score": math.nan if rank == on_rank else float(self.calls % 3)}

    return train(
        rank,
        output_dir,
        own=own,
        compute_metrics=Score(),
        best_model_metric="score",
        best_model_greater_is_better=True,
        **options,
    )


# ---- disks and signals


def train_with_a_limit_on_file_sizes(
    rank: int, output_dir: str, from_step: int, largest: int, **options: Any
) -> Any:
    """Train; from ``from_step`` on no file may grow beyond ``largest`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class Limit(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 >= from_step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))

    trainer = trainer_of(output_dir, callbacks=[Limit()], **options)
    try:
        trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return report(trainer)


@contextlib.contextmanager
def ends_by_signal() -> Iterator[None]:
    """Take the exit code that a run ends with on a signal; a run that goes on is fine, too."""
    code = None
    try:
        yield
    except SystemExit as exit:
        code = exit.code
    assert code in (None, INTERRUPTED_EXIT_CODE)


def terminated_at(at_step: int, event: str, trainer: Any) -> Any:
    """Return ``trainer``, which gets SIGTERM at ``event`` of ``at_step`` and saves at once."""

    # The timer of the host waits for SIGKILL first; here the moment of the save must be certain.
    class AtOnce:
        def __init__(self, interval: float, function: Any) -> None:
            self._function = function

        def start(self) -> None:
            self._function()

    threading.Timer = AtOnce  # type: ignore[assignment, misc]

    class Terminate(transformers.TrainerCallback):
        """Stands before the host's callback, so that it acts on the same event."""

        def _send(self, state: Any) -> None:
            if state.global_step == at_step:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if event == "on_step_begin":
                self._send(state)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if event == "on_step_end":
                self._send(state)

    trainer.callback_handler.callbacks.insert(0, Terminate())
    return trainer


def losses_before_sigterm(rank: int, output_dir: str, at_step: int) -> dict[str, Any]:
    """Train until SIGTERM; return which checkpoints were saved and of which steps a detector has got losses."""
    steps: list[int] = []

    class Watch(NonFiniteDetector):
        def on_raw_losses(self, values: list[Any], *args: Any) -> None:
            steps.extend(entry.step for entry in values)

    options = {
        "save_strategy": "no",
        "eval_on_save": False,
        "logging_steps": 100,
        "divguard_check_steps": 100,
    }
    trainer = trainer_of(
        output_dir, enable_jit_checkpoint=True, callbacks=[Watch(action="warn")], max_steps=20, **options
    )
    with ends_by_signal():
        terminated_at(at_step, "on_step_end", trainer).train()
    return {"saved": sorted(checkpoint_steps(output_dir)), "losses": steps[: steps.index(at_step) + 1]}


def stop_by_sigterm(
    rank: int, output_dir: str, at_step: int, event: str = "on_step_end", resume: Any = None, **options: Any
) -> dict[str, Any]:
    """Train until the host's own save on SIGTERM has ended the run; return what was on disk meanwhile."""
    trainer = terminated_at(at_step, event, trainer_of(output_dir, enable_jit_checkpoint=True, **options))
    seen: list[list[str]] = []

    def look(moment: str) -> None:
        if moment == "host wrote":
            seen.append(names_in(output_dir))

    with watch_failpoints(look), ends_by_signal():
        trainer.train(resume_from_checkpoint=resume)
    return {**report(trainer), "seen": seen[-1] if seen else None}


def raise_by_sigterm(rank: int, output_dir: str, at_step: int, **options: Any) -> dict[str, Any]:
    """Train until the host's own save on SIGTERM has ended the run."""
    event = options.pop("event", "on_step_end")
    trainer = terminated_at(at_step, event, trainer_of(output_dir, enable_jit_checkpoint=True, **options))
    trainer.train()
    return report(trainer)


def sigterm_on_a_full_disk(rank: int, output_dir: str, at_step: int, **options: Any) -> dict[str, Any]:
    """Train until SIGTERM; no save succeeds then."""
    trainer = terminated_at(
        at_step, "on_step_end", trainer_of(output_dir, enable_jit_checkpoint=True, **options)
    )

    def fail(moment: str) -> None:
        if moment == "manifest written" and trainer.state.global_step == at_step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with watch_failpoints(fail), ends_by_signal():
        trainer.train()
    return report(trainer)


def kill_during_a_second_save(rank: int, output_dir: str, save_mode: str, moment: str | None) -> None:
    """Save the same step twice and die by SIGKILL at a ``moment`` of the second save; ``None``: right after it."""
    trainer = trainer_of(output_dir, max_steps=2, save_total_limit=1, divguard_save_mode=save_mode)
    saves = []
    guarded = type(trainer)._save_checkpoint

    class Twice(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if saves:
                return
            saves.append(1)
            with kill_at(moment):
                guarded(trainer, trainer.model, None)
            if moment is None:
                kill_self()

    trainer.add_callback(Twice())
    trainer.train()
