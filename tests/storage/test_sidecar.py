from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from hf_divguard.storage.names import SIDECAR_NAME
from hf_divguard.storage.record import sealed
from hf_divguard.storage.sidecar import CheckpointRecord, Sidecar, SidecarError, read_sidecar, write_sidecar

FULL = Sidecar(
    step=40,
    run_id="a1b2",
    sequence=3,
    metric_name="eval_loss",
    metric=0.5,
    greater_is_better=False,
    records=(
        CheckpointRecord(20, 1, 0.7),
        CheckpointRecord(30, 2, math.inf, in_lineage=False),
        CheckpointRecord(40, 3, None),
    ),
    callbacks={"Detector": {"short_ema": 1.5, "seen": [1, 2], "worst": -math.inf}},
    manifest_expected=True,
    quarantine={"reason": "It diverged.", "onset_step": 35, "time": "2025-01-01T00:00:00Z"},
)


def test_everything_in_a_sidecar_comes_back(tmp_path: Path) -> None:
    write_sidecar(tmp_path, FULL)
    assert read_sidecar(tmp_path) == FULL


def test_a_metric_that_is_not_a_number_comes_back(tmp_path: Path) -> None:
    write_sidecar(tmp_path, replace(FULL, metric=math.nan))
    metric = read_sidecar(tmp_path).metric
    assert metric is not None
    assert math.isnan(metric)


def test_the_file_is_strict_json(tmp_path: Path) -> None:
    write_sidecar(tmp_path, replace(FULL, metric=math.nan))

    def refuse(token: str) -> None:
        raise AssertionError(token)

    assert json.loads((tmp_path / SIDECAR_NAME).read_text(), parse_constant=refuse)["step"] == 40


def test_a_missing_sidecar_is_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_sidecar(tmp_path)


def test_a_sidecar_of_the_future_is_refused_and_says_upgrade(tmp_path: Path) -> None:
    write_sidecar(tmp_path, FULL)
    data = json.loads((tmp_path / SIDECAR_NAME).read_text())
    (tmp_path / SIDECAR_NAME).write_text(json.dumps(sealed({**data, "format": 2})))
    with pytest.raises(SidecarError, match="upgrade") as caught:
        read_sidecar(tmp_path)
    assert caught.value.newer


def test_a_field_that_this_version_does_not_know_is_passed_over(tmp_path: Path) -> None:
    write_sidecar(tmp_path, FULL)
    data = json.loads((tmp_path / SIDECAR_NAME).read_text())
    (tmp_path / SIDECAR_NAME).write_text(json.dumps(sealed({**data, "later": [1]})))
    assert read_sidecar(tmp_path) == FULL


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", 1.5),
        ("step", True),
        ("step", 10**18),
        ("sequence", None),
        ("run_id", 7),
        ("run_id", "two\nlines"),
        ("run_id", "x" * 3000),
        ("metric", "low"),
        ("metric", {"__float__": "Zero"}),
        ("metric", True),
        ("metric", 10**1000),
        ("greater_is_better", "yes"),
        ("records", {}),
        ("records", [{"step": 1}]),
        ("records", [7]),
        ("callbacks", []),
        ("callbacks", {"a": {"__float__": 3}}),
        ("manifest_expected", 1),
        ("quarantine", "bad"),
        ("quarantine", {"reason": 3}),
        ("quarantine", {"reason": "x", "onset_step": "y"}),
        ("format", "1"),
        ("format", 0),
        ("writer", None),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    write_sidecar(tmp_path, FULL)
    data = json.loads((tmp_path / SIDECAR_NAME).read_text())
    (tmp_path / SIDECAR_NAME).write_text(json.dumps(sealed({**data, key: value})))
    with pytest.raises(SidecarError):
        read_sidecar(tmp_path)


def test_a_state_that_json_cannot_hold_is_refused_with_its_place_and_the_old_file_stays(
    tmp_path: Path,
) -> None:
    write_sidecar(tmp_path, FULL)
    with pytest.raises(TypeError, match=r"`value\['seen'\]`"):
        write_sidecar(tmp_path, replace(FULL, callbacks={"Detector": {"seen": {1, 2}}}))
    assert read_sidecar(tmp_path) == FULL


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(SidecarError, match="`step`"):
        write_sidecar(tmp_path, replace(FULL, step=-1))
    assert not (tmp_path / SIDECAR_NAME).exists()
