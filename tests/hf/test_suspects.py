"""What an error finding means for checkpoints: what is saved under the fault is suspect, and nothing good is lost."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainerCallback

from hf_divguard import (
    AdaptiveDivergenceDetector,
    DivGuardTrainer,
    DivGuardTrainingArguments,
    DualTimeScaleDivergenceDetector,
    best_checkpoints,
    find_checkpoints,
    latest_complete_checkpoint,
)
from hf_divguard.storage.events import read_events
from tests.conftest import MetricByStep
from tests.hf.faults import HighRate
from tests.tiny import TokenRows, same_weights, tiny_model, weights

MakeTrainer = Callable[..., Any]

STEPS = 80
FAULT = range(36, 200)
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": 3e-3,
    "train_dataset": "rows",
    "logging_steps": 1,
    "save_steps": 10,
    "eval_on_save": True,
}


class NotesWeights(TrainerCallback):
    """Notes the weights at each save."""

    def __init__(self) -> None:
        self.at: dict[int, Any] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = weights(kwargs["model"])


def diverging(make_trainer: MakeTrainer, fault: range = FAULT, callbacks: Any = (), **options: Any) -> Any:
    """Return a trainer whose learning rate is a thousand times too high in the steps of ``fault``."""
    # Without a comparison of weights a fault is found some steps late, after a save under it.
    common = {"divguard_detector": "adaptive", "divguard_action": "stop", "divguard_compare": "off"}
    chosen = {**OPTIONS, **common, **options}
    chosen["train_dataset"] = TokenRows(rows=64)
    return make_trainer(callbacks=[HighRate(fault, 1000.0), *callbacks], model=tiny_model(), **chosen)


def status_of(folder: Path) -> dict[int, str]:
    return {each.step: each.verdict.status for each in find_checkpoints(folder)}


def test_after_a_stop_what_was_saved_under_the_fault_is_suspect(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = diverging(make_trainer)
    trainer.train()
    finding = trainer.state.divguard_finding
    assert finding is not None
    assert finding.onset_step < finding.step
    status = status_of(tmp_path / "out")
    assert {step for step, each in status.items() if each == "suspect"} == {
        step for step in status if step >= finding.onset_step - 1
    }
    assert {step for step, each in status.items() if each == "complete"} == {10, 20, 30}


@pytest.mark.parametrize("limit", [1, 2])
def test_a_stopped_run_keeps_its_last_good_checkpoint_ends_with_its_weights_and_names_it(
    make_trainer: MakeTrainer, tmp_path: Path, our_log: pytest.LogCaptureFixture, limit: int
) -> None:
    notes = NotesWeights()
    trainer = diverging(
        make_trainer,
        callbacks=[notes],
        save_total_limit=limit,
        preserve_best_model=True,
        preserve_n_best=1,
        load_best_model_at_end=True,
    )
    result = trainer.train()
    onset = trainer.state.divguard_finding.onset_step
    good = str(tmp_path / "out" / "checkpoint-30")
    assert trainer.state.best_model_checkpoint == good
    assert same_weights(weights(trainer.model), notes.at[30])
    last_line = [record for record in our_log.records if record.levelno >= logging.WARNING][-1].getMessage()
    kept = [30, 20][:limit]
    assert [each.step for each in trainer.best_checkpoints(9)] == kept
    assert [each.step for each in best_checkpoints(tmp_path / "out")] == kept
    latest = latest_complete_checkpoint(tmp_path / "out")
    assert latest is not None
    assert latest.step == 30
    assert f"The fault began at step {onset}" in last_line
    assert f"--resume_from_checkpoint {good}" in last_line
    assert result.metrics["divguard/onset_step"] == onset
    assert result.metrics["divguard/last_good_step"] == 30
    assert result.metrics["divguard/last_good_checkpoint"] == good
    (event,) = read_events(tmp_path / "out")
    assert (event["event"], event["onset_step"]) == ("stopped", onset)
    assert event["last_good_checkpoint"] == good


def script(line: str, folder: Path, fault: range) -> tuple[Any, Any, NotesWeights]:
    """A user's script: all options are flags. After the fault, a useless model has the higher F1."""
    (args,) = HfArgumentParser(DivGuardTrainingArguments).parse_args_into_dataclasses(
        [*shlex.split(line), "--output_dir", str(folder)]
    )
    notes, metric = NotesWeights(), MetricByStep(lambda step: 0.67 if step >= FAULT.start else 0.5, "f1")
    trainer = DivGuardTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=TokenRows(rows=64),
        eval_dataset=TokenRows(rows=8, seed=1),
        compute_metrics=metric,
        callbacks=[HighRate(fault, 1000.0), notes, metric],
    )
    return trainer, trainer.train(resume_from_checkpoint=args.resume_from_checkpoint), notes


