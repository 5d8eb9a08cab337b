from __future__ import annotations

import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_divguard.storage.checkpoints import best_checkpoints, find_checkpoints, latest_complete_checkpoint
from hf_divguard.storage.names import MANIFEST_NAME, SIDECAR_NAME
from hf_divguard.storage.sidecar import CheckpointRecord, write_sidecar

from .conftest import certify, records_of, sidecar_of, small_checkpoint


def steps(output_dir: Path) -> list[int]:
    return [info.step for info in find_checkpoints(output_dir)]


def make(output_dir: Path, order: list[int], *, plain: tuple[int, ...] = ()) -> None:
    """Write checkpoints in the ``order`` of saving; those of ``plain`` have no file of ours."""
    for place, step in enumerate(order, start=1):
        folder = small_checkpoint(output_dir / f"checkpoint-{step}")
        if step not in plain:
            certify(folder, sequence=place, records=records_of(*order[:place]))


def test_the_order_is_that_of_saving_whatever_the_numbers_and_times(tmp_path: Path) -> None:
    order = [700, 800, 100, 90, 1000, 200]
    make(tmp_path, order)
    for place, step in enumerate(random.Random(0).sample(order, 6)):
        os.utime(tmp_path / f"checkpoint-{step}", (place, place))
    assert steps(tmp_path) == order
    latest = latest_complete_checkpoint(tmp_path)
    assert latest is not None
    assert (latest.step, latest.sequence, latest.run_id) == (200, 6, "run")


def test_folders_of_the_trainer_alone_are_in_the_order_of_steps(tmp_path: Path) -> None:
    make(tmp_path, [100, 9, 10], plain=(100, 9, 10))
    assert steps(tmp_path) == [9, 10, 100]


def test_a_folder_without_a_sidecar_stands_where_the_newest_sidecar_lists_it(tmp_path: Path) -> None:
    make(tmp_path, [700, 750, 100, 150], plain=(700, 750))
    assert steps(tmp_path) == [700, 750, 100, 150]


def test_a_sidecar_that_was_lost_does_not_change_the_order(tmp_path: Path) -> None:
    order = [50, 20, 70, 10, 30]
    make(tmp_path, order)
    for step in (20, 70):
        (tmp_path / f"checkpoint-{step}" / SIDECAR_NAME).unlink()
        (tmp_path / f"checkpoint-{step}" / MANIFEST_NAME).unlink()
    assert steps(tmp_path) == order


def test_a_folder_that_no_sidecar_lists_is_newer_than_those_that_are(tmp_path: Path) -> None:
    make(tmp_path, [500, 600])
    make(tmp_path, [20, 10], plain=(20, 10))
    assert steps(tmp_path) == [500, 600, 10, 20]


def test_a_copy_of_another_steps_sidecar_gives_no_place(tmp_path: Path) -> None:
    make(tmp_path, [10, 20])
    shutil.copytree(tmp_path / "checkpoint-10", tmp_path / "checkpoint-15")
    assert steps(tmp_path) == [10, 20, 15]
    latest = latest_complete_checkpoint(tmp_path)
    assert latest is not None
    assert latest.step == 20


def test_only_folders_of_the_exact_name_are_checkpoints(tmp_path: Path) -> None:
    make(tmp_path, [10])
    for name in (
        "checkpoint-best",
        "checkpoint-20.bak",
        "checkpoint-30-merged",
        "checkpoint-",
        "checkpoint-040",
        "x",
    ):
        small_checkpoint(tmp_path / name / "checkpoint-1").rename(tmp_path / name / "inner")
    (tmp_path / "checkpoint-5").write_text("a file")
    (tmp_path / "checkpoint-٣").mkdir()
    assert steps(tmp_path) == [10]


def test_a_missing_output_folder_and_a_file_hold_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert find_checkpoints(tmp_path / "missing") == []
    assert find_checkpoints(tmp_path / "file") == []
    assert latest_complete_checkpoint(tmp_path) is None


def test_the_latest_complete_one_is_found_behind_broken_ones(tmp_path: Path) -> None:
    make(tmp_path, [10, 20, 30, 40])
    (tmp_path / "checkpoint-40" / MANIFEST_NAME).unlink()
    (tmp_path / "checkpoint-30" / "weights.dat").write_bytes(b"")
    latest = latest_complete_checkpoint(tmp_path)
    assert latest is not None
    assert latest.step == 20


