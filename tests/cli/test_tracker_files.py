"""``replay`` of what TensorBoard, W&B and trackio leave on the disk."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_replay_command import FIRST, HEALTHY, JUMP

# ---- the formats, written by hand: their packages are no requirement of the tests


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def field(number: int, value: int | bytes | float | str) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def float32(number: int, value: float) -> bytes:
    return varint(number << 3 | 5) + struct.pack("<f", value)


def event(step: int, moment: float, *values: bytes) -> bytes:
    content = field(1, moment) + field(2, step) + field(5, b"".join(field(1, value) for value in values))
    return struct.pack("<Q", len(content)) + b"crc." + content + b"crc."


def simple(tag: str, value: float) -> bytes:
    return field(1, tag) + float32(2, value)


def tensor(tag: str, value: float, *, packed: bool) -> bytes:
    content = field(5 if packed else 4, struct.pack("<f", value))
    return field(1, tag) + field(8, field(1, 1) + field(2, b"") + content)


def event_file(folder: Path, losses: list[float] = JUMP, kind: str = "simple") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    scalar = {
        "simple": simple,
        "content": lambda tag, value: tensor(tag, value, packed=False),
        "packed": lambda tag, value: tensor(tag, value, packed=True),
    }[kind]
    text = field(1, "args/text_summary") + field(8, field(1, 7) + field(2, field(2, b"\x08\x01")))
    data = event(0, 1.7e9, text)
    for step, loss in enumerate(losses, start=1):
        data += event(step, 1.7e9 + 36 * step, scalar("train/loss", loss))
        data += event(step, 1.7e9 + 36 * step, scalar("train/grad_norm", 1.0))
    path = folder / "events.out.tfevents.1700000000.host.1.0"
    path.write_bytes(data)
    return path


def wandb_file(path: Path, losses: list[float] = JUMP) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b":W&B\xe1\xbe\x00"

    def add(content: bytes) -> None:
        nonlocal data
        kinds = iter((2, 3, 3, 3, 3))
        while True:
            left = 32768 - len(data) % 32768
            if left < 7:
                data += bytes(left)
                continue
            part, content = content[: left - 7], content[left - 7 :]
            first = next(kinds)
            kind = (1 if first == 2 else 4) if not content else first
            data += struct.pack("<IHB", 0, len(part), kind) + part
            if not content:
                return

    add(field(17, field(8, "a run")))
    add(field(7, "x" * 40_000))  # longer than a block
    for step, loss in enumerate(losses, start=1):
        row = {"train/loss": loss, "train/grad_norm": 1.0, "train/global_step": step, "_step": 7 * step}
        row["_timestamp"] = 1.7e9 + 36 * step
        items = b"".join(field(1, field(2, key) + field(16, json.dumps(cell))) for key, cell in row.items())
        add(field(1, step) + field(2, items))
    path.write_bytes(data)
    return path


def trackio_file(path: Path, runs: dict[str, list[float]], *, old: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    own = "project_name TEXT" if old else "run_id TEXT"
    connection.execute(
        f"CREATE TABLE metrics (id INTEGER PRIMARY KEY, timestamp TEXT, {own}, run_name TEXT, step INTEGER, metrics)"
    )
    for name, losses in runs.items():
        for step, loss in enumerate(losses, start=1):
            logged = {"train/loss": loss, "train/grad_norm": 1.0, "train/global_step": step}
            moment = f"2026-01-01T00:{step // 60:02}:{step % 60:02}+00:00"
            connection.execute(
                f"INSERT INTO metrics (timestamp, {own.split()[0]}, run_name, step, metrics) VALUES (?, ?, ?, ?, ?)",
                (moment, "x", name, 3 * step, json.dumps(logged).encode()),
            )
    connection.commit()
    connection.close()
    return path


# ---- tests


def only_run(cli: Any, path: Path) -> dict[str, Any]:
    [run] = cli("replay", path, "--json").json["runs"]
    return run


def assert_jump(run: dict[str, Any]) -> None:
    assert (run["first_error"]["step"], run["first_error"]["onset_step"]) == (FIRST.step, FIRST.onset_step)
    assert (run["values"], run["last_step"]) == (100, 100)
    assert not [note for note in run["notes"] if "grad_norm" in note]


@pytest.mark.parametrize("kind", ["simple", "content", "packed"])
def test_event_files_are_read_without_tensorboard(cli: Any, tmp_path: Path, kind: str) -> None:
    path = event_file(tmp_path / "tb", kind=kind)
    for given in (path, path.parent):
        run = only_run(cli, given)
        assert_jump(run)
        assert run["hours_saved"] == pytest.approx(run["steps_saved"] / 100)


def test_event_files_that_tensorboard_wrote_itself(cli: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="compares with files of the package tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step, loss in enumerate(JUMP, start=1):
            writer.add_scalar("train/loss", loss, step)
            writer.add_scalar("train/grad_norm", 1.0, step, new_style=True)
    assert_jump(only_run(cli, tmp_path))


def test_an_event_file_that_is_cut_off_gives_what_it_holds(cli: Any, tmp_path: Path) -> None:
    path = event_file(tmp_path)
    os.truncate(path, path.stat().st_size - 10)
    run = only_run(cli, path)
    assert run["first_error"]["step"] == FIRST.step
    assert "is cut off" in run["notes"][0]


def test_runs_of_wandb_are_read_from_their_offline_files(cli: Any, tmp_path: Path) -> None:
    path = wandb_file(tmp_path / "wandb" / "offline-run-1" / "run-1.wandb")
    for given in (path, tmp_path / "wandb"):
        run = only_run(cli, given)
        assert_jump(run)
        assert run["hours_saved"] == pytest.approx(run["steps_saved"] / 100)
    os.truncate(path, path.stat().st_size - 30)
    assert only_run(cli, path)["values"] == 99


@pytest.mark.parametrize("old", [False, True])
def test_each_run_in_a_database_of_trackio_is_read(cli: Any, tmp_path: Path, old: bool) -> None:
    path = trackio_file(tmp_path / "my project?.db", {"bad one": JUMP, "good": HEALTHY}, old=old)
    runs = cli("replay", tmp_path, "--json").json["runs"]
    assert [run["path"] for run in runs] == [f"{path} [bad one]", f"{path} [good]"]
    assert_jump(runs[0])
    assert runs[1]["first_error"] is None


def test_a_tree_of_trackers_gives_a_row_for_each_run(cli: Any, tmp_path: Path) -> None:
    event_file(tmp_path / "logs" / "a")
    event_file(tmp_path / "logs" / "b", HEALTHY)
    wandb_file(tmp_path / "wandb" / "run-1.wandb")
    runs = cli("replay", tmp_path, "--json").json["runs"]
    assert [run["first_error"] is not None for run in runs] == [True, False, True]


@pytest.mark.parametrize("shape", ["entries", "columns"])
def test_json_that_trackers_export(cli: Any, tmp_path: Path, shape: str) -> None:
    rows = [
        {"train/loss": loss, "train/grad_norm": 1.0, "train/global_step": step, "_step": 3 * step}
        for step, loss in enumerate(JUMP, start=1)
    ]
    columns = {key: {str(n): row[key] for n, row in enumerate(rows)} for key in rows[0]}
    path = tmp_path / "history.json"
    path.write_text(json.dumps(rows if shape == "entries" else columns))
    assert_jump(only_run(cli, path))


def test_parquet_that_trackers_export(cli: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is read by pyarrow")
    import pyarrow.parquet as parquet

    rows = [
        {"train/loss": loss, "train/grad_norm": 1.0, "step": step, "run_name": name}
        for name, losses in (("bad", JUMP), ("good", HEALTHY))
        for step, loss in enumerate(losses, start=1)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "export.parquet")
    runs = cli("replay", tmp_path / "export.parquet", "--json").json["runs"]
    assert_jump(runs[0])
    assert runs[1]["first_error"] is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("events.out.tfevents.1", b"x", "cannot be read as an event file"),
        ("events.out.tfevents.1", b"\xff" * 40, "stands no record"),
        ("events.out.tfevents.1", b"", "holds no `loss`"),
        ("run-1.wandb", b"nothing", "is no file of W&B"),
        ("run-1.wandb", b":W&B\xe1\xbe\x00", "holds no `loss`"),
        ("project.db", b"", "is empty"),
        ("project.db", b"not a database" * 100, "cannot be read as a database"),
        ("export.parquet", b"PAR1", "arquet"),
    ],
)
def test_a_file_of_a_tracker_that_is_none_is_a_sentence(
    cli: Any, tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    answer = cli("replay", path)
    assert (answer.code, answer.out, answer.err.count("\n")) == (3, "", 1)
    assert says in answer.err
    assert str(path) in answer.err


def test_a_database_of_something_else_is_a_sentence(cli: Any, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "optuna.db")
    connection.execute("CREATE TABLE trials (id INTEGER)")
    connection.close()
    assert "is no database of trackio" in cli("replay", tmp_path / "optuna.db").err
