"""A run folder of a stranger: each trap in it ends in a clear verdict within seconds."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_divguard.errors import HistoryError
from hf_divguard.history import read_history
from hf_divguard.storage.checkpoints import best_checkpoints, find_checkpoints
from hf_divguard.storage.events import events_path, read_events, write_events
from hf_divguard.storage.ledger import CheckpointLedger
from hf_divguard.storage.names import MANIFEST_NAME, SIDECAR_NAME
from hf_divguard.storage.resume_state import resume_state

MOST_SECONDS = 5.0

_LOOK = """
import sys, time, resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
sys.path.insert(0, sys.argv[2])
from hf_divguard.storage.checkpoints import best_checkpoints, find_checkpoints, verify_checkpoint
from hf_divguard.storage.resume_state import resume_state
began = time.process_time()
print(verify_checkpoint(sys.argv[1] + "/checkpoint-4", checksums=True).status)
print(time.process_time() - began)
began = time.process_time()
find_checkpoints(sys.argv[1]); best_checkpoints(sys.argv[1]); resume_state(sys.argv[1])
print(time.process_time() - began)
"""


def _fifo(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def _endless(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/zero")


def _loop(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name)


def _sparse(folder: Path, name: str) -> None:
    with open(folder / name, "wb") as file:
        file.truncate(1 << 40)


def _deep_json(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b'{"a":' * 5_000_000)


def _huge_json(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b'{"log_history": [' + b"{}," * 40_000_000 + b"{}]}")


def _many_lists(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b'{"global_step": 4, "log_history": [' + b"[]," * 15_000_000 + b"{}]}")


def _lying_header(folder: Path, name: str) -> None:
    (folder / name).write_bytes(struct.pack("<Q", 2**62) + b"{}")


def _large_header(folder: Path, name: str) -> None:
    entry = b'"%d":{"data_offsets":[0,0]},'
    header = b"{" + b"".join(entry % number for number in range(1_000_000)) + b'"x":{"data_offsets":[0,0]}}'
    (folder / name).write_bytes(struct.pack("<Q", len(header)) + header)


def _many_members(folder: Path, name: str) -> None:
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("a", b"")
    data = (folder / name).read_bytes()
    at = data.index(b"PK\x01\x02")
    entry, end = data[at : data.index(b"PK\x05\x06")], data[data.index(b"PK\x05\x06") :]
    directory = entry * 400_000
    end = end[:8] + struct.pack("<HHLL", 0xFFFF, 0xFFFF, len(directory), at) + end[20:]
    (folder / name).write_bytes(data[:at] + directory + end)


TRAPS: list[tuple[Callable[[Path, str], None], str]] = [
    *((trap, name) for trap in (_fifo, _endless, _loop, _sparse) for name in (MANIFEST_NAME, SIDECAR_NAME)),
    *(
        (trap, "trainer_state.json")
        for trap in (_fifo, _endless, _loop, _sparse, _deep_json, _huge_json, _many_lists)
    ),
    *(
        (trap, "model.safetensors")
        for trap in (_fifo, _endless, _loop, _sparse, _lying_header, _large_header)
    ),
    *((trap, "optimizer.pt") for trap in (_fifo, _endless, _sparse, _many_members)),
    *(
        (trap, name)
        for trap in (_deep_json, _huge_json)
        for name in (MANIFEST_NAME, SIDECAR_NAME, "config.json")
    ),
]


@pytest.mark.parametrize(("trap", "name"), TRAPS, ids=lambda each: getattr(each, "__name__", each))
def test_a_trap_in_a_checkpoint_ends_in_a_verdict_in_time(
    trap: Callable[[Path, str], None], name: str, run_dir: Path
) -> None:
    trap(run_dir / "checkpoint-4", name)
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, str(run_dir), str(Path(__file__).parents[2])],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    status, *seconds = done.stdout.split()
    # A JSON file that is only too large is not damaged: its ends are looked at.
    assert status in ("incomplete", "unknown") or trap in (_huge_json, _many_lists)
    assert (
        max(map(float, seconds)) < MOST_SECONDS * 3
    )  # in processor time, on a machine that does other things


def test_deep_and_wide_trees_are_given_up_in_time(run_dir: Path) -> None:
    folder = run_dir / "checkpoint-4"
    here = os.open(folder, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    began = time.process_time()
    assert find_checkpoints(run_dir)[-1].verdict.status == "unknown"
    assert time.process_time() - began < MOST_SECONDS
    shutil.rmtree(folder / "d")


def test_a_trainer_state_of_another_step_is_no_checkpoint_of_this_one(run_dir: Path) -> None:
    shutil.copy(run_dir / "checkpoint-2" / "trainer_state.json", run_dir / "checkpoint-4")
    verdict = find_checkpoints(run_dir)[-1].verdict
    assert verdict.status == "incomplete"
    assert "of step 2, not of checkpoint-4" in verdict.reason


@pytest.mark.parametrize("trap", [_fifo, _endless, _loop, _sparse])
def test_a_trap_in_the_place_of_the_events_holds_no_events_and_is_replaced(
    trap: Callable[[Path, str], None], tmp_path: Path
) -> None:
    path = events_path(tmp_path)
    path.parent.mkdir()
    trap(path.parent, path.name)
    began = time.monotonic()
    assert read_events(tmp_path) == []
    assert time.monotonic() - began < MOST_SECONDS
    write_events(tmp_path, [{"event": "rollback"}])
    assert read_events(tmp_path) == [{"event": "rollback"}]


@pytest.mark.parametrize("trap", [_fifo, _endless, _loop, _sparse, _deep_json])
def test_a_trap_in_the_place_of_a_history_is_an_error_in_time(
    trap: Callable[[Path, str], None], run_dir: Path
) -> None:
    trap(run_dir / "checkpoint-4", "trainer_state.json")
    began = time.process_time()
    read_history(run_dir)  # the other checkpoint has one
    with pytest.raises(HistoryError):
        read_history(run_dir / "checkpoint-4")
    with pytest.raises(HistoryError):
        read_history(run_dir / "checkpoint-4" / "trainer_state.json")
    assert time.process_time() - began < MOST_SECONDS


@pytest.mark.parametrize(
    "entry", [{"step": "x", "eval_loss": 1.0}, {"eval_loss": 1.0}, 5, {"step": 4, "eval_loss": {}}]
)
def test_a_log_entry_of_the_wrong_type_costs_itself_alone(entry: object, run_dir: Path) -> None:
    path = run_dir / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"].append(entry)
    path.write_text(json.dumps(state))
    assert len(best_checkpoints(run_dir)) == 2
    ledger = CheckpointLedger.read(str(run_dir), str(run_dir / "checkpoint-4"), "eval_loss")
    assert len(ledger.best(False)) == 2
    assert resume_state(run_dir).status == "found"
