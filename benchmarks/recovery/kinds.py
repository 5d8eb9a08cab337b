"""The page that lists what is judged: models, faults, switches and healthy runs, each with its half."""

from __future__ import annotations

from benchmarks.recovery.cells import STEPS
from benchmarks.recovery.faults import FAULTS, GAP, TIMES
from benchmarks.recovery.healthy import HEALTHY
from benchmarks.recovery.models import MODELS_OF_HALF, TASKS
from benchmarks.recovery.selection import all_cells
from benchmarks.recovery.switches import SWITCHES

INTRO = f"""# What is judged, and how

Written by `python -m benchmarks.recovery --write`. [table.md](table.md) has the figures.

Each cell is a run of {STEPS} steps of a tiny model on synthetic data, trained up to four times with the same seed:

- **stock**: by the stock Trainer, with the fault;
- **oracle**: by the stock Trainer, without the fault and without exactly the updates that the fault made bad. It reads
  the same batches and counts the same steps. A fault of the weights or of the optimizer makes no update bad, so its
  oracle is the run without it. Switches and healthy runs have no bad updates: the stock run is their oracle;
- **rollback** and **stop**: by a `DivGuardTrainer` with that action and the `adaptive` detector, without a hint.

What counts is the loss of the final model on held-out rows of the data with which the run ends, over the oracle's. It
is measured outside of the Trainer. Faults act through callbacks, hooks and the data collator, and go by the step of the
run; nothing in them depends on the package.

**Two halves.** Constants are chosen on the *design* half, figures are reported on the *judge* half. The split is by
kind and is fixed in the code: the halves share no model in their faults and switches, no fault, no switch and no
healthy kind. Whoever looks at single cells of the judging half to change a constant has used it up. What was known of
single cells before the present rules: going back and forth every 15 steps was rolled back on the masked LM (the kind
has moved to the design half, another has taken its place); damaged moments of Adam, late and twice, were a miss on the
masked LM; and so was the rate x100 with accumulation, late. With `stop`, two healthy runs of it were ended, a loss that
rises through the run and SGD at the edge of stability; both kinds have moved to the design half. Three faults
of the masked LM were looked at for the last rule, damage soon after one high batch: the rate x100, late; half of the
weights lost, late twice; one weight of every matrix hit, late twice. The rule for wrong labels was built with the
labels that are replaced by the next one in view, all 18 runs, so these are no independent figures; the design half has
labels at random and labels of other rows.

Each fault acts at six times: {", ".join(TIMES)}. Early is after 15 % of the steps, middle after 50 %, late after
85 %, each moved by up to 10 steps; twice means once more, {GAP} sound steps after its end.
"""

COLUMNS = """- **sound steps lost**: updates that were undone, skipped or never made, less the bad ones.
- **delay**: steps from the first bad update to the first action: a rollback, a skipped update, a stop.
- **harmed**: the guarded run ends more than 1 % above the unguarded one.
- **touched**: the weights at the end are not those of the stock run to the bit, or the guard acted.
- **cause right**: the first cause that was named, in an event or a finding, is that of the fault. Faults with NaN or
  infinity need no cause and are left out.
"""


def page() -> str:
    """Return the page, in Markdown."""
    cells = all_cells()
    counts = ", ".join(
        f"{sum(cell.group == group for cell in cells)} {label}"
        for group, label in (("fault", "with faults"), ("switch", "with switches"), ("healthy", "healthy"))
    )
    models = ["| name | model | half |", "|---|---|---|"]
    for task in TASKS.values():
        halves = [half for half, names in MODELS_OF_HALF.items() if task.name in names]
        models.append(f"| `{task.name}` | {task.title} | {''.join(halves) or '-'} |")
    faults = ["| name | fault | steps | cause | half |", "|---|---|---|---|---|"]
    faults += [
        f"| `{fault.name}` | {fault.title} | {fault.lasts} | {fault.cause or 'not finite'} | {fault.half} |"
        for fault in FAULTS.values()
    ]
    switches = ["| name | data | half |", "|---|---|---|"]
    switches += [f"| `{switch.name}` | {switch.title} | {switch.half} |" for switch in SWITCHES.values()]
    healthy = ["| name | run | model | half |", "|---|---|---|---|"]
    healthy += [f"| `{run.name}` | {run.title} | `{run.task}` | {run.half} |" for run in HEALTHY.values()]
    parts = [INTRO, f"In all {len(cells)} cells: {counts}.\n"]
    for title, lines in (
        ("Figures", [COLUMNS.rstrip()]),
        (f"The {len(models) - 2} models", models),
        (f"The {len(FAULTS)} faults", faults),
        (f"The {len(SWITCHES)} switches", switches),
        (f"The {len(HEALTHY)} healthy runs", healthy),
    ):
        parts.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)
