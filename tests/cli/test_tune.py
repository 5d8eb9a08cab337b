"""``tune``: settings for past runs, and ``compare``: runs side by side."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard import replay
from hf_divguard.cli.sparkline import sparkline
from tests import curves

RunOf = Callable[[str], Path]


def log_file(path: Path, values: list[float]) -> Path:
    rows = [{"loss": value, "step": step} for step, value in enumerate(values, start=1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def logs(tmp_path: Path) -> dict[str, Path]:
    """Two healthy runs and two that jump, one by so little that a high threshold misses it."""
    made = {
        "good": curves.healthy(0, 400).values,
        "stairs": curves.stairs(1, 400).values,
        "high": curves.jump(2, 400, 300, 4.0).values,
        "low": curves.jump(3, 400, 300, 1.5).values,
    }
    return {name: log_file(tmp_path / f"{name}.jsonl", values) for name, values in made.items()}


def test_the_best_setting_is_silent_on_the_healthy_and_finds_the_bad(cli: Any, logs: dict[str, Path]) -> None:
    answer = cli("tune", *logs.values(), "--top", "100", "--json")
    assert answer.code == 0
    runs = {Path(run["path"]).stem: run for run in answer.json["runs"]}
    assert {name: run["label"] for name, run in runs.items()} == {
        "good": "healthy",
        "stairs": "healthy",
        "high": "bad",
        "low": "bad",
    }
    first = answer.json["settings"][0]
    assert (first["false_alarms"], first["missed"]) == ([], [])
    words = shlex.split(first["flags"])
    assert words[:2] == ["--divguard_detector", first["detector"]]
    settings = json.loads(words[3])
    for name, path in logs.items():
        found = replay(
            {"loss": [json.loads(line)["loss"] for line in path.read_text().splitlines()]},
            first["detector"],
            **settings,
        ).errors
        assert bool(found) == (runs[name]["label"] == "bad")
    high = {"short_alpha": 0.1, "long_alpha": 0.01, "threshold": 5.0}
    [blind] = [each for each in answer.json["settings"] if each["kwargs"] == high]
    assert len(blind["missed"]) == 2


def test_labels_of_the_user_win_and_an_early_finding_is_a_false_alarm(
    cli: Any, logs: dict[str, Path]
) -> None:
    words = ("--detector", "adaptive", "--json")
    answer = cli("tune", "--healthy", logs["high"], "--bad", f"{logs['low']}@390", *words)
    assert answer.code == 1
    assert [run["onset_step"] for run in answer.json["runs"]] == [None, 390]
    assert len(answer.json["settings"][0]["false_alarms"]) >= 1


def test_the_table_shows_runs_settings_and_flags(cli: Any, logs: dict[str, Path]) -> None:
    out = cli("tune", logs["good"], logs["high"], "--detector", "ema", "--top", "3").out
    assert "--divguard_detector ema --divguard_detector_kwargs '{" in out
    assert "2 runs are few" in out
    assert "There is no bad run among them" in cli("tune", logs["good"], "--detector", "adaptive").out


@pytest.mark.parametrize(("words", "code"), [((), 2), (("nowhere",), 3), (("--top", "0", "x"), 2)])
def test_what_cannot_be_tuned_is_a_sentence(cli: Any, words: tuple[str, ...], code: int) -> None:
    answer = cli("tune", *words)
    assert (answer.code, answer.out, answer.err.count("\n")) == (code, "", 1)


# ---- compare


def test_runs_stand_side_by_side(cli: Any, made: Path) -> None:
    runs = {Path(run["path"]).name: run for run in cli("compare", made, "--json").json["runs"]}
    assert len(runs) == 7
    assert runs["healthy"]["finding"] is None
    assert runs["stock_nan"]["finding"] == "non_finite"
    assert runs["rolled"]["rollbacks"] == 1
    assert Path(runs["healthy"]["best_checkpoint"]).name == f"checkpoint-{runs['healthy']['best_step']}"
    lines = cli("compare", made / "healthy", made / "stopped").out.splitlines()
    assert len(lines) == 3
    assert "diverged" in lines[2]


def test_one_run_that_is_none_does_not_hide_the_others(cli: Any, made: Path, tmp_path: Path) -> None:
    assert cli("compare", tmp_path).code == 3
    answer = cli("compare", made / "healthy", tmp_path / "nowhere")
    assert (answer.code, answer.err.count("\n")) == (3, 1)


def test_a_curve_in_one_line() -> None:
    assert sparkline([]) == ""
    assert sparkline([2.0]) == "▁"
    assert len(sparkline([float(n) for n in range(1000)], 30)) == 30
    assert sparkline([0.0, 10.0], limits=(0.0, 20.0), ascii_only=True) in ("_=", "_+")
