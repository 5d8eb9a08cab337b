"""Replays read what trainers leave behind, and say what it cannot show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.core.detection.registry import make_rule
from hf_divguard.errors import HistoryError
from hf_divguard.replays import ReplayedFindings, replay
from tests import curves
from tests.processes import run_python

JUMP = curves.jump(0, height=4.0)


def log_of(values: list[float], *, every: int = 1, norm: float | None = 1.0) -> list[dict[str, Any]]:
    extra = {} if norm is None else {"grad_norm": norm}
    return [
        {"loss": value, "learning_rate": 1e-4, "epoch": i / 100, "step": (i + 1) * every, **extra}
        for i, value in enumerate(values)
    ]


def state_file(folder: Path, log: list[dict[str, Any]], step: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    path.write_text(
        json.dumps({"global_step": step, "log_history": log, "best_metric": None}), encoding="utf-8"
    )
    return path


def summary(found: ReplayedFindings) -> list[tuple[str, int, int]]:
    return [(finding.kind, finding.onset_step, finding.step) for finding in found.errors]


def test_all_forms_of_one_history_give_the_same_findings(tmp_path: Path) -> None:
    log = log_of(JUMP.values)
    file = state_file(tmp_path / "out" / "checkpoint-800", log, 800)
    columns = {key: [entry[key] for entry in log] for key in ("step", "loss", "grad_norm")}
    columns["steps"] = columns.pop("step")
    forms = [log, {"log_history": log}, columns, file, str(file), file.parent, tmp_path / "out"]
    expected = [("jump", 501, 506)]
    assert [summary(replay(form)) for form in forms] == [expected] * len(forms)


def test_an_output_folder_is_read_at_its_furthest_state(tmp_path: Path) -> None:
    state_file(tmp_path / "checkpoint-90", log_of(JUMP.values[:90]), 90)
    state_file(tmp_path / "checkpoint-800", log_of(JUMP.values), 800)
    state_file(tmp_path / "checkpoint-best", log_of([1.0]), 9999)
    (tmp_path / "checkpoint-900").mkdir()
    (tmp_path / "checkpoint-900" / "trainer_state.json").write_text(
        '{"global_step": 900, "log', encoding="utf-8"
    )
    assert replay(tmp_path).n_values == 800
    state_file(tmp_path, log_of([*JUMP.values, 6.0]), 801)
    assert replay(tmp_path).n_values == 801


@pytest.mark.parametrize(
    ("detector", "params"),
    [
        ("ema", {"threshold": 1.0}),
        ("DualTimeScaleDivergenceDetector", {"threshold": 1.0}),
        ("window", {"threshold": 1.0}),
        ("DualWindowDivergenceDetector", {"threshold": 1.0}),
        ("adaptive", {"sensitivity": 2.0}),
        ("AdaptiveDivergenceDetector", {}),
    ],
)
def test_any_detector_can_be_replayed_by_either_of_its_names(detector: str, params: dict[str, float]) -> None:
    assert replay(log_of(JUMP.values), detector, **params).errors


@pytest.mark.parametrize("detector", ["nonfinite", "NonFiniteDetector"])
def test_the_mask_of_the_nan_filter_is_found_in_a_log(detector: str) -> None:
    log = log_of([2.0, 1.9, 1.8]) + [{"loss": 0.0, "grad_norm": math.nan, "step": step} for step in (4, 5, 6)]
    assert summary(replay(log, detector)) == [("nan_filtered", 4, 4)]


@pytest.mark.parametrize("token", ["NaN", '"nan"', "Infinity", '"inf"', '"-Infinity"'])
def test_values_that_are_not_finite_are_read_in_every_spelling(token: str, tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    path.write_text(
        f'{{"log_history": [{{"loss": 2.0, "step": 1}}, {{"loss": {token}, "step": 2}}]}}', encoding="utf-8"
    )
    assert summary(replay(path)) == [("non_finite", 1, 2)]


def test_quoted_numbers_count_as_numbers() -> None:
    log = [{key: str(value) for key, value in entry.items()} for entry in log_of(JUMP.values)]
    assert summary(replay(log)) == [("jump", 501, 506)]


def test_a_log_without_steps_is_counted_in_entries_and_says_so() -> None:
    log = [{"loss": value, "epoch": i / 10} for i, value in enumerate(JUMP.values)]
    found = replay([*log, {"train_runtime": 9.0, "train_loss": 3.0, "epoch": 80.0}])
    assert summary(found) == [("jump", 501, 506)]
    assert any("name no step" in note for note in found.notes)


def test_what_a_log_cannot_show_is_said() -> None:
    notes = " ".join(replay(log_of(JUMP.values[:9], every=10, norm=None)).notes)
    for part in ("10 steps apart", "no `grad_norm`", "only 9 values"):
        assert part in notes


def test_a_full_log_needs_no_notes() -> None:
    assert replay(log_of(JUMP.values)).notes == []


def test_evaluation_losses_are_seen_set_by_set() -> None:
    turning = [3.0, 2.5, 2.2, 2.1, 2.05, 2.1, 2.2, 2.3, 2.5, 2.8]
    log = log_of(curves.healthy(0, 100).values)
    for i, loss in enumerate(turning):
        log.insert(11 * i + 10, {"eval_web_loss": loss, "eval_web_runtime": 1.0, "step": 10 * i + 10})
    found = replay(log)
    assert [(finding.metric, finding.severity) for finding in found] == [("eval_web_loss", "warning")]
    assert found.errors == []


def test_evaluations_come_with_steps_of_their_own() -> None:
    turning = [3.0, 2.5, 2.2, 2.1, 2.05, 2.1, 2.2, 2.3, 2.5, 2.8]
    steps = list(range(1, 101))
    history = {
        "steps": steps,
        "loss": curves.healthy(0, 100).values,
        "eval_loss": turning,
        "eval_steps": steps[9::10],
    }
    assert [(finding.kind, finding.onset_step) for finding in replay(history)] == [("eval_climb", 52)]
    with pytest.raises(HistoryError, match="`eval_steps` is missing"):
        replay({key: value for key, value in history.items() if key != "eval_steps"})


def test_another_metric_can_be_watched() -> None:
    log = [{"eval_loss": value, "step": step} for step, value in enumerate([2.0] * 20 + [6.0] * 20)]
    found = replay(log, "ema", metric_key="eval_loss", threshold=1.0)
    assert found[0].metric == "eval_loss"
    assert found[0].step >= 20


def test_missing_values_are_skipped() -> None:
    steps = list(range(len(JUMP.values)))
    norms = [None if step % 3 else 1.0 for step in steps]
    assert replay({"steps": steps, "loss": JUMP.values, "grad_norm": norms}).errors
    gaps = [None if step % 50 == 7 else value for step, value in enumerate(JUMP.values)]
    found = replay({"steps": steps, "loss": gaps})
    assert found.n_values == 800 - 16
    assert found.errors


def test_a_history_whose_steps_decrease_drops_its_suspicions() -> None:
    values = curves.healthy(0, 500).values
    log = log_of([*values, *[6.0] * 5])
    log += [{"loss": value, "step": 400 + i, "grad_norm": 1.0} for i, value in enumerate(values[400:500])]
    found = replay(log)
    assert found.errors == []
    assert any("decrease" in note for note in found.notes)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("no/such/place", "must be an existing file or folder, but `no/such/place` is neither"),
        ([], "holds no log entries"),
        ([1.0, 2.0], "Give bare numbers as a mapping"),
        ({}, "needs at least `loss` or `eval_loss`"),
        ({"loss": 2.0}, "`loss` must be a sequence of numbers, got 2.0"),
        ({"steps": [1, 2], "loss": [1.0]}, "one value per step, got 1 values for 2 steps"),
        ({"steps": [1, "two"], "loss": [1.0, 2.0]}, "Steps must be whole numbers, got 'two'"),
        ([{"eval_f1": 1.0, "step": 3}], "The history holds no `loss`. Its keys are: eval_f1"),
        ({"log_history": 7}, "got int"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value)[:30],
)
def test_what_is_no_history_is_refused_in_a_sentence(history: Any, message: str) -> None:
    with pytest.raises(HistoryError, match=message.replace("(", r"\(")):
        replay(history)


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    path.write_text('{"log_history": [{"loss"', encoding="utf-8")
    with pytest.raises(HistoryError, match=r"trainer_state\.json` must be complete JSON.*cut off"):
        replay(path)
    with pytest.raises(HistoryError, match=r"holds no readable `trainer_state\.json`"):
        replay(tmp_path)


def test_unknown_detectors_and_parameters_are_answered_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="There are: adaptive, ema, window, nonfinite"):
        replay([], "adaptiv")
    with pytest.raises(
        TypeError, match=r"no parameter 'treshold'\. It has: short_alpha, long_alpha, threshold"
    ):
        replay([], "ema", treshold=1.0)


def test_a_replay_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from hf_divguard.replays import replay; replay({'loss': [2.0, 1.9]}); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_detector_or_a_rule_lends_its_settings_and_keeps_its_memory() -> None:
    rule = make_rule("ema", metric_key="eval_loss", threshold=1.0)
    rule.observe(1, 2.0)
    before = rule.state_dict()
    log = [{"eval_loss": value, "step": step} for step, value in enumerate([2.0] * 20 + [6.0] * 20)]
    assert replay(log, rule)[0].step == replay(log, "ema", metric_key="eval_loss", threshold=1.0)[0].step
    assert rule.state_dict() == before
    with pytest.raises(
        TypeError, match=r"Settings are given with a name only; DualTimeScaleRule has its own"
    ):
        replay(log, rule, threshold=2.0)
    with pytest.raises(
        TypeError, match="`detector` must be a name, a detector class, a detector or a rule, got 3"
    ):
        replay(log, 3)
