"""Kill a training with SIGKILL again and again, resume it, and count what went wrong.

A tiny GPT-2 with dropout trains on CPU and saves, after an evaluation, every few steps. Each
life of the training is a process of its own, forked from one that has imported everything, and
dies by SIGKILL: half of the kills come at any moment, half are aimed inside a save, the
publishing of a checkpoint, or a deletion. After each kill the training is started again with
``resume_from_checkpoint=True``, until the run is complete.

What stands on disk after a kill is not judged by the package under test: every file is loaded
and compared, value by value, with the same step of a run that was never killed.

    python benchmarks/kill_resume.py --short              # a minute, as continuous integration runs it
    python benchmarks/kill_resume.py --kills 100 --out table.md

Columns: kills; how many came inside a save; "broken newest": the checkpoint that the resume
would take for the newest is not whole; "resume failed": the next start ended in an error (for
the stock Trainer the broken folder is then removed by hand); "wrong place": training went on
from another step than the newest whole checkpoint's; "best lost": a checkpoint that was among
the best is gone or broken (the best two of ours, the best one of the stock Trainer, which keeps
no more); "equal": runs whose final weights are those of the run never killed, bit for bit.
"""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",
)

import argparse
import contextlib
import dataclasses
import hashlib
import json
import platform
import random
import re
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hf_divguard.hf.checkpoint_saver as checkpoint_saver
import hf_divguard.hf.run_guard as run_guard
import numpy
import safetensors.torch
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import hf_divguard
from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments
from hf_divguard.storage.checkpoints import find_checkpoints

torch.set_num_threads(1)

STEPS = 60
SAVE_STEPS = 3
LIMIT = 2
BEST = 2
KEEP: Path | None = None
STAGING = "_divguard_staging"
PATIENCE_SECONDS = 120.0
"""A life that says nothing for so long is counted as failed."""

_ANY_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")


@dataclasses.dataclass(frozen=True)
class Series:
    """One row of the table."""

    trainer: str  # "stock", "staged" or "in_place"; staged is what the default chooses
    ranks: int = 1
    size: str = "small"

    @property
    def is_ours(self) -> bool:
        return self.trainer != "stock"

    @property
    def reference(self) -> str:
        return f"{self.ranks}-{self.size}"

    @property
    def label(self) -> str:
        name = {"stock": "stock", "staged": "ours, staged (default)", "in_place": "ours, in place"}[
            self.trainer
        ]
        return f"{name}, {self.ranks} process{'es' if self.ranks > 1 else ''}"


@dataclasses.dataclass
class Counts:
    """What a series has seen so far."""

    kills: int = 0
    inside_save: int = 0
    inside_publish: int = 0
    inside_delete: int = 0
    broken_newest: int = 0
    resume_failed: int = 0
    wrong_place: int = 0
    best_lost: int = 0
    partial_under_name: int = 0
    runs: int = 0
    equal: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Counts) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass(frozen=True)
class Aim:
    """When a life ends: some time after an event, or before a certain file operation of a phase."""

    kind: str  # "anywhere", "write", "publish", "delete"
    delay: float = 0.0
    skip: int = 0
    operation: int = 0


