"""One cell of the benchmark: a fault, a switch or a healthy run, with a model; and what its runs train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.recovery.faults import FAULTS, TIMES, Fault, bad_steps
from benchmarks.recovery.healthy import HEALTHY
from benchmarks.recovery.models import TASKS, Task
from benchmarks.recovery.switches import STEPS, SWITCHES, Schedule, steady

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
        args |= {"max_grad_norm": 0.0, **task.unclipped_args}
    if cell.group == "switch":
        schedule = SWITCHES[cell.kind].schedule
    if cell.group == "healthy":
        run = HEALTHY[cell.kind]
        args |= run.args
        schedule, objective, rows, batch = run.schedule, run.objective, run.rows, run.batch or batch
    accumulation = int(args.get("gradient_accumulation_steps", 1))
    return Plan(task, cell.seed, args, schedule, objective, rows or STEPS * batch * accumulation, batch)