def test_by_flags_alone_a_run_ranked_by_f1_stops_with_its_last_good_weights_and_auto_goes_on_from_them(
    tmp_path: Path, our_log: pytest.LogCaptureFixture
) -> None:
    flags = (
        f"--max_steps {STEPS} --learning_rate 3e-3 --per_device_train_batch_size 4 --logging_steps 1 --save_steps 10 "
        "--save_total_limit 1 --preserve_best_model --preserve_n_best 1 --load_best_model_at_end --eval_on_save "
        "--best_model_metric f1 --divguard_detector adaptive --divguard_action stop --divguard_compare off "
        "--use_cpu --report_to none --disable_tqdm true --dataloader_pin_memory false"
    )
    stopped, result, notes = script(flags, tmp_path / "out", FAULT)
    onset = stopped.state.divguard_finding.onset_step
    (good,) = [step for step in notes.at if onset - 10 <= step < onset]
    assert FAULT.start <= stopped.state.divguard_finding.step < STEPS
    assert same_weights(weights(stopped.model), notes.at[good])
    flag = f"--resume_from_checkpoint {tmp_path / 'out' / f'checkpoint-{good}'}"
    last_line = [record for record in our_log.records if record.levelno >= logging.WARNING][-1].getMessage()
    assert flag in last_line
    assert result.metrics["divguard/last_good_step"] == good
    resumed, result, notes = script(f"{flags} --resume_from_checkpoint auto", tmp_path / "out", range(0))
    assert min(notes.at) == good + 10
    assert resumed.state.global_step == STEPS
    assert "divguard/finished" not in result.metrics
    assert resumed.state.divguard_finding is None


@pytest.mark.parametrize("asked", [True, "latest", "auto", "best", "true"])
def test_a_resume_passes_suspects_over(
    make_trainer: MakeTrainer, tmp_path: Path, our_log: pytest.LogCaptureFixture, asked: Any
) -> None:
    diverging(make_trainer, preserve_best_model=True).train()
    healthy = diverging(make_trainer, fault=range(0), preserve_best_model=True, max_steps=40)
    started = []

    class NotesStart(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            started.append(state.global_step)

    healthy.add_callback(NotesStart())
    healthy.train(resume_from_checkpoint=asked)
    assert started == [30]
    assert "suspect" in our_log.text


def test_a_resume_from_a_suspect_by_its_path_warns_and_finds_the_fault_again(
    make_trainer: MakeTrainer, tmp_path: Path, our_log: pytest.LogCaptureFixture
) -> None:
    first = diverging(make_trainer)
    first.train()
    step = first.state.global_step
    again = diverging(make_trainer)
    our_log.clear()
    again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
    assert "was saved after a divergence" in our_log.text
    assert again.state.divguard_finding is not None
    assert step < again.state.divguard_finding.step <= step + 15


class Wave(TrainerCallback):
    """Puts a wave into the logged evaluation loss: high in some steps, then as before."""

    def __init__(self, high: range) -> None:
        self.high = high

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_score"] = 9.0 if state.global_step in self.high else 1.0


def test_a_condition_that_ends_without_action_clears_the_suspects(
    make_trainer: MakeTrainer, tmp_path: Path, our_log: pytest.LogCaptureFixture
) -> None:
    detector = DualTimeScaleDivergenceDetector(
        0.9, 0.05, 3.0, metric_key="eval_score", action="warn", greater_is_better=False
    )
    trainer = make_trainer(
        callbacks=[Wave(range(8, 13)), detector], max_steps=20, save_steps=2, eval_on_save=True
    )
    seen: dict[int, set[int]] = {}

    class NotesStatus(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            status = status_of(tmp_path / "out")
            seen[state.global_step] = {step for step, each in status.items() if each == "suspect"}

    trainer.add_callback(NotesStatus())
    trainer.train()
    assert trainer.state.divguard_finding is None
    assert {8, 10, 12} <= seen[12] | seen[14]
    assert seen[20] == set()
    assert set(status_of(tmp_path / "out").values()) == {"complete"}
    assert "count again" in our_log.text


def test_the_stock_best_model_is_not_a_suspect_either(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = diverging(make_trainer, load_best_model_at_end=True, save_total_limit=2)
    trainer.train()
    assert trainer.state.best_global_step is not None
    assert trainer.state.best_global_step <= trainer.state.divguard_finding.onset_step - 2


def test_save_model_after_a_stop_says_which_weights_it_stores_and_the_last_good_ones_can_be_loaded(
    make_trainer: MakeTrainer, tmp_path: Path, our_log: pytest.LogCaptureFixture
) -> None:
    notes = NotesWeights()
    trainer = diverging(make_trainer, callbacks=[notes])
    trainer.train()
    our_log.clear()
    trainer.save_model(str(tmp_path / "model"))
    assert "weights of step" in our_log.text
    assert "load_last_good()" in our_log.text
    loaded = trainer.load_last_good()
    assert loaded == str(tmp_path / "out" / "checkpoint-30")
    assert same_weights(weights(trainer.model), notes.at[30])
    our_log.clear()
    trainer.save_model(str(tmp_path / "model"))
    assert "load_last_good()" not in our_log.text


def test_without_a_good_checkpoint_the_last_good_weights_cannot_be_loaded(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(save_strategy="no", max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="no good checkpoint"):
        trainer.load_last_good()


def test_a_rollback_leaves_the_same_weights_once_among_the_best(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = diverging(
        make_trainer,
        fault=range(36, 44),
        divguard_action="rollback",
        preserve_best_model=True,
        preserve_n_best=3,
        save_total_limit=2,
    )
    trainer.train()
    (event, *_) = [each for each in trainer.divguard_events if each["event"] == "rollback"]
    ranked = [each.step for each in trainer.best_checkpoints(9)]
    assert not {event["step"], event["target_step"]} <= set(ranked)


def test_a_healthy_run_has_no_suspect(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = diverging(make_trainer, fault=range(0), save_total_limit=2, max_steps=40)
    trainer.train()
    assert status_of(tmp_path / "out") == {30: "complete", 40: "complete"}
    assert trainer.divguard_events == []
    assert isinstance(trainer.callback_handler.callbacks[-1], AdaptiveDivergenceDetector)
