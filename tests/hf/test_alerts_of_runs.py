"""Alerts of a run: on a real server, to functions, and without harm to training."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_divguard import DivGuardTrainingArguments, NonFiniteDetector
from hf_divguard.alerts.alerts import CHANNELS, channels_of
from tests.alerts.servers import refusing, serving
from tests.hf import record_runs
from tests.hf.faults import QUICK, NaNBatch
from tests.tiny import tiny_model, weights

MakeTrainer = Callable[..., Any]


def faulty(
    make_trainer: MakeTrainer, *, on_divergence: Any = None, callbacks: Any = (), **options: Any
) -> Any:
    model = tiny_model()
    trainer = make_trainer(
        model=model,
        callbacks=[NaNBatch(model, range(7, 8)), NonFiniteDetector(action="rollback"), *callbacks],
        **{**QUICK, "divguard_skip_nonfinite": False, **options},
    )
    trainer._on_divergence = on_divergence
    trainer.train()
    return trainer


def test_a_rollback_is_posted_once(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serving() as server:
        monkeypatch.setenv("DIVGUARD_WEBHOOK_URL", server.url)
        trainer = faulty(make_trainer, divguard_alerts="webhook", run_name="night")
    [body] = server.bodies
    assert body["event"] == trainer.divguard_events[0]
    assert body["title"] == "night: Training was rolled back from step 7 to step 4 (non_finite)"
    assert body["run"] == {"name": "night", "output_dir": str(tmp_path / "out")}


def test_the_address_is_nowhere_in_the_folder_of_the_run_and_not_in_the_log(
    make_trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    our_log: pytest.LogCaptureFixture,
) -> None:
    with refusing() as url:
        monkeypatch.setenv("DIVGUARD_SLACK_WEBHOOK_URL", url)
        monkeypatch.setattr("hf_divguard.alerts.webhook._FIRST_PAUSE_SECONDS", 0.01)
        trainer = faulty(make_trainer, divguard_alerts="slack")
    assert trainer.state.global_step == 24
    assert "An alert could not be delivered to slack" in our_log.text
    assert "SECRET-PATH" not in our_log.text
    assert "SECRET-PATH" not in json.dumps(trainer.args.to_dict())
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert all(b"SECRET-PATH" not in path.read_bytes() for path in files)


def test_functions_and_callbacks_get_the_events_in_another_thread(make_trainer: MakeTrainer) -> None:
    got: list[tuple[str, dict[str, Any], bool]] = []

    def note(source: str, event: dict[str, Any]) -> None:
        got.append((source, event, threading.current_thread() is threading.main_thread()))

    class Notes(TrainerCallback):
        def on_divergence(self, event: dict[str, Any]) -> None:
            note("callback", event)

    trainer = faulty(make_trainer, on_divergence=lambda event: note("function", event), callbacks=[Notes()])
    [event] = trainer.divguard_events
    assert sorted(got, key=lambda each: each[0]) == [("callback", event, False), ("function", event, False)]


def test_the_function_is_an_argument_of_the_trainer(tmp_path: Path) -> None:
    from hf_divguard import DivGuardTrainer
    from tests.tiny import TokenRows, base_arguments

    got: list[dict[str, Any]] = []
    model = tiny_model()
    DivGuardTrainer(
        model=model,
        args=DivGuardTrainingArguments(**base_arguments(tmp_path, **QUICK), divguard_skip_nonfinite=False),
        train_dataset=TokenRows(),
        callbacks=[NaNBatch(model, range(7, 8)), NonFiniteDetector(action="stop")],
        on_divergence=got.append,
    ).train()
    assert [event["event"] for event in got] == ["stopped"]


def test_a_function_that_raises_changes_nothing(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def raises(event: dict[str, Any]) -> None:
        raise RuntimeError

    first = faulty(make_trainer)
    second = faulty(lambda **options: make_trainer(tmp_path / "second", **options), on_divergence=raises)
    ours, theirs = weights(first.model), weights(second.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_only_the_first_rank_sends_and_its_alert_is_out_before_any_rank_ends(
    run_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        outcomes = run_ranks(
            record_runs.alerting, 2, output_dir=tmp_path / "out", url=server.url, action="abort"
        )
        assert [outcome.error for outcome in outcomes] == ["SystemExit: 79"] * 2
        assert [body["event"]["event"] for body in server.bodies] == ["aborted"]


def test_an_alert_without_an_address_is_refused_before_training_on_every_rank(
    run_ranks: Any, tmp_path: Path
) -> None:
    outcomes = run_ranks(record_runs.alerting, 2, output_dir=tmp_path / "out", url="", action="stop")
    for outcome in outcomes:
        assert outcome.error.startswith(
            "ValueError: `divguard_alerts` contains 'webhook', but the environment"
        )


def test_names_may_have_spaces_and_a_comma_too_many(tmp_path: Path) -> None:
    args = DivGuardTrainingArguments(str(tmp_path), use_cpu=True, divguard_alerts=" webhook , slack,")
    assert list(channels_of(args.divguard_alerts)) == ["webhook", "slack"]


@pytest.mark.parametrize("value", ["slak", "", "https://hooks.example.org/SECRET", 3])
def test_a_channel_that_is_none_is_refused_and_an_address_is_not_repeated(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="`divguard_alerts` must be none, or one or more of") as caught:
        DivGuardTrainingArguments(str(tmp_path), use_cpu=True, divguard_alerts=value)
    assert "SECRET" not in str(caught.value)
    assert all(name in str(caught.value) for name in CHANNELS)
