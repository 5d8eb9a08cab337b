"""``replay``: histories of every kind, and files that are none."""

from __future__ import annotations

import csv
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard import replay
from hf_divguard.cli.plot import draw

RunOf = Callable[[str], Path]

JUMP = [3.0 - 0.01 * step for step in range(60)] + [9.0] * 40
HEALTHY = [3.0 - 0.01 * step for step in range(100)]
FIRST = replay({"steps": range(1, 101), "loss": JUMP, "grad_norm": [1.0] * 100}).errors[0]


def entries(losses: list[float] = JUMP, prefix: str = "", **more: Any) -> list[dict[str, Any]]:
    return [
        {f"{prefix}loss": loss, f"{prefix}grad_norm": 1.0, "step": step, **more}
        for step, loss in enumerate(losses, start=1)
    ]


def state_file(folder: Path, losses: list[float] = JUMP) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    path.write_text(
        json.dumps({"global_step": len(losses), "max_steps": len(losses), "log_history": entries(losses)})
    )
    return path


def lines_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def csv_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def with_names(rows: list[dict[str, Any]], **names: str) -> list[dict[str, Any]]:
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


SOURCES: dict[str, Callable[[Path], Path]] = {
    "trainer_state.json": state_file,
    "output folder": lambda folder: state_file(folder).parent,
    "checkpoint": lambda folder: state_file(folder / "checkpoint-100").parent,
    "folder of checkpoints": lambda folder: state_file(folder / "checkpoint-100").parent.parent,
    "list of entries": lambda folder: _text(folder / "log.json", json.dumps(entries())),
    "sequences": lambda folder: _text(
        folder / "log.json",
        json.dumps({"steps": list(range(1, 101)), "loss": JUMP, "grad_norm": [1.0] * 100}),
    ),
    "JSON Lines": lambda folder: lines_file(folder / "log.jsonl", entries()),
    "JSON Lines of another name": lambda folder: lines_file(folder / "log.txt", entries()),
    "JSON Lines of W&B": lambda folder: lines_file(
        folder / "wandb.jsonl",
        with_names(entries(prefix="train/"), step="train/global_step"),
    ),
    "CSV": lambda folder: csv_file(folder / "log.csv", entries()),
    "TSV": lambda folder: csv_file(folder / "log.tsv", entries()),
    "CSV with a byte order mark": lambda folder: _text(
        folder / "log.csv", "\ufeff" + csv_file(folder / "raw.csv", entries()).read_text()
    ),
}


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("source", SOURCES)
def test_each_kind_of_history_gives_the_same_finding(cli: Any, tmp_path: Path, source: str) -> None:
    path = SOURCES[source](tmp_path)
    answer = cli("replay", path, "--json", "--fail-on-finding")
    assert answer.code == 1
    [run] = answer.json["runs"]
    assert run["path"] == str(path)
    assert run["first_error"]["step"] == FIRST.step
    assert run["first_error"]["onset_step"] == FIRST.onset_step
    assert run["steps_saved"] == 100 - FIRST.step
    assert run["values"] == 100


@pytest.mark.parametrize(
    "header",
    [("Wall time", "Step", "Value"), ("Step", "Value"), ("wall_time", "step", "value")],
)
def test_the_csv_of_one_curve_that_tensorboard_saves(
    cli: Any, tmp_path: Path, header: tuple[str, ...]
) -> None:
    rows = [
        {name: {"w": 1.7e9 + 36 * step, "s": step, "v": loss}[name[0].lower()] for name in header}
        for step, loss in enumerate(JUMP, start=1)
    ]
    [run] = cli("replay", csv_file(tmp_path / "curve.csv", rows), "--json").json["runs"]
    assert run["first_error"]["kind"] == FIRST.kind
    if len(header) == 3:
        assert run["hours_saved"] == pytest.approx(run["steps_saved"] / 100)
    else:
        assert run["hours_saved"] is None


def test_a_table_of_several_runs_gives_a_row_for_each(cli: Any, tmp_path: Path) -> None:
    rows = [
        {
            "train/global_step": step,
            "bad - train/loss": bad,
            "bad - train/loss__MIN": bad,
            "bad - train/loss__MAX": bad,
            "good - train/loss": good,
        }
        for step, (bad, good) in enumerate(zip(JUMP, HEALTHY, strict=True), start=1)
    ]
    path = csv_file(tmp_path / "export.csv", rows)
    runs = cli("replay", path, "--json").json["runs"]
    assert [run["path"] for run in runs] == [f"{path} [bad]", f"{path} [good]"]
    assert runs[0]["first_error"]["kind"] == "jump"
    assert runs[1]["first_error"] is None


