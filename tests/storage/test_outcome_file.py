"""How a run ended: written in one step, read with every type checked."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.storage.outcome_file import RunEnd, outcome_path, read_outcome, remove_outcome, write_outcome

END = RunEnd(
    status="finished",
    step=20,
    max_steps=20,
    run_id="a1",
    time=1.5,
    train_loss=0.25,
    metrics={"train_loss": 0.25, "train_samples_per_second": math.inf, "epoch": 2.0},
)


@pytest.mark.parametrize("train_loss", [0.25, 3, None])
def test_what_is_written_is_read_again(train_loss: float | None, tmp_path: Path) -> None:
    end = RunEnd(**{**vars(END), "train_loss": train_loss})
    write_outcome(tmp_path, end)
    assert read_outcome(tmp_path) == end


def test_a_loss_that_is_not_finite_is_left_out_alone(tmp_path: Path) -> None:
    write_outcome(tmp_path, RunEnd(**{**vars(END), "train_loss": math.nan}))
    assert read_outcome(tmp_path) == RunEnd(**{**vars(END), "train_loss": None})


WRONG: dict[str, Any] = {
    "version": 2,
    "status": "done",
    "step": "20",
    "max_steps": None,
    "run_id": 7,
    "time": [],
    "metrics": [1],
    "train_loss": "low",
    "reason": {},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_type_anywhere_means_that_nothing_is_known(name: str, tmp_path: Path) -> None:
    write_outcome(tmp_path, END)
    path = outcome_path(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), name: WRONG[name]}))
    assert read_outcome(tmp_path) is None


def test_a_named_pipe_in_its_place_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "divguard").mkdir()
    os.mkfifo(outcome_path(tmp_path))
    assert read_outcome(tmp_path) is None


def test_removing_it_twice_is_fine(tmp_path: Path) -> None:
    write_outcome(tmp_path, END)
    remove_outcome(tmp_path)
    remove_outcome(tmp_path)
    assert read_outcome(tmp_path) is None
