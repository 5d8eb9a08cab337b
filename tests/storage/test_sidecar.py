from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from hf_divguard.storage.names import SIDECAR_NAME
from hf_divguard.storage.record import sealed
from hf_divguard.storage.sidecar import (
    CheckpointRecord,
    ExternalRecord,
    Sidecar,
    SidecarError,
    fit_callbacks,
    read_sidecar,
    write_sidecar,
)

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
    is_partial=True,
    lineage=((1, 1), (3, 3)),
    home="/runs/a",
    elsewhere=(ExternalRecord("/runs/b/checkpoint-10", 10, None, 0.9),),
    manifest_expected=True,
    quarantine={"reason": "It diverged.", "onset_step": 35, "time": "2025-01-01T00:00:00Z"},
)


def _deep(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


LISTED = (ExternalRecord("/a", 1, 2, None),)


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
        ("manifest_expected", 1),
        ("quarantine", "bad"),
        ("quarantine", {"reason": 3}),
        ("quarantine", {"reason": "x", "onset_step": "y"}),
        ("format", "1"),
        ("format", 0),
        ("suspect", 7),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    write_sidecar(tmp_path, FULL)
    data = json.loads((tmp_path / SIDECAR_NAME).read_text())
    (tmp_path / SIDECAR_NAME).write_text(json.dumps(sealed({**data, key: value})))
    with pytest.raises(SidecarError):
        read_sidecar(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "left"),
    [
        ("metric", "low", None),
        ("metric", {"__float__": "Zero"}, None),
        ("metric", True, None),
        ("metric", 10**1000, None),
        ("greater_is_better", "yes", None),
        ("metric_name", ["loss"], None),
        ("records", {}, ()),
        (
            "records",
            [{"step": 1}, 7, {"step": 20, "sequence": 1, "metric": 0.7, "in_lineage": True}],
            FULL.records[:1],
        ),
        ("lineage", [[1, 3], [1], "x", [1, "2"]], ((1, 3),)),
        (
            "elsewhere",
            [{"path": 3, "step": 1}, {"path": "/a", "step": 1, "sequence": 2, "metric": None}],
            LISTED,
        ),
        ("home", 7, None),
        ("is_partial", "yes", False),
        ("callbacks", [], {}),
        ("callbacks", {"a": {"__float__": 3}, "b": {"x": 1}}, {"b": {"x": 1}}),
        ("callbacks", {"a": _deep(900), "b": {"x": 1}}, {"b": {"x": 1}}),
        ("writer", None, ""),
    ],
)
def test_an_entry_of_the_wrong_type_is_lost_alone_and_named(
    key: str, value: object, left: object, tmp_path: Path
) -> None:
    write_sidecar(tmp_path, FULL)
    data = json.loads((tmp_path / SIDECAR_NAME).read_text())
    (tmp_path / SIDECAR_NAME).write_text(json.dumps(sealed({**data, key: value})))
    sidecar = read_sidecar(tmp_path)
    assert getattr(sidecar, key) == left
    assert sidecar.damaged
    assert replace(sidecar, **{key: getattr(FULL, key)}) == FULL


def test_a_callback_state_that_is_too_large_or_no_json_costs_only_itself() -> None:
    states = {"good": {"x": 1.5}, "large": "x" * 70_000_000, "odd": {"seen": {1, 2}}, "loop": _deep(60)}
    kept, problems = fit_callbacks(states)
    assert kept == {"good": {"x": 1.5}}
    assert [next(name for name in states if repr(name) in problem) for problem in problems] == [
        "odd",
        "loop",
        "large",
    ]


def test_of_states_that_are_too_large_together_the_largest_goes_first(tmp_path: Path) -> None:
    states = {name: "x" * size for name, size in (("a", 10_000_000), ("b", 30_000_000), ("c", 25_000_000))}
    kept, problems = fit_callbacks(states)
    assert list(kept) == ["a", "c"]
    assert "'b'" in problems[0]
    write_sidecar(tmp_path, replace(FULL, callbacks=kept))
    assert read_sidecar(tmp_path).callbacks == kept


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
