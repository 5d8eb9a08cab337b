"""Score every rule on the labelled runs: false alarms, recall, premature alarms, delay.

Each rule sees each run value by value, once as it was logged and once for each ``--every`` as
a Trainer with that ``logging_steps`` would have logged it. The first error ends a run. Rates
are means over families of means over the runs of a family, since the runs of one family are
not independent. Writes ``table.md``, ``halves.md``, ``families.md``, ``tradeoff.md``, ``results.csv`` and
``picture.png``; the same corpus gives the same files.

    python -m benchmarks.detection.evaluate                   # all rules, 2 minutes
    python -m benchmarks.detection.evaluate --rules ours --every 1 10
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path

from benchmarks.detection.peers import PEERS
from benchmarks.detection.runs import CORPUS, Alarm, Run, Score, is_judging, read_runs, score
from hf_divguard.core.detection.registry import make_rule

OURS = {
    "adaptive": ("adaptive", {}),
    "window (10, 100, 2.0)": ("window", {}),
    "ema (0.1, 0.01, 2.0)": ("ema", {}),
    "nonfinite": ("nonfinite", {}),
}
SENSITIVITIES = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0)


def errors_of(name: str, **params: float) -> Callable[[], Alarm]:
    """Make one of our rules into an alarm: true when it has a finding of severity ``error``."""

    def make() -> Alarm:
        rule = make_rule(name, **params)
        takes_norm = name in ("adaptive", "nonfinite")

        def alarm(step: int, loss: float, grad_norm: float | None) -> bool:
            found = rule.observe(step, loss, grad_norm) if takes_norm else rule.observe(step, loss)  # type: ignore[call-arg]
            return found is not None and found.severity == "error"

        return alarm

    return make


def cell(value: float, digits: int = 3) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def table(results: dict[str, dict[str, Score]], settings: list[str]) -> str:
    """Return the scores as a markdown table, one row per rule."""
    head = ["rule"]
    for setting in settings:
        head += [f"{setting}: false", "recall", "premature", "delay 50 %", "90 %"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, by_setting in results.items():
        row = [f"**{name}**" if name in OURS else name]
        for setting in settings:
            s = by_setting[setting]
            row += [cell(s.false), cell(s.recall), cell(s.premature), cell(s.delay, 1), cell(s.delay_90, 0)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def family_table(scores: dict[str, Score]) -> str:
    """Return how one rule does on each family, for each setting."""
    lines = [
        "| family | " + " | ".join(f"{name}: false | recall | delay" for name in scores) + " |",
        "|---" * (1 + 3 * len(scores)) + "|",
    ]
    families = sorted({f for s in scores.values() for f in (*s.false_by_family, *s.recall_by_family)})
    for family in families:
        row = [family]
        for s in scores.values():
            row += [
                cell(s.false_by_family.get(family, math.nan), 2),
                cell(s.recall_by_family.get(family, math.nan), 2),
                cell(s.delay_by_family.get(family, math.nan), 0),
            ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def halves_table(runs: list[Run], settings: dict[str, tuple[list[Run], int]]) -> str:
    """Return how the adaptive rule does on the choosing half of the families and on the judging half."""
    families = [run.family for run in runs]
    lines = ["| half of the families | " + " | ".join(f"{name}: false | recall" for name in settings) + " |"]
    lines.append("|---" * (1 + 2 * len(settings)) + "|")
    for judging, name in ((False, "choosing"), (True, "judging")):
        row = [name]
        for chosen, every in settings.values():
            half = [run for run in chosen if is_judging(run.family, families) is judging]
            s = score(errors_of("adaptive"), half, every)
            row += [cell(s.false), cell(s.recall)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def draw(
    results: dict[str, dict[str, Score]], curve: list[tuple[float, Score]], setting: str, path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10.5, 5.8))
    axes.plot(
        [s.false for _, s in curve], [s.recall for _, s in curve], "-", color="tab:blue", lw=1, zorder=1
    )
    for sensitivity, s in curve:
        if sensitivity in (0.25, 0.55, 2.0, 5.0):
            axes.annotate(
                f"sensitivity {sensitivity:g}",
                (s.false, s.recall),
                fontsize=7,
                color="tab:blue",
                xytext=(6, -9),
                textcoords="offset points",
            )
    for number, (name, by_setting) in enumerate(results.items(), 1):
        s, is_ours = by_setting[setting], name in OURS
        color = "tab:blue" if is_ours else "tab:gray"
        axes.scatter(s.false, s.recall, s=150, color=color, zorder=2, label=f"{number}  {name}")
        axes.annotate(
            str(number), (s.false, s.recall), fontsize=7, color="white", ha="center", va="center", zorder=3
        )
    axes.set_xlabel("false alarms: share of healthy, shifted and spike-recovered runs (mean over families)")
    axes.set_ylabel("recall: share of failing runs found in time (mean over families)")
    axes.set_title(
        f"Every rule on the labelled runs, {setting}; the line is 1 with other sensitivities", fontsize=9
    )
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.05)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False, handlelength=0.8)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 10, 50], metavar="STEPS")
    parser.add_argument("--rules", choices=["all", "ours"], default="all")
    parser.add_argument("--out", type=Path, default=Path("docs/detection"))
    arguments = parser.parse_args(argv)

    runs = read_runs(arguments.corpus)
    generated = [run for run in runs if run.is_generated]
    public = [run for run in runs if not run.is_generated]
    settings: dict[str, tuple[list[Run], int]] = {
        ("every step" if every == 1 else f"every {every} steps"): (generated, every)
        for every in arguments.every
    }
    settings["public runs"] = (public, 1)
    settings["public runs, no spikes"] = ([run for run in public if run.label != "spike_recovered"], 1)

    rules: dict[str, Callable[[], Alarm]] = {
        name: errors_of(rule, **params) for name, (rule, params) in OURS.items()
    }
    if arguments.rules == "all":
        rules |= PEERS
    results: dict[str, dict[str, Score]] = {}
    for name, make in rules.items():
        results[name] = {setting: score(make, chosen, every) for setting, (chosen, every) in settings.items()}
        print(
            name,
            {k: (round(s.false, 3), round(s.recall, 3), s.delay) for k, s in results[name].items()},
            flush=True,
        )
    first = next(iter(settings))
    curves = {
        setting: [(s, score(errors_of("adaptive", sensitivity=s), *settings[setting])) for s in SENSITIVITIES]
        for setting in [*settings][:2]
    }

    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(table(results, list(settings)), encoding="utf-8")
    (out / "halves.md").write_text(halves_table(runs, settings), encoding="utf-8")
    (out / "families.md").write_text(family_table(results["adaptive"]), encoding="utf-8")
    lines = ["| sensitivity | " + " | ".join(f"{k}: false | recall | delay 50 %" for k in curves) + " |"]
    lines.append("|---" * (1 + 3 * len(curves)) + "|")
    for index, sensitivity in enumerate(SENSITIVITIES):
        row = [f"{sensitivity:g}"]
        for curve in curves.values():
            s = curve[index][1]
            row += [cell(s.false), cell(s.recall), cell(s.delay, 1)]
        lines.append("| " + " | ".join(row) + " |")
    (out / "tradeoff.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["rule", "setting", "false", "recall", "premature", "delay_50", "delay_90"])
        for name, by_setting in results.items():
            for setting, s in by_setting.items():
                writer.writerow(
                    [
                        name,
                        setting,
                        *(f"{v:.4g}" for v in (s.false, s.recall, s.premature, s.delay, s.delay_90)),
                    ]
                )
    draw(results, curves[first], first, out / "picture.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