# ---- what a life trains


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(0, 256, (count, 16), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def make_model(size: str) -> GPT2LMHeadModel:
    width, layers = {"small": (128, 2), "large": (256, 5)}[size]  # checkpoints of 5 MB and 48 MB
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=16,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attn_pdrop=0.1,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def score(prediction: Any) -> dict[str, float]:
    # Jumps about from step to step, so that the best checkpoints are seldom the newest, and depends on every
    # bit of the weights.
    return {"score": float(abs(prediction.predictions.astype("float64").sum()) * 1e3 % 1.0)}


def make_trainer(
    series: Series, run_dir: str, announce: Callable[[str], None], limit: int | None = LIMIT
) -> Any:
    common: dict[str, Any] = {
        "output_dir": run_dir,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-3,
        "logging_steps": 5,
        "save_steps": SAVE_STEPS,
        "save_total_limit": limit,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "metric_for_best_model": "score",
        "greater_is_better": True,
        "ddp_backend": "gloo" if series.ranks > 1 else None,
    }

    class Announcing:
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            step = self.state.global_step  # type: ignore[attr-defined]
            announce(f"save {step}")
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
            announce(f"saved {step}")

    class AnnounceStart(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            announce(f"started {state.global_step}")

    parts = {
        "model": make_model(series.size),
        "train_dataset": Rows(64, seed=1),
        "eval_dataset": Rows(16, seed=2),
        "compute_metrics": score,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.mean(dim=-1),
        "callbacks": [AnnounceStart()],
    }
    if not series.is_ours:
        args = TrainingArguments(**common, eval_strategy="steps", eval_steps=SAVE_STEPS)
        return type("StockTrainer", (Announcing, Trainer), {})(args=args, **parts)
    options: dict[str, Any] = {"divguard_save_mode": "in_place"} if series.trainer == "in_place" else {}
    args = DivGuardTrainingArguments(
        **common,
        **options,
        eval_on_save=True,
        preserve_best_model=True,
        preserve_n_best=BEST,
        best_model_metric="score",
        best_model_greater_is_better=True,
    )
    return type("OurTrainer", (Announcing, DivGuardTrainer), {})(args=args, **parts)


# ---- inside a life


class Announcer:
    """Tells the killer what the training does, and stops it for a kill at a file operation."""

    def __init__(self, pipe: int, aim: Aim | None, armed: bool) -> None:
        self._pipe = pipe
        self._aim = aim
        self._armed = armed
        self._phase: str | None = None
        self._operations = 0
        self._passed = 0

    def __call__(self, line: str) -> None:
        if line.startswith("saved"):
            self._armed = True
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, f"{line}\n".encode())

    def phase(
        self, name: str, function: Callable[..., Any], *, first: bool = True, last: bool = True
    ) -> Callable[..., Any]:
        """Return ``function``, announced as (the first or last part of) the phase ``name`` while it runs."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._phase = name
            if first:
                self._operations = 0
                self(f"{name} begins")
            try:
                result = function(*args, **kwargs)
                if last:
                    self(f"{name} done")
                return result
            finally:
                if last:
                    self._end_of_phase()
                    self(f"{name} ends")
                self._phase = None

        return wrapped

    def listen(self) -> None:
        """Count the file operations of the phases; Python reports each just before it is done."""
        changing = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}

        def hook(event: str, details: tuple[Any, ...]) -> None:
            if self._phase is None:
                return
            if event in changing or (event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR)):
                if self._is_aimed_at and self._operations == self._aim.operation:  # type: ignore[union-attr]
                    self._stop()
                self._operations += 1

        sys.addaudithook(hook)

    @property
    def _is_aimed_at(self) -> bool:
        aim = self._aim
        return aim is not None and self._armed and aim.kind == self._phase and self._passed == aim.skip

    def _end_of_phase(self) -> None:
        if self._operations:  # a deletion that had nothing to delete does not count
            if self._is_aimed_at:
                self._stop()
            if self._armed and self._aim is not None and self._aim.kind == self._phase:
                self._passed += 1

    def _stop(self) -> None:
        self(f"stopped {self._phase} {self._operations}")
        while True:
            signal.pause()


def hook_phases(announce: Announcer) -> None:
    """Announce the phases of a save, here in the child, by wrapping what the Trainers call."""
    saver: Any = checkpoint_saver.CheckpointSaver
    saver._seal = announce.phase("publish", saver._seal, last=False)
    saver._give_name = announce.phase("publish", saver._give_name, first=False)
    run_guard.delete_checkpoint = announce.phase("delete", run_guard.delete_checkpoint)
    if hasattr(Trainer, "_rotate_checkpoints"):
        Trainer._rotate_checkpoints = announce.phase("delete", Trainer._rotate_checkpoints)
    else:
        transformers.trainer.rotate_checkpoints = announce.phase(
            "delete", transformers.trainer.rotate_checkpoints
        )
    announce.listen()


def repair_loading_on_several_cpus() -> None:
    """Let Transformers before 5.20 resume with several CPU processes, which it cannot by itself."""
    load = torch.load

    def load_to_plain_cpu(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("map_location")).startswith("cpu"):
            kwargs["map_location"] = "cpu"
        return load(*args, **kwargs)

    torch.load = load_to_plain_cpu


def hash_weights(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        update_digest(digest, (name, tensor))
    return digest.hexdigest()


def live(
    series: Series, run_dir: str, rank: int, port: int, pipe: int, aim: Aim | None, resume: bool, armed: bool
) -> None:
    """Train in this process until killed or done, telling ``pipe``."""
    announce = Announcer(pipe, aim if rank == 0 else None, armed)
    try:
        if series.ranks > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(series.ranks),
                LOCAL_WORLD_SIZE=str(series.ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            repair_loading_on_several_cpus()
        hook_phases(announce)
        trainer = make_trainer(series, run_dir, announce)
        trainer.train(resume_from_checkpoint=True if resume else None)
        announce(f"done {hash_weights(trainer.model)}")
        if series.ranks > 1:
            torch.distributed.barrier()
    except BaseException as error:
        traceback.print_exc()
        announce(f"failed {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        os._exit(1)


def fork(work: Callable[[], None], log: Path) -> int:
    """Run ``work`` in a new process with its output in ``log``; return its id."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


# ---- what stands on disk


def update_digest(digest: Any, value: Any) -> None:
    """Feed a loaded value to ``digest``, so that equal values give equal digests however they were stored."""
    if isinstance(value, torch.Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, numpy.ndarray):
        digest.update(f"array {value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            digest.update(repr(key).encode())
            update_digest(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)}".encode())
        for entry in value:
            update_digest(digest, entry)
    else:
        digest.update(repr(value).encode())


def digests(folder: Path) -> dict[str, str]:
    """Load every file of a checkpoint that training goes on from; return the digest of its values."""
    found = {}
    for path in sorted(folder.iterdir()):
        value: Any
        try:
            if path.suffix == ".safetensors":
                value = safetensors.torch.load_file(path)
            elif path.suffix in (".pt", ".pth"):
                value = torch.load(path, map_location="cpu", weights_only=False)
            elif path.name == "trainer_state.json":
                value = json.loads(path.read_text())["global_step"]
            elif path.name == "training_args.bin":
                value = type(torch.load(path, weights_only=False)).__mro__[-2].__name__
            elif path.name == "config.json":
                value = json.loads(path.read_text())
            else:
                continue
        except Exception:
            continue
        digest = hashlib.sha256()
        update_digest(digest, value)
        found[path.name] = digest.hexdigest()
    return found


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a kill left: the steps of all folders, of those that are whole, and what our reader says."""

    folders: list[int]
    whole: list[int]
    staged_whole: list[int]
    counted: list[int]


def inspect(run_dir: Path, expected: dict[str, dict[str, str]]) -> Inspection:
    folders, whole, staged_whole = [], [], []
    for parent, found in ((run_dir, whole), (run_dir / STAGING, staged_whole)):
        for path in sorted(parent.glob("checkpoint-*")):
            match = _ANY_CHECKPOINT.fullmatch(path.name)
            if match is None or not path.is_dir():
                continue
            if parent == run_dir:
                folders.append(int(match[1]))
            if digests(path) == expected[match[1]]:
                found.append(int(match[1]))
    counted = [info.step for info in find_checkpoints(run_dir) if info.verdict.status == "complete"]
    return Inspection(sorted(folders), sorted(whole), staged_whole, counted)


def ask_a_child(question: Callable[[], Any], log: Path) -> Any:
    """Return the answer of ``question``, asked in a process of its own so that this one stays small and clean."""
    reading, writing = os.pipe()

    def answer() -> None:
        with os.fdopen(writing, "w") as file:
            json.dump(question(), file)

    pid = fork(answer, log)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(pid, 0)
    if not text:
        raise RuntimeError(f"The inspection failed; see {log}.")
    return json.loads(text)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A run that was never killed: its checkpoints, its metric, its final weights, how long a save takes."""

    checkpoints: dict[str, dict[str, str]]
    scores: dict[int, float]
    weights: str
    save_seconds: float
    run_seconds: float
    megabytes: float

    def best(self, steps: set[int], count: int) -> set[int]:
        return set(sorted(steps, key=lambda step: (-self.scores[step], -step))[:count])


def make_reference(series: Series, root: Path) -> Reference:
    """Train with the stock Trainer from start to end, keeping every checkpoint."""
    root.mkdir(parents=True)
    run_dir = root / "run"
    life = Life(
        dataclasses.replace(series, trainer="stock"), run_dir, root, aim=None, resume=False, keep_all=True
    )
    began = time.monotonic()
    saves, weights, started = [], "", 0.0
    for moment, line in life.lines():
        words = line.split()
        if words[0] == "save":
            started = moment
        elif words[0] == "saved":
            saves.append(moment - started)
        elif words[0] == "done":
            weights = words[1]
        elif words[0] == "failed":
            raise RuntimeError(f"The reference run failed: {line}. See {root}.")
    life.wait()
    seconds = time.monotonic() - began
    last = run_dir / f"checkpoint-{STEPS}"
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    checkpoints = ask_a_child(
        lambda: {
            str(step): digests(run_dir / f"checkpoint-{step}")
            for step in range(SAVE_STEPS, STEPS + 1, SAVE_STEPS)
        },
        root / "log",
    )
    megabytes = sum(path.stat().st_size for path in last.iterdir()) / 1e6
    shutil.rmtree(run_dir)
    return Reference(
        checkpoints,
        {entry["step"]: entry["eval_score"] for entry in history if "eval_score" in entry},
        weights,
        sorted(saves)[len(saves) // 2],
        seconds,
        megabytes,
    )


# ---- the killer


class Life:
    """The processes of one life of a training."""

    def __init__(
        self,
        series: Series,
        run_dir: Path,
        root: Path,
        *,
        aim: Aim | None,
        resume: bool,
        keep_all: bool = False,
    ) -> None:
        reading, writing = os.pipe()
        port = _free_port() if series.ranks > 1 else 0
        self.pids: list[int] = []
        for rank in range(series.ranks):

            def work(rank: int = rank) -> None:
                global LIMIT
                os.close(reading)
                if keep_all:
                    make_trainer.__defaults__ = (None,)
                pipe = writing if rank == 0 else os.open(os.devnull, os.O_WRONLY)
                if rank:
                    os.close(writing)
                live(series, str(run_dir), rank, port, pipe, aim, resume, armed=resume)

            self.pids.append(fork(work, root / f"rank{rank}.log"))
        os.close(writing)
        self._reading = reading
        self._rest = b""
        self.alive = set(self.pids)

    def lines(self, deadline: float | None = None) -> Iterator[tuple[float, str]]:
        """Yield what rank 0 announces, with the moment, until it ends or ``deadline`` passes."""
        while True:
            now = time.monotonic()
            limit = now + PATIENCE_SECONDS if deadline is None else deadline
            if not select.select([self._reading], [], [], max(0.0, limit - now))[0]:
                if deadline is None:
                    yield time.monotonic(), "failed Silence: nothing was heard for too long"
                return
            data = os.read(self._reading, 65536)
            if not data:
                return
            *whole, self._rest = (self._rest + data).split(b"\n")
            for line in whole:
                yield time.monotonic(), line.decode()

    def kill(self, generator: random.Random) -> None:
        """Send SIGKILL to the ranks: to all at once, or to one first and to the others within a second."""
        order = list(self.pids)
        generator.shuffle(order)
        pause = generator.choice([0.0, generator.uniform(0.0, 1.0)]) if len(order) > 1 else 0.0
        for number, pid in enumerate(order):
            if number and pause:
                time.sleep(pause)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        for pid in self.pids:
            os.waitpid(pid, 0)

    def end(self) -> None:
        """End what is left of a life that failed by itself."""
        time.sleep(0.2)
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        os.close(self._reading)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def draw_aim(series: Series, reference: Reference, generator: random.Random, number: int) -> Aim:
    """Half of the kills come anywhere; the others inside writing, publishing and deleting in turn."""
    if number % 2 == 0:
        return Aim("anywhere", delay=generator.uniform(0.0, reference.run_seconds / 3))
    kinds = ["write", "publish", "delete"] if series.is_ours else ["write", "write", "delete"]
    kind = kinds[(number // 2) % 3]
    skip = generator.randrange(3)
    if kind == "write":
        return Aim(kind, delay=generator.uniform(0.0, 1.1 * reference.save_seconds), skip=skip)
    return Aim(kind, skip=skip, operation=generator.randrange(10))


@dataclasses.dataclass
class Seen:
    """What the announcements of one life told."""

    started: int | None = None
    saving: int | None = None
    phase: str | None = None
    done: str | None = None
    failed: str | None = None
    killed: bool = False
    published: set[int] = dataclasses.field(default_factory=set)

    def note(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "started":
            self.started = int(rest)
        elif word == "save":
            self.saving = int(rest)
        elif word == "saved":
            self.published.add(int(rest))
            self.saving = None
        elif word in ("publish", "delete"):
            if word == "publish" and rest == "done" and self.saving is not None:
                self.published.add(self.saving)
            self.phase = None if rest == "ends" else word
        elif word == "done":
            self.done = rest
        elif word == "failed":
            self.failed = rest


def follow(life: Life, aim: Aim | None, armed: bool, generator: random.Random) -> Seen:
    """Listen to a life, end it where ``aim`` says, and return what was seen of it."""
    seen = Seen()
    passed = 0
    deadline: float | None = None
    while not seen.killed:
        for moment, line in life.lines(deadline):
            seen.note(line)
            if aim is None:
                continue
            word = line.split()[0]
            if word == "saved" and not armed:
                armed = True
                if aim.kind == "anywhere":
                    deadline = moment + aim.delay
                    break
            if armed and aim.kind == "anywhere" and word == "started":
                deadline = moment + aim.delay
                break
            if armed and aim.kind == "write" and word == "save" and deadline is None:
                passed += 1
                if passed > aim.skip:
                    deadline = moment + aim.delay
                    break
            if word == "stopped":
                deadline = moment
                break
        else:
            if deadline is None or time.monotonic() < deadline:
                break  # the pipe is closed: the life has ended by itself
        if deadline is not None and time.monotonic() >= deadline:
            seen.killed = True
    if seen.killed and seen.failed is None:
        life.kill(generator)
        for _, line in life.lines(time.monotonic()):
            if not line.startswith("failed"):  # a rank that outlives another for a moment ends in an error
                seen.note(line)
        seen.killed = seen.done is None
    else:
        seen.killed = False
        life.end() if seen.failed else life.wait()
    life.close()
    return seen


def run_once(
    series: Series, reference: Reference, root: Path, generator: random.Random, budget: int, first: int
) -> Counts:
    """Train one run to its end through up to ``budget`` kills; return what was counted."""
    counts = Counts()
    run_dir = root / "run"
    run_dir.mkdir(parents=True)
    published: set[int] = set()
    before: Inspection | None = None
    unpublished: set[int] = set()
    failures = 0
    while True:
        aim = draw_aim(series, reference, generator, first + counts.kills) if counts.kills < budget else None
        resume = any(_ANY_CHECKPOINT.fullmatch(path.name) for path in run_dir.iterdir())
        life = Life(series, run_dir, root, aim=aim, resume=resume)
        seen = follow(life, aim, resume, generator)
        if seen.done is None and not seen.killed:
            counts.resume_failed += 1
            counts.notes.append(f"{series.label}: {seen.failed}")
            failures += 1
            broken = (
                max((step for step in before.folders if step not in before.whole), default=None)
                if before
                else None
            )
            if failures > 3 or broken is None:
                break
            shutil.rmtree(run_dir / f"checkpoint-{broken}", ignore_errors=True)
            published.discard(broken)
            continue
        if seen.started is not None:
            if before is not None:
                _check_place(series, seen.started, before, unpublished, counts)
            # What training went on from is published, also if the kill came before it could say so.
            published = {step for step in published if step <= seen.started} | {seen.started} - {0}
            before = None
        published |= seen.published
        if seen.done is not None:
            counts.runs += 1
            counts.equal += seen.done == reference.weights
            if seen.done != reference.weights:
                counts.notes.append(f"{series.label}: final weights differ")
            break
        failures = 0
        counts.kills += 1
        unpublished = (unpublished | {seen.saving or 0}) - published
        before = Inspection(
            **ask_a_child(
                lambda: dataclasses.asdict(inspect(run_dir, reference.checkpoints)), root / "inspect.log"
            )
        )
        _count_kill(series, seen, before, published, reference, run_dir, counts)
    bad = counts.wrong_place + counts.best_lost + (counts.runs - counts.equal)
    if KEEP is not None and series.is_ours and (bad or counts.resume_failed):
        shutil.copytree(root, KEEP / root.name, dirs_exist_ok=True)
    shutil.rmtree(root)
    return counts


def _check_place(
    series: Series, started: int, before: Inspection, unpublished: set[int], counts: Counts
) -> None:
    # A checkpoint that was being saved may be whole already, in its place or in the staging folder, although the
    # training had not got to saying so: then both it and the one before are right.
    right = {max((step for step in before.whole if step not in unpublished), default=0)}
    right |= {
        step for step in (*before.whole, *before.staged_whole) if step in unpublished and step > max(right)
    }
    if started not in right:
        counts.wrong_place += 1
        counts.notes.append(
            f"{series.label}: started from {started}, expected {sorted(right)}, found {before}"
        )


def _count_kill(
    series: Series,
    seen: Seen,
    found: Inspection,
    published: set[int],
    reference: Reference,
    run_dir: Path,
    counts: Counts,
) -> None:
    counts.inside_save += seen.saving is not None
    counts.inside_publish += seen.phase == "publish"
    counts.inside_delete += seen.phase == "delete"
    newest = max(found.counted if series.is_ours else found.folders, default=None)
    if newest is not None and newest not in found.whole:
        counts.broken_newest += 1
        counts.notes.append(f"{series.label}: newest {newest} is broken, found {found}")
    counts.partial_under_name += any(step not in found.whole for step in found.folders)
    count = BEST if series.is_ours else 1
    present = set(found.whole) & set(found.counted) if series.is_ours else set(found.whole)
    in_flight = {seen.saving} if seen.saving is not None else set()
    candidates = [reference.best(published, count), reference.best(published | in_flight, count)]
    if not any(best <= present for best in candidates):
        counts.best_lost += 1
        if KEEP is not None and series.is_ours:
            shutil.copytree(
                run_dir,
                KEEP / f"best-lost-{time.time_ns()}",
                ignore=shutil.ignore_patterns("*.pt", "*.safetensors"),
            )
        counts.notes.append(f"{series.label}: best {candidates} not in {found}, saving {seen.saving}")


# ---- the program


def work_through(
    tasks: list[tuple[Series, int, int]],
    references: dict[str, Reference],
    root: Path,
    seed: int,
    results: Path,
) -> None:
    """Run the series one after the other, each up to its number of kills; append the counts to ``results``."""
    for series, kills, first in tasks:
        generator = random.Random(f"{seed} {series} {results.name}")
        total = Counts()
        number = 0
        while total.kills < kills:
            number += 1
            counts = run_once(
                series,
                references[series.reference],
                root / f"{series.trainer}-{series.reference}-{number}",
                generator,
                min(kills - total.kills, generator.randint(8, 16)),
                first + total.kills,
            )
            total.add(counts)
            if counts.kills == 0 and counts.runs == 0:
                break
            print(
                f"{time.strftime('%H:%M:%S')} {series.label} ({series.size}): {total.kills}/{kills} kills, "
                f"{total.equal}/{total.runs} runs equal, failed {total.resume_failed}",
                file=sys.stderr,
                flush=True,
            )
        with results.open("a") as file:
            file.write(json.dumps([dataclasses.asdict(series), dataclasses.asdict(total)]) + "\n")


def table(rows: dict[Series, Counts], references: dict[str, Reference]) -> str:
    head = [
        "series",
        "checkpoint",
        "kills",
        "inside a save (publish, delete)",
        "broken newest",
        "resume failed",
        "wrong place",
        "best lost",
        "partial folder under a checkpoint's name",
        "runs equal",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for series, c in rows.items():
        cells = [
            series.label,
            f"{references[series.reference].megabytes:.0f} MB",
            c.kills,
            f"{c.inside_save} ({c.inside_publish}, {c.inside_delete})",
            c.broken_newest,
            c.resume_failed,
            c.wrong_place,
            c.best_lost,
            c.partial_under_name,
            f"{c.equal} of {c.runs}",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    for name, of_kind in (("sum, stock", "stock"), ("sum, ours", "ours")):
        total = Counts()
        for series, counts in rows.items():
            if series.is_ours == (of_kind == "ours"):
                total.add(counts)
        if total.kills:
            lines.append(
                f"| **{name}** | | {total.kills} | {total.inside_save} ({total.inside_publish}, {total.inside_delete}) "
                f"| {total.broken_newest} | {total.resume_failed} | {total.wrong_place} | {total.best_lost} "
                f"| {total.partial_under_name} | {total.equal} of {total.runs} |"
            )
    return "\n".join(lines)


def all_series(short: bool, only: str) -> list[Series]:
    if short:
        series = [Series("staged"), Series("in_place"), Series("staged", ranks=2), Series("stock")]
    else:
        series = [
            Series(trainer, ranks, size)
            for ranks, size in ((1, "small"), (1, "large"), (2, "small"))
            for trainer in ("staged", "in_place", "stock")
        ]
    return [each for each in series if only in f"{each.label}, {each.size}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=None, help="kills per series (default 100, short form 8)"
    )
    parser.add_argument("--short", action="store_true", help="four series of small checkpoints")
    parser.add_argument("--only", default="", help="only the series with this text in their name")
    parser.add_argument("--keep", type=Path, default=None, help="folder for what went wrong, to look at")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--workers", type=int, default=2, help="how many runs go on side by side")
    parser.add_argument(
        "--out", type=Path, default=None, help="file for the table; standard output without it"
    )
    options = parser.parse_args()
    kills = options.kills or (8 if options.short else 100)
    began = time.monotonic()
    global KEEP
    KEEP = options.keep
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as name:
        root = Path(name)
        series = all_series(options.short, options.only)
        references: dict[str, Reference] = {}
        for each in series:
            if each.reference not in references:
                references[each.reference] = make_reference(each, root / f"reference-{each.reference}")
        shares = [(kills + worker) // options.workers for worker in range(options.workers)]
        pids = []
        for worker, share in enumerate(shares):
            tasks = [(each, share, sum(shares[:worker])) for each in series] if share else []
            pids.append(
                fork(
                    lambda tasks=tasks, worker=worker: work_through(
                        tasks, references, root / f"worker{worker}", options.seed, root / f"results{worker}"
                    ),
                    root / f"worker{worker}.log",
                )
            )
        failed = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        rows = {each: Counts() for each in series}
        for worker in range(options.workers):
            sys.stderr.write((root / f"worker{worker}.log").read_text())
            results = root / f"results{worker}"
            for line in results.read_text().splitlines() if results.exists() else []:
                described, counted = json.loads(line)
                rows[Series(**described)].add(Counts(**counted))
    text = "\n".join(
        [
            f"transformers {transformers.__version__}, torch {torch.__version__}, hf_divguard {hf_divguard.__version__}, "
            f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores; "
            f"seed {options.seed}, {time.monotonic() - began:.0f} seconds.",
            "",
            table(rows, references),
            "",
        ]
    )
    if options.out is not None:
        options.out.write_text(text)
    print(text)
    for counts in rows.values():
        for note in counts.notes:
            print("-", note)
    ours = Counts()
    for each, counts in rows.items():
        if each.is_ours:
            ours.add(counts)
    bad = (
        ours.broken_newest + ours.resume_failed + ours.wrong_place + ours.best_lost + (ours.runs - ours.equal)
    )
    return 1 if bad or any(failed) or not ours.runs else 0


if __name__ == "__main__":
    sys.exit(main())
