"""One run that is killed and resumed until it is complete, and what went wrong in it."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from pathlib import Path

from benchmarks.kill_resume.disk import ANY_CHECKPOINT, Inspection, ask_a_child, digests, inspect
from benchmarks.kill_resume.killer import Life, Seen, follow
from benchmarks.kill_resume.series import BEST, SAVE_STEPS, STEPS, Aim, Counts, Series


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
        dataclasses.replace(series, trainer="stock"), run_dir, root, aim=None, resume=False, limit=None
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


def run_once(
    series: Series,
    reference: Reference,
    root: Path,
    generator: random.Random,
    budget: int,
    first: int,
    keep: Path | None,
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
        resume = any(ANY_CHECKPOINT.fullmatch(path.name) for path in run_dir.iterdir())
        life = Life(series, run_dir, root, aim=aim, resume=resume)
        seen = follow(life, aim, resume, generator)
        if seen.done is None and not seen.killed:
            counts.resume_failed += 1
            counts.notes.append(f"{series.label}: {seen.failed}")
            failures += 1
            broken = (
                max((step for step in before.folders if step not in before.complete), default=None)
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
        _count_kill(series, seen, before, published, reference, run_dir, counts, keep)
    bad = counts.wrong_place + counts.best_lost + (counts.runs - counts.equal)
    if keep is not None and series.is_ours and (bad or counts.resume_failed):
        shutil.copytree(root, keep / root.name, dirs_exist_ok=True)
    shutil.rmtree(root)
    return counts


def _check_place(
    series: Series, started: int, before: Inspection, unpublished: set[int], counts: Counts
) -> None:
    # A checkpoint that was being saved may be complete already, in its place or in the staging folder, although the
    # training had not got to saying so: then both it and the one before are right.
    right = {max((step for step in before.complete if step not in unpublished), default=0)}
    right |= {
        step
        for step in (*before.complete, *before.staged_complete)
        if step in unpublished and step > max(right)
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
    keep: Path | None,
) -> None:
    counts.inside_save += seen.saving is not None
    counts.inside_publish += seen.phase == "publish"
    counts.inside_delete += seen.phase == "delete"
    newest = max(found.counted if series.is_ours else found.folders, default=None)
    if newest is not None and newest not in found.complete:
        counts.broken_newest += 1
        counts.notes.append(f"{series.label}: newest {newest} is broken, found {found}")
    counts.partial_under_name += any(step not in found.complete for step in found.folders)
    count = BEST if series.is_ours else 1
    present = set(found.complete) & set(found.counted) if series.is_ours else set(found.complete)
    in_flight = {seen.saving} if seen.saving is not None else set()
    candidates = [reference.best(published, count), reference.best(published | in_flight, count)]
    if not any(best <= present for best in candidates):
        counts.best_lost += 1
        if keep is not None and series.is_ours:
            shutil.copytree(
                run_dir,
                keep / f"best-lost-{time.time_ns()}",
                ignore=shutil.ignore_patterns("*.pt", "*.safetensors"),
            )
        counts.notes.append(f"{series.label}: best {candidates} not in {found}, saving {seen.saving}")
