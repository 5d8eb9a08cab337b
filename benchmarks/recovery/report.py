"""The report: what the cells say, as Markdown, and each cell as a line of CSV."""

from __future__ import annotations

import csv
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers

from benchmarks.recovery.judge import Row

BEYOND = 1.05
INTRO = """# What the guard does to runs

Written by `python -m benchmarks.recovery --write`. Losses are those of the final model on held-out rows, over that of
the *oracle*: the same run that leaves out exactly the bad updates and nothing else. Switches and healthy runs have
nothing that is bad; a guard has to leave them alone, to the bit.
"""


def number(value: float | None) -> str:
    """Return a ratio or a count for the tables."""
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    if isinstance(value, int) or (value == int(value) and value >= 10):
        return str(int(value))
    return f"{value:.3f}" if value < 10 else f"{value:.0f}"


def median(values: Iterable[float | None]) -> float | None:
    """Return the median; NaN counts as worst, ``None`` does not count."""
    found = sorted(
        (value for value in values if value is not None), key=lambda v: math.inf if math.isnan(v) else v
    )
    if not found:
        return None
    low, high = found[(len(found) - 1) // 2], found[len(found) // 2]
    return low if low == high or math.isnan(high) else statistics.mean((low, high))


def worst(values: Iterable[float]) -> float:
    """Return the largest value; NaN is larger than any."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)


def beyond(rows: list[Row], variant: str) -> int:
    """Return how many runs ended above the bound, NaN included."""
    return sum(not row[variant] <= BEYOND for row in rows)


def share(count: int, rows: list[Row]) -> str:
    """Return a count with its percentage."""
    return f"{count} of {len(rows)} ({100 * count / len(rows):.0f} %)" if rows else "-"


def summary(rows: list[Row]) -> list[str]:
    """Return the figures that are judged, with the aims beside them."""
    faults = [row for row in rows if row["group"] == "fault"]
    quiet = {group: [row for row in rows if row["group"] == group] for group in ("switch", "healthy")}
    guarded = [row for row in rows if "rollback" in row]
    lines = ["| figure | stock | guarded | aim |", "|---|---|---|---|"]
    if faults:
        lines += _fault_lines(faults)
    for group, label in (("switch", "switches"), ("healthy", "healthy runs")):
        if quiet[group] and "touched" in quiet[group][0]:
            touched = sum(row["touched"] or row["acted"] for row in quiet[group])
            lines.append(
                f"| {label} touched by a rollback or in a single bit | - | {share(touched, quiet[group])} | 0 |"
            )
        if quiet[group] and "stop_touched" in quiet[group][0]:
            ended = sum(row["stop_touched"] for row in quiet[group])
            lines.append(f"| {label} ended or touched by `stop` | - | {share(ended, quiet[group])} | 0 |")
    if guarded:
        harmed = sum(row["harmed"] for row in guarded)
        lines.append(f"| worse than the unguarded run by more than 1 % | - | {share(harmed, guarded)} | 0 |")
    for label, some in (
        ("faults", faults),
        ("switches and healthy runs", [*quiet["switch"], *quiet["healthy"]]),
    ):
        named = [row for row in some if row["cause_right"] is not None]
        if named:
            right = sum(row["cause_right"] for row in named)
            lines.append(f"| cause right where one was named, {label} | - | {share(right, named)} | 95 % |")
    failed = sum(bool(row["error"]) for row in rows)
    lines.append(f"| runs that ended in an error of their own | - | {failed} | 0 |")
    return lines


def _fault_lines(faults: list[Row]) -> list[str]:
    stock = [row["stock"] for row in faults]
    has = "rollback" in faults[0]
    back = [row["rollback"] for row in faults] if has else []
    cells: list[tuple[str, str, str, str]] = [
        ("faults, median over the oracle", number(median(stock)), number(median(back)), "1.010"),
        (
            f"faults above {BEYOND} of the oracle",
            share(beyond(faults, "stock"), faults),
            share(beyond(faults, "rollback"), faults) if has else "-",
            "5 %",
        ),
        ("faults, worst", number(worst(stock)), number(worst(back)) if back else "-", ""),
    ]
    if has:
        acted = [row for row in faults if row["rollbacks"]]
        plain = [row for row in acted if row["plain"]]
        early = sum(row["too_early"] for row in faults)
        cells += [
            (
                "sound steps lost, median where it rolled back",
                "-",
                number(median(row["lost"] for row in acted)),
                "10",
            ),
            ("the same, plain faults", "-", number(median(row["lost"] for row in plain)), "3"),
            (
                "steps from the onset to the first action, median",
                "-",
                number(median(row["rollback_delay"] for row in faults)),
                "",
            ),
            ("acted before the onset", "-", share(early, faults), "0"),
        ]
    if "stop_delay" in faults[0]:
        hit = [row for row in faults if row["cause_expected"] == "weights"]
        delays = [row["stop_delay"] for row in hit]
        found = sum(row["stop_delay"] is not None for row in faults)
        cells += [
            ("faults found by `stop`", "-", share(found, faults), ""),
            (
                "steps from the onset to the stop, median, faults of the weights",
                "-",
                number(median(delays)),
                "5",
            ),
        ]
    return ["| " + " | ".join(cell) + " |" for cell in cells]


def by(rows: list[Row], key: Callable[[Row], str], label: str) -> list[str]:
    """Return a table of the faults, grouped."""
    lines = [
        f"| {label} | runs | stock: median, worst | above {BEYOND} | rollback: median, worst | above {BEYOND} | "
        "harmed | sound steps lost | delay: rollback, stop |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(map(key, rows)):
        some = [row for row in rows if key(row) == name]
        stock, back = [row["stock"] for row in some], [row.get("rollback", math.nan) for row in some]
        lines.append(
            f"| {name} | {len(some)} | {number(median(stock))}, {number(worst(stock))} | {beyond(some, 'stock')} | "
            f"**{number(median(back))}**, {number(worst(back))} | {sum(not value <= BEYOND for value in back)} | "
            f"{sum(row.get('harmed', False) for row in some)} | {number(median(row.get('lost') for row in some))} | "
            f"{number(median(row.get('rollback_delay') for row in some))}, "
            f"{number(median(row.get('stop_delay') for row in some))} |"
        )
    return lines


def touched(rows: list[Row]) -> list[str]:
    """Return the switches and healthy runs that were not left alone."""
    found = [
        row
        for row in rows
        if row["group"] != "fault" and (row.get("touched") or row.get("acted") or row.get("stop_touched"))
    ]
    if not found:
        return ["None."]
    lines = [
        "| run | what it is | rolled back (from step to step) | loss over stock | stopped at |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        end = "; gave up" if row.get("gave_up") else ""
        lines.append(
            f"| {row['name']} | {row['title']} | {row.get('where') or '-'}{end} | {number(row.get('rollback'))} | "
            f"{number(row.get('stopped_at'))} |"
        )
    return lines


def markdown(rows: list[Row], note: str) -> str:
    """Return the report."""
    parts = [INTRO]
    for half in dict.fromkeys(row["half"] for row in rows):
        some = [row for row in rows if row["half"] == half]
        faults = [row for row in some if row["group"] == "fault"]
        parts.append(f"## The {'judging' if half == 'judge' else 'design'} half\n")
        parts.append("\n".join(summary(some)) + "\n")
        if faults:
            parts += ["### By fault\n", "\n".join(by(faults, lambda row: row["title"], "fault")) + "\n"]
            parts += ["### By model\n", "\n".join(by(faults, lambda row: row["model"], "model")) + "\n"]
            parts += ["### By time\n", "\n".join(by(faults, lambda row: row["time"], "time")) + "\n"]
        parts += ["### Switches and healthy runs that were touched\n", "\n".join(touched(some)) + "\n"]
    return "\n".join([*parts, conditions(note)])


def conditions(note: str) -> str:
    """Return with what the figures were made."""
    return (
        f"{note} {platform.machine()} with {os.cpu_count()} cores ({platform.system()}), one thread, Python "
        f"{platform.python_version()}, PyTorch {torch.__version__}, Transformers {transformers.__version__}.\n"
    )


def write(rows: list[Row], note: str, folder: Path, name: str = "table") -> None:
    """Write the report, and the cells as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown(rows, note), encoding="utf-8")
    names = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
            )
