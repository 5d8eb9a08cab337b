"""The skill file for coding agents: each of the scripted incidents is answered by it and `status --json`."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.cli.parsers import COMMANDS
from hf_divguard.cli.skill import skill_text

RunOf = Callable[[str], Path]

TEXT = skill_text()
ROWS = re.findall(r"^\| (`\S+=.*?`) \| `([a-z-]+)` \|", TEXT, flags=re.MULTILINE)


def holds(condition: str, answer: dict[str, Any]) -> bool:
    """Return whether a condition such as ``take.resumable=true`` holds for what ``status`` printed."""
    field, is_not, wanted = re.fullmatch(r"([a-z_.]+)(!?)=([a-z_]+)", condition).groups()  # type: ignore[union-attr]
    value: Any = answer
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return (shown == wanted) != bool(is_not)


def answer_of(answer: dict[str, Any]) -> str:
    """Go through the rows of the skill file from the top, as it says."""
    for conditions, name in ROWS:
        if all(holds(each, answer) for each in re.findall(r"`([^`]+)`", conditions)):
            return name
    raise AssertionError("no row holds")


# ---- the incidents


def events_of(folder: Path, **finding: Any) -> Path:
    """Change the finding of the event that ended a run."""
    path = folder / "divguard" / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    events[-1]["finding"].update(finding)
    if "onset_step" in finding:
        events[-1]["onset_step"] = finding["onset_step"]
    path.write_text("".join(json.dumps(each) + "\n" for each in events))
    return folder


def outcome_of(folder: Path, status: str) -> Path:
    (folder / "divguard").mkdir(exist_ok=True)
    (folder / "divguard" / "outcome.json").write_text(json.dumps({"status": status}))
    return folder


def damaged(folder: Path, *, all_of_them: bool) -> Path:
    """Cut the weights of the newest checkpoint, or of all."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda each: int(each.name[11:]))
    for each in found if all_of_them else found[-1:]:
        os.truncate(each / "model.safetensors", 10)
    return folder


def without_checkpoints(folder: Path) -> Path:
    for each in folder.glob("checkpoint-*"):
        shutil.rmtree(each)
    return folder


def unfinished(folder: Path) -> Path:
    """Make a run of the stock Trainer one that was to have more steps, and whose optimizer was not saved."""
    (folder / "trainer_state.json").unlink()
    for each in folder.glob("checkpoint-*"):
        path = each / "trainer_state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_steps": 1000}))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (each / name).unlink(missing_ok=True)
        os.utime(path, (time.time() - 86_400,) * 2)
    return folder


def touched(folder: Path) -> Path:
    newest = max(folder.glob("checkpoint-*"), key=lambda each: int(each.name[11:]))
    (newest / "trainer_state.json").touch()
    return folder


INCIDENTS: dict[str, tuple[Callable[[RunOf], Path], str]] = {
    "a healthy run": (lambda run: run("healthy"), "use"),
    "a healthy run of the stock Trainer": (lambda run: run("stock"), "use"),
    "a run that was rolled back": (lambda run: run("rolled"), "use"),
    "killed": (lambda run: run("killed"), "resume"),
    "killed while it saved": (lambda run: damaged(run("killed"), all_of_them=False), "resume"),
    "killed, no checkpoint is complete": (
        lambda run: damaged(run("killed"), all_of_them=True),
        "start-again",
    ),
    "killed, saved without optimizer": (lambda run: unfinished(run("stock")), "resume-weights"),
    "ended by a signal": (lambda run: outcome_of(run("killed"), "interrupted"), "resume"),
    "still running": (lambda run: touched(run("killed")), "wait"),
    "failed": (lambda run: outcome_of(run("killed"), "failed"), "fix-and-resume"),
    "failed before a checkpoint": (
        lambda run: outcome_of(without_checkpoints(run("killed")), "failed"),
        "fix-and-start-again",
    ),
    "stopped at a NaN": (lambda run: events_of(run("stopped"), kind="non_finite"), "check-numbers"),
    "stopped at a masked NaN": (lambda run: events_of(run("stopped"), kind="nan_filtered"), "check-numbers"),
    "a NaN that nobody guarded": (lambda run: run("stock_nan"), "check-numbers"),
    "stopped at a jump": (
        lambda run: events_of(run("stopped"), kind="jump", cause="weights"),
        "rollback-and-resume",
    ),
    "stopped at a climb": (lambda run: events_of(run("stopped"), kind="climb"), "rollback-and-resume"),
    "bad data": (lambda run: events_of(run("stopped"), kind="jump", cause="data"), "look-at-data"),
    "stuck": (lambda run: events_of(run("stopped"), kind="plateau"), "change-and-start-again"),
    "diverged before the first checkpoint": (
        lambda run: events_of(run("stopped"), kind="climb", onset_step=2),
        "change-and-start-again",
    ),
    "rollbacks did not help": (lambda run: run("given_up"), "change-and-resume"),
    "rollbacks did not help, nothing is left": (
        lambda run: damaged(run("given_up"), all_of_them=True),
        "change-and-start-again",
    ),
    "finished, all checkpoints damaged": (
        lambda run: damaged(run("healthy"), all_of_them=True),
        "retrain-or-recover",
    ),
    "a path that does not exist": (lambda run: run("healthy") / "nowhere", "fix-path"),
    "a checkpoint in place of its folder": (
        lambda run: next(run("healthy").glob("checkpoint-*")),
        "fix-path",
    ),
}


@pytest.mark.parametrize("incident", INCIDENTS)
def test_the_skill_answers_each_incident(cli: Any, run_of: RunOf, incident: str) -> None:
    make, expected = INCIDENTS[incident]
    answer = cli("status", make(run_of), "--json").json
    assert answer_of(answer) == expected, answer
    if expected in ("resume", "rollback-and-resume", "change-and-resume", "check-numbers", "look-at-data"):
        assert answer["paste"].startswith("--resume_from_checkpoint ")


def test_every_answer_of_the_skill_is_that_of_an_incident() -> None:
    assert {name for _, name in ROWS} == {expected for _, expected in INCIDENTS.values()}
    assert len(ROWS) == 17


def test_the_skill_names_commands_and_fields_that_exist(cli: Any, run_of: RunOf) -> None:
    assert set(re.findall(r"hf-divguard ([a-z]+)", TEXT)) <= set(COMMANDS)
    answer = cli("status", run_of("stopped"), "--json").json
    table = TEXT.split("## 2")[0]
    named = re.findall(r"^\| ((?:`[a-z_.]+`(?:, )?)+) \|", table, flags=re.MULTILINE)
    for field in re.findall(r"`([a-z_.]+)`", " ".join(named)):
        value: Any = answer
        for name in field.split("."):
            assert name in value or field == "error", field
            value = value.get(name)


def test_it_is_printed_as_it_is_and_begins_as_skill_files_do(cli: Any) -> None:
    printed = cli("skill").out
    assert printed == TEXT
    assert printed.startswith("---\nname: hf-divguard\ndescription: ")
    assert cli("skill", "--json").json["text"] == TEXT
