"""The command ``replay``: what a detector would have found in past runs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from hf_divguard.cli.exits import CANNOT_ANSWER, NO, OK, USAGE, CommandError
from hf_divguard.cli.output import duration_in_words, print_json, printable, table
from hf_divguard.cli.plot import draw
from hf_divguard.cli.source import Source
from hf_divguard.cli.sources import find_sources, read_source
from hf_divguard.core.detection.registry import make_rule
from hf_divguard.errors import HistoryError
from hf_divguard.replays import ReplayedFindings, replay

__all__ = ["run_replay"]

_GUARDED = "This run was guarded: "
_GUARDS_DID = frozenset(f"divguard/{name}" for name in ("rollbacks", "stopped", "aborted", "gave_up"))


def run_replay(options: Any) -> int:
    """Say what a detector would have found, and how many steps that would have saved."""
    settings = _settings(options)
    results: list[dict[str, Any]] = []
    pictures: list[str] = []
    paths = [each for path in options.paths for each in find_sources(path)]
    for path in paths:
        try:
            sources = read_source(path, options.metric)
            found = [(each, _replayed(each, options, settings)) for each in sources]
        except (HistoryError, CommandError) as error:
            if len(paths) == 1:
                raise CommandError(str(error)) from error
            results.append({"path": path, "error": str(error)})
            pictures.append("")
            continue
        for source, findings in found:
            results.append(_result(source, findings))
            pictures.append(_picture(source, findings, options.metric) if options.plot else "")
    if all("error" in each for each in results):
        raise CommandError(f"None of the {len(results)} histories can be read. {results[0]['error']}")
    if options.json:
        content = {"detector": options.detector, "settings": settings, "metric": options.metric}
        print_json("replay", {**content, "runs": results})
    else:
        _print(results, pictures)
    if any("error" in each for each in results):
        return CANNOT_ANSWER
    has_finding = any(each["first_error"] is not None for each in results)
    return NO if options.fail_on_finding and has_finding else OK


def _settings(options: Any) -> dict[str, Any]:
    """Return the settings of the detector, checked."""
    settings: dict[str, Any] = {}
    for text in options.settings:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise CommandError(f"`--set` must be KEY=VALUE, got {text!r}.", USAGE)
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    try:
        make_rule(options.detector, metric_key=options.metric, **settings)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error), USAGE) from error
    return settings


def _replayed(source: Source, options: Any, settings: dict[str, Any]) -> ReplayedFindings:
    return replay(source.history, options.detector, metric_key=options.metric, **settings)


def _result(source: Source, found: ReplayedFindings) -> dict[str, Any]:
    last = max((entry.step for entry in source.history.entries), default=0)
    errors = found.errors
    saved = last - errors[0].step if errors else None
    seconds = source.seconds_between(errors[0].step, last) if errors else None
    return {
        "path": source.path,
        "values": found.n_values,
        "last_step": last,
        "counts_steps": source.history.has_steps,
        "first_error": errors[0].to_dict() if errors else None,
        "steps_saved": saved,
        "hours_saved": None if seconds is None else seconds / 3600,
        "findings": [each.to_dict() for each in found],
        "notes": [*source.notes, *_note_of_guards(source), *found.notes],
    }


def _note_of_guards(source: Source) -> list[str]:
    """Return a sentence on what the guards of the run itself have done, where its log has it."""
    done: dict[str, float] = {}
    for entry in source.history.entries:
        if not _GUARDS_DID.isdisjoint(entry.values):
            done |= {key: value for key, value in entry.values.items() if key in _GUARDS_DID}
    rollbacks = int(done.pop("divguard/rollbacks", 0))
    words = [f"it was rolled back {rollbacks} time{'' if rollbacks == 1 else 's'}"] if rollbacks else []
    words += [
        "it gave up" if key.endswith("gave_up") else f"it was {key.partition('/')[2]}" for key in sorted(done)
    ]
    return [f"{_GUARDED}{', '.join(words)}. `hf-divguard status` says more."] if words else []


def _picture(source: Source, found: ReplayedFindings, metric: str) -> str:
    values = [(entry.step, entry.values[metric]) for entry in source.history.series(metric)]
    first = found.errors[0] if found.errors else None
    marks = [(first.onset_step, "o"), (first.step, "x")] if first else []
    encoding = (sys.stdout.encoding or "ascii").lower()
    picture = draw(values, marks, ascii_only=not encoding.startswith("utf"))
    return picture + ("\n  o onset, x finding" if first else "")


def _print(results: list[dict[str, Any]], pictures: list[str]) -> None:
    cells = []
    for each in results:
        first = each.get("first_error")
        if "error" in each:
            cells.append([each["path"], "-", "cannot be read", "-", "-", "-", "-"])
        elif first is None:
            cells.append([each["path"], each["values"], "no finding", "-", "-", each["last_step"], "-"])
        else:
            hours = each["hours_saved"]
            time = "" if hours is None or hours < 1 / 60 else f" ({duration_in_words(hours * 3600)})"
            unit = "" if each["counts_steps"] else " entries"
            cells.append(
                [
                    each["path"],
                    each["values"],
                    first["kind"],
                    first["onset_step"],
                    first["step"],
                    each["last_step"],
                    f"{each['steps_saved']}{unit}{time}",
                ]
            )
    head = ["run", "values", "finding", "onset", "found", "last", "steps saved"]
    print(table(head, cells, right="values onset found last"))
    every = (note for each in results for note in dict.fromkeys(each.get("notes", [])))
    notes = Counter(note for note in every if not note.startswith(_GUARDED))
    for each, picture in zip(results, pictures, strict=True):
        texts = [each["error"]] if "error" in each else []
        if each.get("first_error"):
            texts.append(each["first_error"]["message"])
        texts += [note for note in each.get("notes", []) if notes[note] < 2]
        if len(results) > 1 and (texts or picture):
            print(f"{printable(each['path'])}:")
        for text in texts:
            print(f"  {printable(text)}")
        if picture:
            print(picture)
    for note, runs in notes.items():
        if runs > 1:
            print(f"{runs} runs: {printable(note)}")
