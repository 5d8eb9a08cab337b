"""Logs that an older Transformers wrote.

``recorded/`` holds the ``trainer_state.json`` of the last checkpoint of two runs of the stock Trainer
of Transformers 4.57.6 on Python 3.11, as it was written: a GPT-2 with one layer, 120 steps of 8 rows,
a log entry every 2 steps. From step 65 to step 71 the learning rate was 1000 times too high (``jump``)
or NaN (``nan``). How newer versions log is tested with runs that are made by the tests.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

RECORDED = Path(__file__).parent / "recorded"


@pytest.mark.parametrize(
    ("name", "kind", "onset", "found", "value"),
    [("jump", "jump", 65, 72, 170.1), ("nan", "nan_filtered", 65, 68, 0.0)],
)
def test_the_fault_in_a_log_of_an_older_version_is_found(
    cli: Any, tmp_path: Path, name: str, kind: str, onset: int, found: int, value: float
) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-120"
    checkpoint.mkdir(parents=True)
    recorded = RECORDED / f"transformers-4.57.6-{name}.json"
    shutil.copy(recorded, checkpoint / "trainer_state.json")
    for path in (recorded, checkpoint / "trainer_state.json", checkpoint, checkpoint.parent):
        [run] = cli("replay", path, "--json").json["runs"]
        assert (run["values"], run["last_step"], run["steps_saved"]) == (60, 120, 120 - found)
        first = run["first_error"]
        assert (first["kind"], first["onset_step"], first["step"]) == (kind, onset, found)
    status = cli("status", checkpoint.parent, "--json").json
    assert (status["state"], status["step"], status["max_steps"]) == ("diverged", 120, 120)
    assert status["divergence"]["kind"] == kind
    assert status["divergence"]["value"] == pytest.approx(value, abs=0.1)
    assert status["newest"]["under_fault"] is True
    assert status["newest"]["verdict"] == "incomplete"  # of this checkpoint only the log was recorded
