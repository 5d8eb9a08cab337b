from __future__ import annotations

from pathlib import Path

import pytest

from hf_divguard.storage.names import checkpoint_folders, checkpoint_name, checkpoint_step


@pytest.mark.parametrize("step", [0, 1, 9, 10, 10**17])
def test_the_step_of_a_name_is_the_step_it_was_made_of(step: int) -> None:
    assert checkpoint_step(checkpoint_name(step)) == step


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-",
        "checkpoint-01",
        "checkpoint--1",
        "checkpoint-1 ",
        "checkpoint-1\n",
        "checkpoint-٣",
        "Checkpoint-1",
        "checkpoint-1.0",
        "checkpoint-best",
        "checkpoint-10.bak",
        "acheckpoint-1",
        "checkpoint-" + "9" * 30,
    ],
)
def test_any_other_name_has_no_step(name: str) -> None:
    assert checkpoint_step(name) is None


def test_folders_come_lowest_step_first(tmp_path: Path) -> None:
    for step in (100, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert list(checkpoint_folders(tmp_path)) == [9, 10, 100]
