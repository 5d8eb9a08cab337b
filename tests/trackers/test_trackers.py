"""Findings reach the trackers of ``report_to`` at their step: read back from what each of them stores.

One run reports to all trackers that are installed. TensorBoard is part of the extra ``dev``, the others of the
extra ``trackers`` (``make test-trackers``).
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.storage.events import read_events
from tests.processes import ROOT, environment
from tests.trackers.train import STOPPED, WARNED

TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
INSTALLED = [name for name in TRACKERS if importlib.util.find_spec(name) is not None]

EXPECTED = {
    WARNED: {"divguard/warned": 1.0, "divguard/jump": 1.0, "divguard/onset_step": WARNED - 1.0},
    STOPPED: {"divguard/stopped": 1.0, "divguard/jump": 1.0, "divguard/onset_step": STOPPED - 2.0},
}
"""What stands at each step; the last good checkpoint and the values are compared with the events."""


def needs(name: str) -> pytest.MarkDecorator:
    extra = "dev" if name == "tensorboard" else "trackers"
    return pytest.mark.skipif(
        name not in INSTALLED, reason=f"{name} is not installed: pip install -e '.[{extra}]'"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once, reporting to everything that is installed; return the folder of all stores."""
    folder = tmp_path_factory.mktemp("tracked")
    variables = {
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
        "MLFLOW_TRACKING_URI": f"file:{folder / 'mlflow'}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.trackers.train", str(folder / "out"), *INSTALLED],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = next(line for line in done.stdout.splitlines() if line.startswith("LOG "))
    (folder / "log.json").write_text(log.removeprefix("LOG "))
    return folder


def check(found: dict[str, dict[int, float]], run: Path) -> None:
    """Compare values by name and step, as a tracker has stored them, with the events of the run."""
    events = {event["step"]: event for event in read_events(run / "out")}
    assert events.keys() == EXPECTED.keys()
    for step, expected in EXPECTED.items():
        event = events[step]
        expected = expected | {
            "divguard/value": event["finding"]["value"],
            "divguard/limit": event["finding"]["limit"],
            "divguard/last_good_step": event["last_good_step"],
        }
        assert {name: at[step] for name, at in found.items() if step in at} == pytest.approx(expected)
    steps = {step for at in found.values() for step in at}
    assert steps == EXPECTED.keys()


def test_the_log_of_the_run_has_them(run: Path) -> None:
    found: dict[str, dict[int, float]] = {}
    for entry in json.loads((run / "log.json").read_text()):
        for name, value in entry.items():
            if name.startswith("divguard/"):
                found.setdefault(name, {})[entry["step"]] = value
    check(found, run)


def test_the_log_in_the_checkpoint_of_a_stopped_run_has_them(run: Path) -> None:
    state = json.loads((run / "out" / f"checkpoint-{STOPPED}" / "trainer_state.json").read_text())
    assert [each["step"] for each in state["log_history"] if "divguard/stopped" in each] == [STOPPED]


@needs("tensorboard")
def test_tensorboard(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [folder] = {Path(each).parent for each in glob.glob(str(run / "tensorboard/**/events.*"), recursive=True)}
    store = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    check(
        {
            tag.removeprefix("train/"): {each.step: each.value for each in store.Scalars(tag)}
            for tag in store.Tags()["scalars"]
            if "divguard/" in tag
        },
        run,
    )


@needs("mlflow")
def test_mlflow(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{run / 'mlflow'}")
    [experiment] = client.search_experiments()
    [stored] = client.search_runs([experiment.experiment_id])
    names = [name for name in stored.data.metrics if name.startswith("divguard/")]
    histories = {name: client.get_metric_history(stored.info.run_id, name) for name in names}
    check({name: {each.step: each.value for each in history} for name, history in histories.items()}, run)


def wandb_records(run: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    [path] = glob.glob(str(run / "wandb" / "offline-run-*" / "*.wandb"))
    records = []
    for data in chunks_of_log(Path(path).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        records.append(record)
    return records


def chunks_of_log(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log in the format of LevelDB: blocks of 32 KiB, records that may be split over them."""
    parts, place = b"", 7  # behind the head of the file
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # complete, or the last part
            yield parts
            parts = b""


@needs("wandb")
def test_wandb(run: Path) -> None:
    found: dict[str, dict[int, float]] = {}
    for record in wandb_records(run):
        if record.WhichOneof("record_type") != "history":
            continue
        values = {
            "/".join(each.nested_key) or each.key: json.loads(each.value_json) for each in record.history.item
        }
        for name, value in values.items():
            if name.startswith("train/divguard/"):
                found.setdefault(name.removeprefix("train/"), {})[values["train/global_step"]] = value
    check(found, run)


@needs("wandb")
def test_alerts_of_wandb(run: Path) -> None:
    alerts = [record.alert for record in wandb_records(run) if record.WhichOneof("record_type") == "alert"]
    assert [(each.title, each.level) for each in alerts] == [
        (f"night: Training may be diverging at step {WARNED} (jump)", "WARN"),
        (f"night: Training was stopped at step {STOPPED} (jump)", "ERROR"),
    ]
    assert "Last good checkpoint" in alerts[1].text


def trackio_rows(run: Path, table: str, columns: str) -> list[Any]:
    [path] = [
        each
        for each in glob.glob(str(run / "trackio" / "*.db"))
        if not os.path.basename(each).startswith(".")
    ]
    connection = sqlite3.connect(path)
    try:
        return connection.execute(f"SELECT {columns} FROM {table} ORDER BY timestamp").fetchall()
    finally:
        connection.close()


@needs("trackio")
def test_trackio(run: Path) -> None:
    found: dict[str, dict[int, float]] = {}
    for (text,) in trackio_rows(run, "metrics", "metrics"):
        values = json.loads(text)
        for name, value in values.items():
            if name.startswith("train/divguard/"):
                found.setdefault(name.removeprefix("train/"), {})[values["train/global_step"]] = value
    check(found, run)


@needs("trackio")
def test_alerts_of_trackio(run: Path) -> None:
    assert trackio_rows(run, "alerts", "title, level") == [
        (f"night: Training may be diverging at step {WARNED} (jump)", "warn"),
        (f"night: Training was stopped at step {STOPPED} (jump)", "error"),
    ]