def test_all_is_found_again_after_the_output_folder_was_moved(tmp_path: Path) -> None:
    make(tmp_path / "old", [30, 10, 20])
    before = steps(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert steps(tmp_path / "new") == before
    assert all(Path(info.path).parent == tmp_path / "new" for info in find_checkpoints(tmp_path / "new"))


def test_checkpoints_that_are_deleted_while_looking_are_left_out(tmp_path: Path) -> None:
    make(tmp_path, [10, 20])
    import hf_divguard.storage.survey as survey

    real = survey.verify_with_record
    with pytest.MonkeyPatch.context() as patch:

        def vanish(path: Path, **options: bool) -> object:
            if path.name == "checkpoint-10":
                shutil.rmtree(path)
            return real(path, **options)

        patch.setattr(survey, "verify_with_record", vanish)
        assert steps(tmp_path) == [20]


def rank(output_dir: Path, metrics: dict[int, float | None], greater: bool, **more: object) -> list[int]:
    order = list(metrics)
    for place, (step, metric) in enumerate(metrics.items(), start=1):
        folder = small_checkpoint(output_dir / f"checkpoint-{step}")
        records = tuple(
            CheckpointRecord(each, at, metrics[each]) for at, each in enumerate(order[:place], start=1)
        )
        certify(
            folder,
            sequence=place,
            metric_name="eval_score",
            metric=metric,
            greater_is_better=greater,
            records=records,
            **more,
        )
    return [info.step for info in best_checkpoints(output_dir)]


@pytest.mark.parametrize(
    ("greater", "expected"), [(False, [5, 4, 1, 7, 6, 3, 2]), (True, [1, 5, 4, 7, 6, 3, 2])]
)
def test_the_best_come_first_and_nan_and_infinities_last_in_both_directions(
    greater: bool, expected: list[int], tmp_path: Path
) -> None:
    metrics = {1: 0.9, 2: math.nan, 3: math.inf, 4: 0.5, 5: 0.5, 6: -math.inf, 7: math.nan, 8: None}
    assert rank(tmp_path, metrics, greater) == expected


def test_n_limits_how_many_are_returned(tmp_path: Path) -> None:
    rank(tmp_path, {1: 0.3, 2: 0.1, 3: 0.2}, False)
    assert [[info.step for info in best_checkpoints(tmp_path, n)] for n in (0, 1, 2, 9)] == [
        [],
        [2],
        [2, 3],
        [2, 3, 1],
    ]
    with pytest.raises(ValueError, match="`n` must be at least 0, got -1"):
        best_checkpoints(tmp_path, -1)


def test_what_the_newest_one_does_not_descend_from_is_never_best(tmp_path: Path) -> None:
    rank(tmp_path, {700: 0.0, 100: 0.5, 200: 0.4}, False)
    records = (
        CheckpointRecord(700, 1, 0.0, in_lineage=False),
        CheckpointRecord(100, 2, 0.5),
        CheckpointRecord(200, 3, 0.4),
    )
    certify(
        tmp_path / "checkpoint-200",
        sequence=3,
        metric_name="score",
        metric=0.4,
        greater_is_better=False,
        records=records,
    )
    assert [info.step for info in best_checkpoints(tmp_path)] == [200, 100]


def test_an_incomplete_checkpoint_is_never_best(tmp_path: Path) -> None:
    rank(tmp_path, {1: 0.1, 2: 0.2}, False)
    (tmp_path / "checkpoint-1" / "weights.dat").unlink()
    assert [info.step for info in best_checkpoints(tmp_path)] == [2]


def test_stock_checkpoints_get_the_metric_of_their_very_step_from_the_log_history(run_dir: Path) -> None:
    found = best_checkpoints(run_dir)
    history = json.loads((run_dir / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    logged = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert {info.step: info.metric for info in found} == logged
    assert [info.step for info in found] == sorted(logged, key=lambda step: logged[step])
    assert found[0].metric_name == "eval_loss"


def test_another_metric_and_direction_can_be_asked_for(run_dir: Path) -> None:
    by_speed = best_checkpoints(run_dir, metric="samples_per_second", greater_is_better=True)
    assert len(by_speed) == 2
    with pytest.raises(ValueError, match="`greater_is_better` must be given"):
        best_checkpoints(run_dir, metric="zork")
    assert best_checkpoints(run_dir, metric="accuracy") == []


def test_a_stock_checkpoint_saved_off_its_evaluation_has_no_metric(run_dir: Path) -> None:
    path = run_dir / "checkpoint-2" / "trainer_state.json"
    for path in (
        run_dir / "checkpoint-2" / "trainer_state.json",
        run_dir / "checkpoint-4" / "trainer_state.json",
    ):
        state = json.loads(path.read_text())
        for entry in state["log_history"]:
            if entry["step"] == 2 and "eval_loss" in entry:
                entry["step"] = 3
        path.write_text(json.dumps(state))
    assert [info.step for info in best_checkpoints(run_dir)] == [4]


def test_the_newest_sidecar_remembers_the_metric_of_a_folder_without_one(
    tmp_path: Path, run_dir: Path
) -> None:
    write_sidecar(
        run_dir / "checkpoint-4",
        sidecar_of(
            4,
            sequence=2,
            manifest_expected=False,
            metric_name="eval_f1",
            metric=0.5,
            greater_is_better=True,
            records=(CheckpointRecord(2, 1, 0.9), CheckpointRecord(4, 2, 0.5)),
        ),
    )
    assert [(info.step, info.metric) for info in best_checkpoints(run_dir)] == [(2, 0.9), (4, 0.5)]


@pytest.mark.parametrize(
    "history",
    [None, 7, [7, None, {"step": 4}], [{"step": 4, "eval_loss": "low"}], [{"step": 4, "eval_loss": 10**400}]],
)
def test_a_strange_log_history_is_no_crash(history: object, run_dir: Path) -> None:
    for step in (2, 4):
        path = run_dir / f"checkpoint-{step}" / "trainer_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "log_history": history}))
    assert len(best_checkpoints(run_dir)) <= 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True), st.data())
def test_whatever_sidecars_are_lost_the_order_is_that_of_saving(
    tmp_path: Path, order: list[int], data: st.DataObject
) -> None:
    """The newest sidecar that is left gives the order of all that it lists."""
    lost = data.draw(st.sets(st.sampled_from(order)))
    for place, step in enumerate(order, start=1):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        write_sidecar(folder, sidecar_of(step, sequence=place, records=records_of(*order[:place])))
    for step in lost:
        (tmp_path / f"checkpoint-{step}" / SIDECAR_NAME).unlink()
    kept = [place for place, step in enumerate(order) if step not in lost]
    newest = max(kept, default=-1)
    assert steps(tmp_path) == [*order[: newest + 1], *sorted(order[newest + 1 :])]
    for step in order:
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