def test_times_give_the_hours_that_would_be_saved(cli: Any, tmp_path: Path) -> None:
    rows = [{**row, "_timestamp": 1.7e9 + 360 * row["step"]} for row in entries()]
    [run] = cli("replay", lines_file(tmp_path / "log.jsonl", rows), "--json").json["runs"]
    assert run["hours_saved"] == pytest.approx(run["steps_saved"] / 10)
    assert f"{run['steps_saved']} (" in cli("replay", tmp_path / "log.jsonl").out


def test_a_folder_of_runs_gives_a_row_for_each(cli: Any, made: Path) -> None:
    runs = cli("replay", made, "--json").json["runs"]
    found = {Path(run["path"]).name: run["first_error"] and run["first_error"]["kind"] for run in runs}
    assert found["stock_nan"] == "non_finite"
    assert found["stopped"] == "nan_filtered"
    assert found["healthy"] is None
    assert len(found) == 7


def test_one_that_cannot_be_read_does_not_hide_the_others(cli: Any, tmp_path: Path) -> None:
    state_file(tmp_path / "good")
    state_file(tmp_path / "bad").write_text("{")
    answer = cli("replay", tmp_path, "--json")
    assert answer.code == 3
    assert [("error" in run) for run in answer.json["runs"]] == [True, False]
    text = cli("replay", tmp_path).out
    assert "cannot be read" in text
    assert "must be complete JSON" in text


def test_the_furthest_state_that_can_be_read_is_taken(cli: Any, tmp_path: Path) -> None:
    for step in (20, 40):
        state_file(tmp_path / f"checkpoint-{step}", HEALTHY[:step])
    state_file(tmp_path / "checkpoint-60").write_text('{"log_history": [')
    [run] = cli("replay", tmp_path, "--json").json["runs"]
    assert run["values"] == 40
    assert "checkpoint-60" in run["notes"][0]


def test_detector_and_settings_are_those_of_replay(cli: Any, tmp_path: Path) -> None:
    path = state_file(tmp_path)
    words = ("--detector", "ema", "--set", "threshold=1.5", "--set", "short_alpha=0.2")
    expected = replay(path, "ema", threshold=1.5, short_alpha=0.2).errors[0]
    content = cli("replay", path, *words, "--json").json
    assert content["runs"][0]["first_error"]["step"] == expected.step
    assert content["settings"] == {"threshold": 1.5, "short_alpha": 0.2}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--set", "threshold"), "must be KEY=VALUE"),
        (("--set", "zork=1"), "has no parameter 'zork'"),
        (("--detector", "ema", "--set", "threshold=-1"), "threshold"),
        (("--detector", "ema", "--set", "threshold=high"), "threshold"),
    ],
)
def test_wrong_settings_are_a_sentence(cli: Any, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    answer = cli("replay", state_file(tmp_path), *words)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert says in answer.err


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "trainer_state.json",
            LFS,
            "is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`.",
        ),
        ("log.csv", LFS, "is a Git LFS pointer"),
        ("config.json", '{"model_type": "gpt2", "n_layer": 2}', "It is the config of a model."),
        ("other.json", '{"a": {"b": 1}}', "neither a `log_history` nor lists"),
        ("trainer_state.json", "", "is empty"),
        ("trainer_state.json", " \n", "is empty"),
        ("trainer_state.json", '{"global_step": 5, "log_history": [{"loss": 2.', "must be complete JSON"),
        ("trainer_state.json", '{"global_step": 5, "log_history": []}', "holds no log entries"),
        ("trainer_state.json", '{"log_history": [{"eval_accuracy": 1, "step": 1}]}', "holds no `loss`"),
        ("trainer_state.json", '{"log_history": 5}', "must hold"),
        ("trainer_state.json", "[1, 2, 3]", "must be a list of log entries"),
        ("trainer_state.json", "[" * 100_000, "nested"),
        ("trainer_state.json", "\x00\xff", "must be UTF-8 text"),
        ("log.jsonl", '{"loss": 1, "step": 1}\nnonsense\n{"loss": 1, "step": 2}\n', "Line 2 of"),
        ("log.jsonl", "[1]\n[2]\n", "must be a log entry"),
        ("log.csv", "a,b\n", "has no rows"),
        ("log.csv", "a,b\n1,2\n", "holds no `loss`. Its keys are: a, b."),
    ],
)
def test_a_file_that_is_no_history_is_a_sentence(
    cli: Any, tmp_path: Path, name: str, content: str, says: str
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="latin-1")
    answer = cli("replay", path)
    assert (answer.code, answer.out, answer.err.count("\n")) == (3, "", 1)
    assert says in answer.err
    assert str(path) in answer.err or "The history" in answer.err
    assert cli("replay", path, "--json").json["exit_code"] == 3


