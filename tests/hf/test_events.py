"""Every finding of every action is an event: in ``divguard_events``, in the file, in the log of its step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_divguard import NonFiniteDetector
from hf_divguard.errors import TrainingDivergedError
from hf_divguard.hf.detectors import DivergenceDetector
from hf_divguard.hf.journal import RunJournal
from hf_divguard.hf.ranks import Ranks
from hf_divguard.storage.events import events_path, read_events
from tests.hf import record_runs
from tests.hf.faults import QUICK, NaNBatch, ScriptedRule
from tests.tiny import TokenRows, tiny_model

MakeTrainer = Callable[..., Any]

COMMON = {"version", "run_id", "time", "event", "action", "step", "onset_step", "finding"}


def logged(trainer: Any, key: str) -> list[tuple[int, float]]:
    """Return the steps and values at which a key was logged."""
    return [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize(("action", "name"), [("warn", "warned"), ("stop", "stopped"), ("abort", "aborted")])
def test_a_finding_is_an_event_with_what_is_known_of_it(
    make_trainer: MakeTrainer, tmp_path: Path, action: str, name: str
) -> None:
    model = tiny_model()
    options = {**QUICK, "max_steps": 12, "divguard_skip_nonfinite": False}
    trainer = make_trainer(
        model=model, callbacks=[NaNBatch(model, range(7, 8)), NonFiniteDetector(action=action)], **options
    )
    trainer.train()
    [event] = trainer.divguard_events
    assert read_events(tmp_path / "out") == [event]
    assert event.keys() >= COMMON | {"last_good_step", "last_good_checkpoint"}
    assert (event["version"], event["event"], event["action"]) == (1, name, action)
    assert (event["step"], event["onset_step"]) == (7, 7)
    assert event["last_good_checkpoint"] == str(tmp_path / "out" / "checkpoint-4")
    finding = event["finding"]
    assert (finding["kind"], finding["value"], finding["limit"]) == ("non_finite", "NaN", None)
    assert logged(trainer, f"divguard/{name}") == [(7, 1)]
    assert logged(trainer, "divguard/non_finite") == [(7, 1)]
    assert logged(trainer, "divguard/onset_step") == [(7, 7)]
    assert logged(trainer, "divguard/last_good_step") == [(7, 4)]
    ours = [{key: entry[key] for key in entry if "divguard/" in key} for entry in trainer.state.log_history]
    json.dumps(ours, allow_nan=False)


@pytest.mark.parametrize(("action", "ends"), [("stop", "stops after this step"), ("abort", "ends now")])
def test_the_log_says_that_it_is_a_divergence_and_nothing_else_after_it(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture, action: str, ends: str
) -> None:
    """A reader of the log sees what happened before the losses, and no "Training goes on" after it."""

    class Ruin(TrainerCallback):
        def on_step_begin(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
        ) -> None:
            if state.global_step == 40:
                optimizer.param_groups[0]["lr"] *= 1000

    options = {"max_steps": 60, "save_steps": 10, "train_dataset": TokenRows(rows=64)}
    options |= {"divguard_detector": "adaptive", "divguard_action": action}
    trainer = make_trainer(callbacks=[Ruin()], **options)
    trainer.train()
    lines = [record.getMessage() for record in our_log.records]
    [said] = [line for line in lines if line.startswith("Divergence found at step ")]
    assert said.endswith(f" Training {ends}.")
    assert not any("Training goes on" in line for line in lines[lines.index(said) :])


def test_the_log_of_the_step_is_made_all_the_same(make_trainer: MakeTrainer) -> None:
    """An entry of its own does not take the place of the one with the loss."""
    rule = ScriptedRule({5: 5})
    plain = make_trainer(max_steps=8, save_strategy="no")
    plain.train()
    warned = make_trainer(
        max_steps=8, save_strategy="no", callbacks=[DivergenceDetector(rule, action="warn")]
    )
    warned.train()
    assert logged(warned, "loss") == logged(plain, "loss")
    assert [step for step, _ in logged(warned, "divguard/warned")] == [5]


def test_a_rollback_and_giving_up_are_events_with_all_fields(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    model = tiny_model()
    trainer = make_trainer(
        model=model,
        callbacks=[NaNBatch(model, range(7, 25)), NonFiniteDetector(action="rollback")],
        **QUICK,
        divguard_skip_nonfinite=False,
        divguard_max_rollbacks=1,
    )
    with pytest.raises(TrainingDivergedError):
        trainer.train()
    rollback, gave_up = trainer.divguard_events
    assert read_events(tmp_path / "out") == [rollback, gave_up]
    assert rollback.keys() >= COMMON
    assert gave_up.keys() >= COMMON | {"last_good_checkpoint", "reason"}
    assert (rollback["event"], gave_up["event"]) == ("rollback", "gave_up")
    assert logged(trainer, "divguard/rollbacks") == [(7, 1)]
    assert logged(trainer, "divguard/gave_up") == [(gave_up["step"], 1)]
    assert (7, 7) in logged(trainer, "divguard/onset_step")


def test_a_skipped_update_is_an_event_with_loss_and_gradient_norm(make_trainer: MakeTrainer) -> None:
    model = tiny_model()
    trainer = make_trainer(
        model=model, callbacks=[NaNBatch(model, range(7, 9))], divguard_detector="adaptive", **QUICK
    )
    trainer.train()
    skipped = [event for event in trainer.divguard_events if event["event"] == "update_skipped"]
    assert [(event["step"], event["number"], event["loss"]) for event in skipped] == [
        (7, 1, "NaN"),
        (8, 2, "NaN"),
    ]
    assert logged(trainer, "divguard/update_skipped") == [(7, 1), (8, 2)]


def test_a_warning_that_is_no_error_is_an_event_too(make_trainer: MakeTrainer) -> None:
    class Mild(ScriptedRule):
        def observe(self, step: int, value: float) -> Any:
            from dataclasses import replace

            found = super().observe(step, value)
            return None if found is None else replace(found, severity="warning")

    trainer = make_trainer(callbacks=[DivergenceDetector(Mild({5: 5}), action="stop")])
    trainer.train()
    [event] = trainer.divguard_events
    assert (event["event"], event["action"], event["finding"]["severity"]) == ("warned", "warn", "warning")
    assert trainer.state.global_step == 8


def test_the_checkpoint_of_a_stopped_run_has_the_finding_in_its_log(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(
        callbacks=[DivergenceDetector(ScriptedRule({5: 5}), action="stop")],
        eval_on_save=True,
        divguard_compare="off",
    )
    trainer.train()
    state = json.loads((tmp_path / "out" / "checkpoint-5" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "divguard/stopped" in entry] == [5]


def test_a_signal_is_an_event(run_ranks: Any, tmp_path: Path) -> None:
    outcome = run_ranks(record_runs.interrupted, output_dir=tmp_path / "out")[0]
    assert outcome.error == "SystemExit: 75"
    [event] = read_events(tmp_path / "out")
    assert (event["event"], event["signal"], event["step"]) == ("signalled", "SIGTERM", 3)
    outcome = run_ranks(record_runs.resumed, output_dir=tmp_path / "out")[0]
    assert [each["event"] for each in outcome.check()["events"]] == ["signalled"]
    assert "undone_by_resume_from" not in read_events(tmp_path / "out")[0]


def test_what_only_another_rank_finds_is_in_the_record_of_the_first(run_ranks: Any, tmp_path: Path) -> None:
    """``compute_metrics`` may give each rank another value."""
    outcomes = run_ranks(record_runs.found_on_rank_one, 2, output_dir=tmp_path / "out")
    for outcome in outcomes:
        [event] = outcome.check()["events"]
        assert (event["event"], event["step"], event["finding"]["metric"]) == ("stopped", 4, "eval_score")
    assert [each["event"] for each in read_events(tmp_path / "out")] == ["stopped"]


# ---- the file


def journal(folder: Path, state: dict[str, Any] | None = None, step: int = 0) -> RunJournal:
    """Return a journal that has begun."""
    made = RunJournal(str(folder), "run", Ranks(0, 1))
    if state is not None:
        made.load_state_dict(state)
    made.begin(step)
    return made


def test_events_are_appended_and_a_broken_last_line_costs_only_itself(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.add({"event": "data", "step": 1})
    first.write()
    before = events_path(tmp_path).stat().st_ino
    with events_path(tmp_path).open("a") as file:
        file.write('{"event": "half of a li')
    first.add({"event": "data", "step": 2})
    first.write()
    assert events_path(tmp_path).stat().st_ino == before
    assert [event["step"] for event in read_events(tmp_path)] == [1, 2]


def test_all_events_of_a_long_run_are_known_after_a_resume(tmp_path: Path) -> None:
    """A checkpoint holds the newest ones only."""
    long = journal(tmp_path)
    for step in range(1, 501):
        long.add({"event": "data", "step": step})
    long.write()
    state = long.state_dict()
    assert len(state["events"]) < 300
    for step in range(501, 511):
        long.add({"event": "data", "step": step})
    long.write()
    resumed = journal(tmp_path, state, step=500)
    assert [event["step"] for event in resumed.events] == list(range(1, 501))
    undone = [event["step"] for event in read_events(tmp_path) if "undone_by_resume_from" in event]
    assert undone == list(range(501, 511))
    assert resumed.take_new() == []


def test_rollbacks_are_never_left_out_of_a_checkpoint(tmp_path: Path) -> None:
    """How many updates are in the weights depends on all of them."""
    long = journal(tmp_path)
    long.add({"event": "rollback", "step": 5, "target_step": 2, "steps_lost": 3, "incident": 1})
    for step in range(6, 506):
        long.add({"event": "data", "step": step})
    elsewhere = journal(tmp_path / "elsewhere", long.state_dict(), step=505)
    assert elsewhere.updates_up_to(505) == long.updates_up_to(505) == 502


def test_a_full_disk_costs_nothing_that_a_later_write_cannot_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = journal(tmp_path)
    made.add({"event": "data", "step": 1})
    with monkeypatch.context() as patch:
        patch.setattr("hf_divguard.hf.journal.append_events", _no_space)
        made.write()
    made.write()
    assert read_events(tmp_path) == []
    made.add({"event": "data", "step": 2})
    made.write()
    assert [event["step"] for event in read_events(tmp_path)] == [1, 2]


def test_earlier_events_that_cannot_be_read_are_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, our_log: pytest.LogCaptureFixture
) -> None:
    """A disk that fails for a moment, or a file beyond the limit, must not cost what happened before."""
    first = journal(tmp_path)
    first.add({"event": "data", "step": 1})
    first.write()
    kept = events_path(tmp_path).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("hf_divguard.storage.events._MAX_BYTES", 10)
        journal(tmp_path, first.state_dict(), step=1)
    assert "cannot be read" in our_log.text
    assert events_path(tmp_path).with_name("events-unreadable.jsonl").read_bytes() == kept
    assert [event["step"] for event in read_events(tmp_path)] == [1]


def _no_space(*args: Any) -> None:
    raise OSError(28, "No space left on device")
