"""The cells of the benchmark: which fault, switch or healthy run with which model, and in which half.

A kind belongs to one half for good. The split is by kind, not by seed: what was chosen on the design half has seen
neither the models nor the faults, switches and healthy runs of the judging half.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.recovery.faults import FAULTS, TIMES, Fault, bad_steps
from benchmarks.recovery.healthy import HEALTHY
from benchmarks.recovery.models import MODELS_OF_HALF, TASKS, Task
from benchmarks.recovery.switches import SWITCHES, Schedule, steady

STEPS = 240
HALVES = ("design", "judge")
Group = Literal["fault", "switch", "healthy"]


@dataclass(frozen=True)
class Cell:
    """One comparison of a guarded run with the unguarded one.

    Args:
        group: Fault, switch or healthy run.
        kind: Name of its kind.
        half: Half of the benchmark.
        task: Name of its model.
        time: When a fault acts, ``""`` otherwise.
        seed: Seed of weights, data order and dropout.
    """

    group: Group
    kind: str
    half: str
    task: str
    time: str = ""
    seed: int = 1

    @property
    def name(self) -> str:
        """Name of the cell, by which ``--only`` selects it."""
        return "/".join(filter(None, (self.group, self.kind, self.task, self.time.replace(" ", "-"))))

    @property
    def fault(self) -> Fault | None:
        """The fault, where it is one."""
        return FAULTS[self.kind] if self.group == "fault" else None

    @property
    def bad_steps(self) -> list[int]:
        """Steps in which the fault acts."""
        if self.fault is None:
            return []
        return bad_steps(self.fault, self.time, STEPS, jitter(self.task, self.time, self.seed))

    @property
    def title(self) -> str:
        """What the cell is, for the report."""
        kinds: dict[str, Any] = {"fault": FAULTS, "switch": SWITCHES, "healthy": HEALTHY}[self.group]
        return str(kinds[self.kind].title)


def jitter(task: str, time: str, seed: int) -> int:
    """Return by how many steps the faults of a model and a time are moved, the same for all faults."""
    return (3 * list(TASKS).index(task) + 5 * TIMES.index(time) + 7 * seed) % 11


@dataclass(frozen=True)
class Plan:
    """What a run trains, whoever guards it.

    Args:
        task: The model with its data.
        seed: Seed of weights, data order and dropout.
        args: Arguments of the Trainer that differ from the common ones.
        schedule: The data.
        objective: The loss, where it is not that of the model.
        rows: Number of rows, where there are several epochs.
        batch: Rows of a micro-batch.
    """

    task: Task
    seed: int
    args: dict[str, Any]
    schedule: Schedule
    objective: Callable[..., Any] | None
    rows: int
    batch: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return int(self.args.get("gradient_accumulation_steps", 1))


def plan_of(cell: Cell) -> Plan:
    """Return what the runs of a cell train."""
    task = TASKS[cell.task]
    args, schedule, objective = dict(task.args), steady, None
    rows, batch = None, task.batch
    if cell.fault is not None and not cell.fault.clips:
        args["max_grad_norm"] = 0.0
    if cell.group == "switch":
        schedule = SWITCHES[cell.kind].schedule
    if cell.group == "healthy":
        run = HEALTHY[cell.kind]
        args |= run.args
        schedule, objective, rows, batch = run.schedule, run.objective, run.rows, run.batch or batch
    accumulation = int(args.get("gradient_accumulation_steps", 1))
    return Plan(task, cell.seed, args, schedule, objective, rows or STEPS * batch * accumulation, batch)


def all_cells(seed: int = 1) -> list[Cell]:
    """Return every cell of both halves."""
    cells = [
        Cell("fault", fault.name, fault.half, task, time, seed)
        for fault in FAULTS.values()
        for task in MODELS_OF_HALF[fault.half]
        for time in TIMES
    ]
    cells += [
        Cell("switch", switch.name, switch.half, task, seed=seed)
        for switch in SWITCHES.values()
        for task in MODELS_OF_HALF[switch.half]
    ]
    cells += [Cell("healthy", run.name, run.half, run.task, seed=seed) for run in HEALTHY.values()]
    return cells


SHORT = (
    "fault/rate_x30/decoder/middle",
    "fault/nan_loss/vit/late",
    "fault/weight_noise/vit/middle",
    "fault/random_labels/decoder/middle",
    "switch/new_middle/decoder",
    "switch/new_middle/vit",
    "healthy/grpo/decoder",
    "healthy/batch_norm/resnet",
)
"""The cells of a short run, all of the design half."""


def select(half: str, only: str | None, seed: int = 1, *, short: bool = False) -> list[Cell]:
    """Return the cells of a half (or of ``both``), those of a short run, or those whose name a pattern fits.

    Raises:
        ValueError: If no cell is selected.
    """
    cells = [cell for cell in all_cells(seed) if half in (cell.half, "both")]
    if short:
        cells = [cell for cell in cells if cell.name in SHORT]
    if only:
        cells = [cell for cell in cells if fnmatch.fnmatch(cell.name, f"*{only}*")]
    if not cells:
        example = "fault/rate_x30/decoder/middle"
        raise ValueError(
            f"`--only` must fit a cell of the half '{half}', found none that fits '{only}'. Names are like '{example}'."
        )
    return cells