def test_folders_without_a_history_and_odd_files_are_sentences(cli: Any, tmp_path: Path) -> None:
    assert "holds no history" in cli("replay", tmp_path).err
    os.mkfifo(tmp_path / "pipe.json")
    assert "must be a regular file" in cli("replay", tmp_path / "pipe.json").err
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    assert cli("replay", tmp_path / "link.json").code == 3
    (tmp_path / "events.out.tfevents.1").write_bytes(b"x")
    assert cli("replay", tmp_path / "events.out.tfevents.1").code == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed, which root alone can become")
def test_a_file_without_permission_is_a_sentence(cli: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = state_file(Path(folder))
        assert cli("replay", path).code == 0  # which imports what it needs
        path.chmod(0)
        os.seteuid(65534)
        try:
            answer = cli("replay", path)
        finally:
            os.seteuid(0)
    assert answer.code == 3
    assert answer.err == f"hf-divguard: `{path}` cannot be read: Permission denied.\n"


def test_a_last_line_that_is_cut_off_is_left_out(cli: Any, tmp_path: Path) -> None:
    path = lines_file(tmp_path / "log.jsonl", entries())
    os.truncate(path, path.stat().st_size - 8)
    [run] = cli("replay", path, "--json").json["runs"]
    assert run["values"] == 99
    assert run["notes"][0] == "Line 100 is cut off and was left out."


def test_nan_tokens_and_texts_are_understood(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    for token in ("NaN", '"nan"', "Infinity", "1e999"):
        entries = [f'{{"loss": {loss}, "step": {step}}}' for step, loss in enumerate(("2.0", token, token))]
        path.write_text(f'{{"log_history": [{", ".join(entries)}]}}')
        [run] = cli("replay", path, "--json").json["runs"]
        assert run["first_error"]["kind"] == "non_finite", token
        assert cli("replay", path, "--plot").code == 0


def test_a_long_log_without_steps_takes_no_quadratic_time(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    path.write_text(
        json.dumps({"log_history": [{"loss": 2.0, "epoch": step / 10} for step in range(30_000)]})
    )
    [run] = cli("replay", path, "--json", "--detector", "nonfinite").json["runs"]
    assert (run["values"], run["last_step"], run["counts_steps"]) == (30_000, 30_000, False)


def test_the_plot_marks_onset_and_finding(cli: Any, tmp_path: Path) -> None:
    out = cli("replay", state_file(tmp_path), "--plot").out
    assert "o onset, x finding" in out
    assert "steps 1 to 100" in out


def test_a_plot_is_drawn_of_whatever_is_logged() -> None:
    odd = [[(1, 0.0), (2, 0.0)], [(1, -1.0), (10**9, 1e300)], [(3, 1.0), (1, 2.0)]]
    for values in ([], [(1, math.nan)], [(5, 2.0)], *odd):
        picture = draw(values, [(1, "o"), (10**12, "x")], ascii_only=True)
        assert picture.isascii()
        assert max(map(len, picture.splitlines())) < 100


def test_what_the_guards_of_the_run_did_is_noted(cli: Any, made: Path) -> None:
    """The log of a guarded run holds what a rollback has undone."""
    [run] = cli("replay", made / "rolled", "--json").json["runs"]
    assert any(note.startswith("This run was guarded: it was rolled back 1 time") for note in run["notes"])
    [run] = cli("replay", made / "stopped", "--json").json["runs"]
    assert "This run was guarded: it was stopped. `hf-divguard status` says more." in run["notes"]
    [run] = cli("replay", made / "stock", "--json").json["runs"]
    assert not any("guarded" in note for note in run["notes"])


def test_a_note_that_runs_share_is_printed_once(cli: Any, tmp_path: Path) -> None:
    log = [{"step": step, "loss": 2.0 - step / 1000} for step in range(10, 510, 10)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(log))
    one = cli("replay", tmp_path / "a.json").out
    assert "\n  Entries are 10 steps apart" in one
    two = cli("replay", tmp_path / "a.json", tmp_path / "b.json").out
    assert two.count("Entries are 10 steps apart") == 1
    assert "\n2 runs: Entries are 10 steps apart" in two
