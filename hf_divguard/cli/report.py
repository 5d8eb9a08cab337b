"""The command ``report``: one HTML page about a run."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from hf_divguard.cli.checkpoints import kept_rows
from hf_divguard.cli.condition import Condition, condition_of
from hf_divguard.cli.exits import OK, CommandError
from hf_divguard.cli.folders import run_folder
from hf_divguard.cli.keeping import Survey, survey
from hf_divguard.cli.output import duration_in_words, number_in_words, print_json, printable, size_in_words
from hf_divguard.cli.page.charts import Mark
from hf_divguard.cli.page.curves import thinned
from hf_divguard.cli.page.document import Chart, Page, Table, document
from hf_divguard.cli.records import whole, words
from hf_divguard.cli.sources import read_source
from hf_divguard.cli.status import facts_of
from hf_divguard.core.findings import Finding
from hf_divguard.errors import HistoryError
from hf_divguard.history import History
from hf_divguard.replays import replay
from hf_divguard.storage.events import read_events
from hf_divguard.storage.jsonio import write_bytes_atomic

__all__ = ["run_report"]

_MOST_ROWS = 500
_MOST_MARKS = 60
_TIMES = ("_runtime", "_per_second", "_samples", "_steps", "epoch", "num_input_tokens_seen")


def run_report(options: Any) -> int:
    """Write the page."""
    folder = run_folder(options.dir)
    seen = survey(folder, options.metric, options.greater)
    condition = condition_of(seen)
    history, notes = _history(folder)
    found = _findings(history) if not condition.record.has_events else []
    page = _page(options.dir, seen, condition, history, found, notes)
    data = document(page).encode("utf-8", errors="backslashreplace")
    if options.output == "-":
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), data)
        return OK
    target = options.output or f"{Path(os.path.abspath(folder)).name}-report.html"
    try:
        write_bytes_atomic(Path(target), data)
    except OSError as error:
        raise CommandError(
            f"`{target}` cannot be written: {error.strerror}. Name another file with -o."
        ) from None
    if options.json:
        print_json("report", {"path": target, "bytes": len(data), "state": condition.state})
    else:
        print(f"{printable(target)} ({size_in_words(len(data))}): {condition.state}. Open it in a browser.")
    return OK


def _history(folder: str) -> tuple[History | None, list[str]]:
    try:
        [source] = read_source(folder, "loss")
    except (CommandError, HistoryError) as error:
        return None, [f"There are no curves: {error}"]
    return source.history, [*source.notes, *source.history.notes]


def _findings(history: History | None) -> list[Finding]:
    try:
        return list(replay(history)) if history is not None else []
    except (HistoryError, ValueError):
        return []


# ---- the parts


def _page(
    shown: str,
    seen: Survey,
    condition: Condition,
    history: History | None,
    found: list[Finding],
    notes: list[str],
) -> Page:
    name = Path(os.path.abspath(seen.run_dir)).name
    facts = [("folder", shown), *(fact for fact in facts_of(seen, condition) if fact[0] != "paste")]
    return Page(
        name=name,
        state=condition.state,
        reason=condition.reason,
        facts=facts,
        paste=condition.paste,
        charts=_charts(history, seen) if history is not None else [],
        marks=[*_event_marks(seen.run_dir), *_finding_marks(found), *_checkpoint_marks(seen)],
        tables=[_checkpoints(seen, condition), _timeline(seen, found)],
        notes=notes,
    )


def _charts(history: History, seen: Survey) -> list[Chart]:
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in history.entries:
        for key, value in entry.values.items():
            series.setdefault(key, []).append((entry.step, value))
    for values in series.values():
        values.sort(key=lambda point: point[0])
    evaluations = [key for key in series if key.startswith("eval_") and not key.endswith(_TIMES)]
    losses = [key for key in evaluations if key.endswith("loss")]
    others = sorted(set(evaluations) - set(losses), key=lambda key: (key != seen.metric_key, key))[:4]
    wanted = [
        ("Training loss", ["loss"]),
        ("Gradient norm", ["grad_norm"]),
        ("Learning rate", ["learning_rate"]),
    ]
    wanted += [("Evaluation loss", losses[:6]), *((key, [key]) for key in others)]
    charts = []
    for title, keys in wanted:
        curves = [thinned(key, series[key]) for key in keys if key in series]
        if curves:
            charts.append(Chart(title, curves))
    return charts


def _event_marks(folder: str) -> list[Mark]:
    kinds = {
        "stopped": "found",
        "aborted": "found",
        "gave_up": "found",
        "rollback": "rollback",
        "warned": "warned",
    }
    marks = []
    for event in read_events(folder)[-2000:]:
        kind, step = kinds.get(str(event.get("event"))), whole(event.get("step"))
        if kind is None or step is None:
            continue
        marks.append(Mark(kind, step, f"step {step}: {_event_words(event)}"))
        onset = whole(event.get("onset_step"))
        if onset is not None and onset != step and kind != "warned":
            marks.append(Mark("onset", onset, f"step {onset}: estimated onset"))
    return marks[-_MOST_MARKS:]


def _event_words(event: dict[str, Any]) -> str:
    finding = event.get("finding")
    finding = finding if isinstance(finding, dict) else {}
    parts = [str(event.get("event"))]
    if event.get("event") == "rollback" and whole(event.get("target_step")) is not None:
        parts.append(f"to step {event['target_step']}")
    text = words(finding.get("message")) or words(event.get("reason"))
    cause = words(finding.get("cause")) or words(event.get("cause"))
    return ": ".join(filter(None, [" ".join(parts), text])) + (f" Cause: {cause}." if cause else "")


def _finding_marks(found: list[Finding]) -> list[Mark]:
    marks = []
    for each in [each for each in found if each.severity != "note"][:_MOST_MARKS]:
        kind = "found" if each.severity == "error" else "warned"
        marks.append(Mark(kind, each.step, f"step {each.step}: {each.message}"))
        if each.onset_step != each.step and kind == "found":
            marks.append(Mark("onset", each.onset_step, f"step {each.onset_step}: estimated onset"))
    return marks


def _checkpoint_marks(seen: Survey) -> list[Mark]:
    return [
        Mark(each.verdict.status, each.step, f"checkpoint-{each.step}: {each.verdict.status}", below=True)
        for each in seen.found
    ]


def _checkpoints(seen: Survey, condition: Condition) -> Table:
    rows = kept_rows(seen, condition)
    cells = [
        [
            str(row["step"]),
            number_in_words(row["metric"]),
            "-" if row["age_seconds"] is None else f"{duration_in_words(row['age_seconds'])} ago",
            size_in_words(row["bytes"]),
            row["verdict"],
            row["kept"] or "not kept: `prune` would delete it",
        ]
        for row in rows[-_MOST_ROWS:]
    ]
    head = ["step", seen.metric_key or "metric", "saved", "size", "verdict", "why it is kept"]
    note = f"The last {_MOST_ROWS} of {len(rows)}." if len(rows) > _MOST_ROWS else ""
    return Table("Checkpoints", head, cells, "There is no checkpoint.", note)


def _timeline(seen: Survey, found: list[Finding]) -> Table:
    events = [each for each in read_events(seen.run_dir) if isinstance(each.get("event"), str)]
    if events:
        rows = [
            [_moment(each.get("time")), str(each.get("step", "-")), str(each["event"]), _event_words(each)]
            for each in events[-_MOST_ROWS:]
        ]
        note = f"The last {_MOST_ROWS} of {len(events)} events." if len(events) > _MOST_ROWS else ""
        return Table("Timeline", ["time", "step", "event", "what"], rows, "", note)
    rows = [[str(each.step), each.kind, f"{each.severity}: {each.message}"] for each in found[:_MOST_ROWS]]
    note = "Found by a replay of the log with the detector adaptive." if rows else ""
    return Table("Timeline", ["step", "finding", "what"], rows, "Nothing was found.", note)


def _moment(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    except (OverflowError, ValueError, OSError):
        return "-"
