"""All cells of the benchmark, its two halves, and the choice among them.

A kind belongs to one half for good. The split is by kind, not by seed: what was chosen on the design half has seen
neither the models nor the faults, switches and healthy runs of the judging half.
"""

from __future__ import annotations

import fnmatch
import hashlib

from benchmarks.recovery.cells import Cell
from benchmarks.recovery.faults import FAULTS, TIMES
from benchmarks.recovery.healthy import HEALTHY
from benchmarks.recovery.models import MODELS_OF_HALF
from benchmarks.recovery.switches import SWITCHES


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


def select(
    half: str, only: str | None, seed: int = 1, *, short: bool = False, sample: int | None = None
) -> list[Cell]:
    """Return the cells of a half (or of ``both``), those of a short run, or those whose name a pattern fits.

    With ``sample`` so many of them, always the same ones, drawn over all kinds, models and times.

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
    if sample is not None and sample < len(cells):
        drawn = set(sorted(cells, key=lambda cell: hashlib.sha256(cell.name.encode()).hexdigest())[:sample])
        cells = [cell for cell in cells if cell in drawn]
    return cells
