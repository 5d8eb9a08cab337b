"""Every state that a kill or a power failure can leave behind, for each operation on checkpoints.

An operation runs once on a real folder while its file operations are recorded. Then every prefix of
them is tried (a kill), and, after each prefix, every way in which one or more operations that were
not flushed yet are lost (a power failure): a name that was not put on the disk, or the contents of a
file that are empty, cut in half or zeros. Names are kept by folder, not by path, so a file may vanish
from a folder whose own renaming was lost.

Left out: errors of the disk itself, lost writes after ``fsync``, a rename of which only one half is
on the disk, and more lost operations at a time than were asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_divguard.storage.checkpoints import find_checkpoints
from hf_divguard.storage.deletion import delete_checkpoint
from hf_divguard.storage.ledger import CheckpointLedger
from hf_divguard.storage.manifest import build_manifest, write_manifest
from hf_divguard.storage.names import MANIFEST_NAME, SIDECAR_NAME
from hf_divguard.storage.quarantine import clear_suspect, mark_suspect, quarantine
from hf_divguard.storage.replacing import remove_aside, set_aside
from hf_divguard.storage.resume_state import resume_state
from hf_divguard.storage.sidecar import write_sidecar
from hf_divguard.storage.staging import publish, recover, staging_folder

ROOT = 0  # number of the run folder
OURS = (MANIFEST_NAME, SIDECAR_NAME)


@dataclass(frozen=True)
class Op:
    """One change: a name in a folder, the contents of a file, or a flush. Folders and files have numbers."""

    kind: str  # "name", "drop", "move", "data", "flush data", "flush names"
    node: int
    folder: int = -1
    name: str = ""
    to_folder: int = -1
    to_name: str = ""
    data: bytes = b""


@dataclass
class Recorder:
    """Records what happens below ``root``, which may hold files already."""

    root: str
    ops: list[Op] = field(default_factory=list)
    nodes: dict[str, int] = field(default_factory=dict)
    folders: set[int] = field(default_factory=lambda: {ROOT})
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    unwritten: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.nodes[self.root] = ROOT
        for folder, folders, files in os.walk(self.root):
            for name in (*folders, *files):
                self.appear(os.path.join(folder, name), name in folders)
                if name in files:
                    self.unwritten.add(os.path.join(folder, name))
        self.write_all()

    def appear(self, path: str, is_folder: bool) -> None:
        self.nodes[path] = node = next(self.numbers)
        self.folders |= {node} if is_folder else set()
        folder, name = os.path.split(path)
        self.ops.append(Op("name", node, self.nodes[folder], name))

    def write_all(self) -> None:
        for path in sorted(self.unwritten):
            self.ops.append(Op("data", self.nodes[path], data=Path(path).read_bytes()))
        self.unwritten.clear()

    def vanish(self, path: str) -> None:
        folder, name = os.path.split(path)
        self.ops.append(Op("drop", self.nodes.pop(path), self.nodes[folder], name))

    def move(self, source: str, target: str) -> None:
        node = self.nodes[source]
        (folder, name), (to_folder, to_name) = os.path.split(source), os.path.split(target)
        self.ops.append(Op("move", node, self.nodes[folder], name, self.nodes[to_folder], to_name))
        for path in [path for path in self.nodes if path == source or path.startswith(source + "/")]:
            self.nodes[target + path[len(source) :]] = self.nodes.pop(path)


@contextlib.contextmanager
def recording(root: Path, *, renames: bool) -> Iterator[Recorder]:
    """Record the file operations in ``root``; without ``renames``, folders cannot be renamed."""
    recorder = Recorder(os.fspath(root))
    names = ("mkdir", "open", "rename", "replace", "unlink", "rmdir", "fsync")
    real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in names}

    def call(name: str, path: Any, *rest: Any, **options: Any) -> Any:
        if name == "open" and not rest[0] & os.O_CREAT:
            return real[name](path, *rest, **options)
        recorder.write_all()
        if name in ("rename", "replace") and not renames and os.path.isdir(path):
            raise OSError(18, "Invalid cross-device link")
        place = os.readlink(f"/proc/self/fd/{path}") if name == "fsync" else os.fspath(path)
        result = real[name](path, *rest, **options)
        if name in ("mkdir", "open"):
            recorder.appear(place, name == "mkdir")
            recorder.unwritten |= {place} if name == "open" else set()
        elif name in ("rename", "replace"):
            recorder.move(place, os.fspath(rest[0]))
        elif name in ("unlink", "rmdir"):
            recorder.vanish(place)
        else:
            node = recorder.nodes[place]
            recorder.ops.append(Op("flush names" if node in recorder.folders else "flush data", node))
        return result

    try:
        for name in names:
            setattr(os, name, lambda *arguments, name=name, **options: call(name, *arguments, **options))
        yield recorder
        recorder.write_all()
    finally:
        for name, function in real.items():
            setattr(os, name, function)


Tree = tuple[tuple[str, bytes | None], ...]


def tree_after(ops: list[Op], lost: dict[int, str], folders: set[int]) -> Tree:
    """Return what is on the disk after ``ops``, of which those in ``lost`` are not, or not completely."""
    names: dict[int, dict[str, int]] = {}
    data: dict[int, bytes] = {}
    for number, op in enumerate(ops):
        how = lost.get(number)
        if op.kind == "data":
            whole = op.data
            data[op.node] = {
                None: whole,
                "empty": b"",
                "half": whole[: len(whole) // 2],
                "zeros": bytes(len(whole)),
            }[how]
        elif how is not None:
            continue
        elif op.kind == "name":
            names.setdefault(op.folder, {})[op.name] = op.node
        elif op.kind == "drop":
            names.get(op.folder, {}).pop(op.name, None)
        elif op.kind == "move":
            if names.get(op.folder, {}).get(op.name) == op.node:
                del names[op.folder][op.name]
            names.setdefault(op.to_folder, {})[op.to_name] = op.node
    found: list[tuple[str, bytes | None]] = []
    waiting = [(ROOT, "")]
    while waiting:
        folder, prefix = waiting.pop()
        for name, node in names.get(folder, {}).items():
            is_folder = node in folders
            found.append((prefix + name, None if is_folder else data.get(node, b"")))
            if is_folder:
                waiting.append((node, f"{prefix}{name}/"))
    return tuple(sorted(found))


def states(ops: list[Op], start: int, folders: set[int], *, most_lost: int) -> Iterator[Tree]:
    """Yield the tree after each prefix of ``ops`` from ``start`` on, with up to ``most_lost`` losses in each."""
    pending: list[int] = []
    for end in range(start, len(ops) + 1):
        yield tree_after(ops[:end], {}, folders)
        choices = [[(number, how) for how in ways_to_lose(ops[number])] for number in pending]
        for count in range(1, most_lost + 1):
            for some in itertools.combinations(choices, count):
                for lost in itertools.product(*some):
                    yield tree_after(ops[:end], dict(lost), folders)
        if end < len(ops):
            op = ops[end]
            if op.kind == "flush data":
                pending = [n for n in pending if ops[n].kind != "data" or ops[n].node != op.node]
            elif op.kind == "flush names":
                pending = [n for n in pending if op.node not in _folders_of(ops[n])]
            else:
                pending.append(end)


def ways_to_lose(op: Op) -> tuple[str, ...]:
    return ("empty", "half", "zeros") if op.kind == "data" else ("lost",)


def _folders_of(op: Op) -> tuple[int, ...]:
    return (op.folder, op.to_folder) if op.kind == "move" else (op.folder,)


# ---- operations


def host_files(step: int, version: str = "") -> dict[str, bytes]:
    return {
        "model.safetensors": f"weights {step}{version}".encode(),
        "optimizer.pt": f"moments {step}{version}".encode(),
        "scheduler.pt": b"rate",
        "rng_state.pth": b"random",
        "trainer_state.json": json.dumps({"global_step": step, "log_history": []}).encode(),
    }


def files_of_two_ranks(step: int) -> dict[str, bytes]:
    files = host_files(step)
    state = files.pop("rng_state.pth")
    return {**files, "rng_state_0.pth": state, "rng_state_1.pth": state}


class Run:
    """A run folder with the checkpoints 2, the best, and 4; and what a training does with it."""

    def __init__(self, folder: Path, *, flush: bool, staged: bool) -> None:
        self.folder, self.flush, self.staged = folder, flush, staged
        folder.mkdir()
        self.ledger = CheckpointLedger(str(folder), "run", [], "eval_loss")
        for step in (2, 4):
            self.save(step)

    def save(
        self, step: int, version: str = "", *, publishes: bool = True, second_writes_at: int | None = None
    ) -> None:
        """Save as the trainer does: host files, sidecar, manifest, name.

        With ``second_writes_at`` a second rank writes its file before the first one's file of that number.
        """
        place = staging_folder(self.folder) if self.staged else self.folder
        folder = place / f"checkpoint-{step}"
        self.ledger.add(step, {2: 0.1}.get(step, 0.5))
        sidecar = self.ledger.sidecar(step, metric_name="eval_loss", greater_is_better=False)
        if not self.staged:
            set_aside(self.folder, step, flush=self.flush)
        folder.mkdir(parents=True)
        if not self.staged:
            write_sidecar(folder, sidecar, flush=self.flush)
        files = host_files(step, version)
        if second_writes_at is not None:
            files = files_of_two_ranks(step)
            last = ("rng_state_1.pth", files.pop("rng_state_1.pth"))
            items = list(files.items())
            files = dict([*items[:second_writes_at], last, *items[second_writes_at:]])
        for name, data in files.items():
            descriptor = os.open(folder / name, os.O_CREAT | os.O_WRONLY)
            os.write(descriptor, data)
            os.close(descriptor)
        write_sidecar(folder, sidecar, flush=self.flush)
        manifest = build_manifest(
            folder,
            step=step,
            run_id="run",
            sequence=sidecar.sequence,
            world_size=1 if second_writes_at is None else 2,
            weights=True,
            training_state=True,
        )
        write_manifest(folder, manifest, flush=self.flush)
        if not self.staged:
            remove_aside(self.folder, step, flush=self.flush)
        elif publishes:
            publish(self.folder, step, flush=self.flush)

    def rotate(self) -> None:
        self.save(6)
        delete_checkpoint(self.folder / "checkpoint-4", self.folder)

    def roll_back(self) -> None:
        quarantine(self.folder / "checkpoint-4", reason="It diverged.", onset_step=3, flush=self.flush)
        self.save(6)

    def suspect(self) -> None:
        mark_suspect(self.folder / "checkpoint-4", reason="The loss rises.", flush=self.flush)
        clear_suspect(self.folder / "checkpoint-4", flush=self.flush)

    def resume(self) -> None:
        recover(self.folder)
        self.save(8)


@dataclass(frozen=True)
class Operation:
    """One thing that a training does, and which checkpoints must be complete whenever it is interrupted."""

    name: str
    act: Callable[[Run], None]
    prepare: Callable[[Run], None] = lambda run: None
    kept: tuple[int, ...] = (2, 4)


OPERATIONS = (
    Operation("save", lambda run: run.save(6)),
    Operation("save a step again", lambda run: run.save(4, " again")),
    Operation("save and delete an older one", Run.rotate, kept=(2,)),
    Operation("quarantine and save", Run.roll_back, kept=(2,)),
    Operation("mark as suspect and clear", Run.suspect, kept=(2,)),
    Operation("resume after a kill", Run.resume, lambda run: run.save(6, publishes=False)),
    *(
        Operation(
            f"save by two ranks, the second writes at {at}",
            lambda run, at=at: run.save(6, second_writes_at=at),
        )
        for at in range(6)
    ),
)


@dataclass
class Table:
    """How many states were tried, how many of them differ, and what was wrong in any."""

    tried: int = 0
    different: int = 0
    wrong: list[str] = field(default_factory=list)


def explore(
    work: Path, operation: Operation, *, staged: bool, flush: bool, most_lost: int, stale: bool = False
) -> Table:
    """Try every state of ``operation``.

    Args:
        work: An empty folder to work in, best in memory.
        operation: What to do.
        staged: Whether folders can be renamed; else checkpoints are written in place.
        flush: Whether everything is flushed. Only then a power failure promises something.
        most_lost: How many unflushed operations are lost at most; 0 tries kills alone.
        stale: Whether the run folder lists names that are gone, as network file systems do.
    """
    run = Run(work / "run", flush=flush, staged=staged)
    operation.prepare(run)
    with recording(run.folder, renames=staged) as recorder:
        start = len(recorder.ops)
        operation.act(run)
    known = {op.name for op in recorder.ops if op.kind == "name" and op.folder == ROOT}
    known |= {op.to_name for op in recorder.ops if op.kind == "move" and op.to_folder == ROOT}
    table, seen = Table(), set()
    for tree in states(recorder.ops, start, recorder.folders, most_lost=most_lost):
        table.tried += 1
        if hash(tree) in seen:
            continue
        seen.add(hash(tree))
        table.different += 1
        problem = problem_of(work / "state", tree, operation.kept, known if stale else set(), renames=staged)
        if problem is not None:
            table.wrong.append(f"{operation.name}: {problem} in {[name for name, _ in tree]}")
    shutil.rmtree(run.folder)
    return table


class _Gone:
    """An entry of a listing whose file was removed meanwhile."""

    def __init__(self, folder: str, name: str) -> None:
        self.name, self.path = name, os.path.join(folder, name)

    def is_symlink(self) -> bool:
        return False

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return True

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        return os.stat(self.path)


@contextlib.contextmanager
def stale_listing(run: Path, known: set[str]) -> Iterator[None]:
    """List the ``known`` names in ``run`` even where they are gone."""
    listdir, scandir = os.listdir, os.scandir

    def stale_listdir(path: Any = ".") -> list[str]:
        names = listdir(path)
        return sorted({*names, *known}) if Path(path) == run else names

    @contextlib.contextmanager
    def stale_scandir(path: Any) -> Iterator[Iterator[Any]]:
        with scandir(path) as entries:
            there = list(entries)
            gone = known - {entry.name for entry in there} if Path(path) == run else set()
            yield iter([*there, *(_Gone(os.fspath(path), name) for name in sorted(gone))])

    os.listdir, os.scandir = stale_listdir, stale_scandir  # type: ignore[assignment]
    try:
        yield
    finally:
        os.listdir, os.scandir = listdir, scandir


@contextlib.contextmanager
def folders_stay(renames: bool) -> Iterator[None]:
    """Refuse to rename folders, unless the disk ``renames`` them."""
    rename = os.rename

    def refuse(source: Any, target: Any) -> None:
        if os.path.isdir(source):
            raise OSError(18, "Invalid cross-device link")
        rename(source, target)

    os.rename = rename if renames else refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        os.rename = rename


def problem_of(
    folder: Path, tree: Tree, kept: tuple[int, ...], stale: set[str], *, renames: bool
) -> str | None:
    """Return what a start finds wrong in a run folder that holds ``tree`` and lists ``stale`` names too."""
    folder.mkdir()
    try:
        for name, data in tree:
            if data is None:
                os.mkdir(folder / name)
        for name, data in tree:
            if data is not None:
                Path(folder, name).write_bytes(data)
        with folders_stay(renames), stale_listing(folder, stale) if stale else contextlib.nullcontext():
            return _problem_at_a_start(folder, kept)
    finally:
        shutil.rmtree(folder)


def _problem_at_a_start(folder: Path, kept: tuple[int, ...]) -> str | None:
    if (problem := _false_completes(folder)) is not None:
        return problem
    recover(folder)
    if (problem := _false_completes(folder)) is not None:
        return f"{problem}, after recovery"
    complete = {each.step for each in find_checkpoints(folder) if each.verdict.status == "complete"}
    if not complete.issuperset(kept):
        return f"only {sorted(complete)} are complete after recovery"
    state = resume_state(folder)
    if state.checkpoint is None or state.checkpoint.step != max(complete):
        return f"nothing or an older one is resumed: {state.reason}"
    return None


def _false_completes(folder: Path) -> str | None:
    for each in find_checkpoints(folder):
        if each.verdict.status == "complete":
            files = [path for path in Path(each.path).iterdir() if not path.name.startswith("_divguard_tmp")]
            found = {path.name: path.read_bytes() for path in files if path.name not in OURS}
            if found not in (
                host_files(each.step),
                host_files(each.step, " again"),
                files_of_two_ranks(each.step),
            ):
                return f"checkpoint-{each.step} counts as complete and is not"
    return None
