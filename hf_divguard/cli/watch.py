"""The command ``watch``: a view of a running job in the terminal."""

from __future__ import annotations

import os
import time
from typing import Any

from hf_divguard.cli.compare import losses_of, speaks_unicode
from hf_divguard.cli.condition import Condition, condition_of
from hf_divguard.cli.event_files import read_event_files
from hf_divguard.cli.exits import OK, USAGE, CommandError
from hf_divguard.cli.folders import age_of, run_folder, saved_at
from hf_divguard.cli.keeping import Survey, survey
from hf_divguard.cli.output import duration_in_words, number_in_words, print_json, printable
from hf_divguard.cli.records import whole, words
from hf_divguard.cli.sparkline import sparkline
from hf_divguard.storage.events import read_events

__all__ = ["run_watch"]

_MOST_EVENT_FILES = 20
_ENDED = ("finished", "diverged", "failed")


def run_watch(options: Any) -> int:
    """Show a run until it ends, or once."""
    if options.interval <= 0:
        raise CommandError(f"`--interval` must be above 0 seconds, got {options.interval:g}.", USAGE)
    run_folder(options.dir)
    if options.json:
        print_json("watch", _content(options))
        return OK
    if options.once:
        print("\n".join(_frame(options)[0]))
        return OK
    try:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        raise CommandError(
            "`watch` needs the package rich to draw in place. Run `pip install rich`, or use `watch --once`."
        ) from None
    lines, state = _frame(options)
    with Live(Text("\n".join(lines)), console=Console(highlight=False), auto_refresh=False) as live:
        while state not in _ENDED:
            time.sleep(options.interval)
            lines, state = _frame(options)
            live.update(Text("\n".join(lines)), refresh=True)
    return OK


def _losses(folder: str) -> list[tuple[int, float]]:
    """Return the losses of the checkpoints, or those of the event files of TensorBoard if they are further."""
    saved = losses_of(folder)
    files = []
    for top, _, names in os.walk(os.path.join(folder, "runs")):
        files += [os.path.join(top, name) for name in names if ".tfevents." in name]
    try:
        rows, _ = read_event_files(sorted(files)[-_MOST_EVENT_FILES:])
    except CommandError:
        rows = []
    logged = sorted((row["step"], row["train/loss"]) for row in rows if "train/loss" in row)
    return logged if logged and (not saved or logged[-1][0] > saved[-1][0]) else saved


def _seen(options: Any) -> tuple[Survey, Condition, list[tuple[int, float]], list[dict[str, Any]]]:
    seen = survey(options.dir, options.metric, options.greater)
    events = [each for each in read_events(options.dir) if isinstance(each.get("event"), str)]
    return seen, condition_of(seen), _losses(options.dir), events


def _content(options: Any) -> dict[str, Any]:
    seen, condition, losses, events = _seen(options)
    return {
        "dir": options.dir,
        "state": condition.state,
        "reason": condition.reason,
        "step": losses[-1][0] if losses else condition.step,
        "max_steps": condition.progress.max_steps,
        "losses": [[step, loss] for step, loss in losses[-options.values :]],
        "events": events[-options.rows :],
        "checkpoints": [
            {"path": each.path, "step": each.step, "verdict": each.verdict.status, "metric": each.metric}
            for each in seen.found[-options.rows :]
        ],
    }


def _frame(options: Any) -> tuple[list[str], str]:
    """Return the lines to show, and the state of the run."""
    seen, condition, losses, events = _seen(options)
    lines = [f"{printable(options.dir)}: {condition.state}. {printable(condition.reason)}", ""]
    shown = losses[-options.values :]
    if shown:
        curve = sparkline([loss for _, loss in shown], 60, ascii_only=not speaks_unicode())
        span = f"steps {shown[0][0]} to {shown[-1][0]}"
        lines.append(f"loss         {curve} {number_in_words(shown[-1][1])} ({span})")
    else:
        lines.append("loss         nothing is logged yet")
    findings = [_event_line(each) for each in events[-options.rows :]]
    fault = condition.divergence
    if fault is not None and not events:
        findings = [printable(f"step {fault.step}: {fault.kind}, found by a replay: {fault.message}")]
    lines += _listed("findings", findings, "none")
    newest = seen.found[-options.rows :]
    lines += _listed("checkpoints", [_checkpoint_line(each, seen) for each in reversed(newest)], "none yet")
    return lines, condition.state


def _listed(name: str, rows: list[str], empty: str) -> list[str]:
    rows = rows or [empty]
    return [f"{name if number == 0 else '':<12} {row}" for number, row in enumerate(rows)]


def _event_line(event: dict[str, Any]) -> str:
    finding = event.get("finding")
    message = words(finding.get("message"), 200) if isinstance(finding, dict) else None
    step = whole(event.get("step"))
    text = message or words(event.get("reason"), 200)
    return printable(
        f"step {step if step is not None else '-'}: {event['event']}{f': {text}' if text else ''}"
    )


def _checkpoint_line(each: Any, seen: Survey) -> str:
    age = age_of(saved_at(each.path))
    metric = seen.metrics.get(each.step)
    parts = [os.path.basename(each.path), each.verdict.status]
    parts += [f"{seen.metric_key} {number_in_words(metric)}"] if metric is not None else []
    parts += [f"{duration_in_words(age)} ago"] if age is not None else []
    parts += ["best"] if seen.best and seen.best[0].step == each.step else []
    return printable(", ".join(parts))
