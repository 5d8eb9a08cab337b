"""What a user calls: ``best_checkpoints()``, and resuming from the newest, the best, or a named checkpoint."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_divguard import (
    CheckpointError,
    DivGuardArgumentsMixin,
    DivGuardMixin,
    DivGuardTrainer,
    DivGuardTrainingArguments,
    NoCompleteCheckpointError,
)
from tests.conftest import AskAt, MetricByStep, Recorder
from tests.tiny import checkpoint_steps

pytestmark = pytest.mark.filterwarnings("ignore:mtime may not be reliable")

SCORES = {2: 0.1, 4: 0.9, 6: math.nan, 8: 0.5, 10: 0.4}
BEST = {"preserve_best_model": True, "best_model_metric": "score", "best_model_greater_is_better": True}


@dataclass
class OurArguments(DivGuardArgumentsMixin, Seq2SeqTrainingArguments):
    pass


class OurTrainer(DivGuardMixin, Seq2SeqTrainer):
    pass


@pytest.fixture
def make(make_trainer: Any) -> Any:
    def make(scores: Any = None, callbacks: Any = (), **options: Any) -> Any:
        metric = MetricByStep(SCORES if scores is None else scores)
        options = {"eval_on_save": True, "logging_strategy": "no", **BEST, **options}
        return make_trainer(callbacks=[metric, *callbacks], compute_metrics=metric, **options)

    return make


def out(tmp_path: Path, step: int) -> str:
    return str(tmp_path / "out" / f"checkpoint-{step}")


# ---- best_checkpoints


def test_best_checkpoints_gives_path_step_and_metric_best_first(make: Any, tmp_path: Path) -> None:
    trainer = make()
    assert trainer.best_checkpoints() == []
    trainer.train()
    (best,) = trainer.best_checkpoints()
    assert (best.path, best.step, best.metric) == (out(tmp_path, 4), 4, 0.9)
    ranked = trainer.best_checkpoints(10)
    assert [(entry.path, entry.step) for entry in ranked] == [(out(tmp_path, s), s) for s in (4, 8, 2, 6)]
    assert math.isnan(ranked[-1].metric)
    assert [entry.step for entry in trainer.best_checkpoints(2)] == [4, 8]


def test_by_default_as_many_are_given_as_are_preserved(make: Any) -> None:
    trainer = make(preserve_n_best=3)
    trainer.train()
    assert [entry.step for entry in trainer.best_checkpoints()] == [4, 8, 2]


def test_the_state_agrees_with_them_at_every_save_and_at_the_end(make: Any) -> None:
    seen = []

    class Compare(Recorder):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (best,) = trainer.best_checkpoints()
            seen.append((best.path, best.step, best.metric))
            assert (state.best_model_checkpoint, state.best_global_step, state.best_metric) == seen[-1]
            assert Path(best.path).is_dir()

    trainer = make(callbacks=[Compare()], save_total_limit=1)
    trainer.train()
    assert [step for _, step, _ in seen] == [2, 4, 4, 4]
    assert trainer.state.best_model_checkpoint == trainer.best_checkpoints()[0].path


def test_they_are_logged_at_the_end_of_training(make: Any, tmp_path: Path, our_log: Any) -> None:
    make(preserve_n_best=2).train()
    (line,) = [r.getMessage() for r in our_log.records if r.getMessage().startswith("Best checkpoints:")]
    assert line == (
        f"Best checkpoints: {out(tmp_path, 4)} (eval_score 0.9), {out(tmp_path, 8)} (eval_score 0.5)."
    )


def test_if_no_save_was_evaluated_the_end_says_so_and_there_is_no_best(make: Any, our_log: Any) -> None:
    trainer = make(
        {3: 0.5, 6: 0.2},
        callbacks=[AskAt(save={4}, stop={6})],
        eval_on_save=False,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=100,
    )
    trainer.train()
    assert trainer.best_checkpoints(9) == []
    assert trainer.state.best_model_checkpoint is None
    assert "there is no best one. Set `eval_on_save=True`" in our_log.text


def test_without_preserve_best_model_they_are_still_listed_by_eval_loss(make_trainer: Any) -> None:
    trainer = make_trainer(eval_on_save=True)
    trainer.train()
    ranked = trainer.best_checkpoints(9)
    assert {entry.step for entry in ranked} == {2, 4, 6, 8}
    assert [entry.metric for entry in ranked] == sorted(entry.metric for entry in ranked)


# ---- resume


def note_starts(trainer: Any) -> list[int]:
    """Return a list that gets the step at which each training begins."""
    began: list[int] = []

    class Note(Recorder):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            began.append(state.global_step)

    trainer.add_callback(Note())
    return began


@pytest.mark.parametrize(
    ("asked", "step"),
    [(True, 8), ("latest", 8), ("best", 4), (4, 4), (2, 2)],
    ids=["True", "latest", "best", "a path", "an older path"],
)
def test_a_resume_starts_where_it_was_asked_to(make: Any, tmp_path: Path, asked: Any, step: int) -> None:
    make().train()
    trainer = make(max_steps=10)
    began = note_starts(trainer)
    trainer.train(resume_from_checkpoint=out(tmp_path, asked) if type(asked) is int else asked)
    assert began == [step]
    assert trainer.state.global_step == 10


def test_a_path_may_be_a_path_object_relative_or_with_a_slash(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(output_dir="out", save_total_limit=1).train()
    for asked in ("./out/checkpoint-8/", tmp_path / "out" / "checkpoint-8"):
        trainer = make({10: 0.2}, output_dir="out", max_steps=10, save_total_limit=1)
        trainer.train(resume_from_checkpoint=asked)
        assert [entry.step for entry in trainer.best_checkpoints(9)] == [4, 10]
        assert checkpoint_steps(tmp_path / "out") == {4, 10}
        shutil.rmtree(tmp_path / "out")
        make(output_dir="out", save_total_limit=1).train()


def test_a_resume_from_the_newest_passes_over_an_unfinished_one_and_says_why(
    make: Any, tmp_path: Path, our_log: Any
) -> None:
    make().train()
    Path(out(tmp_path, 8), "model.safetensors").unlink()
    trainer = make(max_steps=10)
    began = note_starts(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert began == [6]
    (line,) = [r.getMessage() for r in our_log.records if r.getMessage().startswith("Resuming from")]
    assert "checkpoint-8" in line
    assert "model.safetensors" in line


def test_an_unfinished_checkpoint_that_is_named_is_refused(make: Any, tmp_path: Path) -> None:
    make().train()
    Path(out(tmp_path, 8), "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoint-8 is not a complete checkpoint.*model\.safetensors"
    ):
        make(max_steps=10).train(resume_from_checkpoint=out(tmp_path, 8))


def test_if_there_are_checkpoints_but_none_is_whole_it_stops_and_says_so(make: Any, tmp_path: Path) -> None:
    make(max_steps=2).train()
    Path(out(tmp_path, 2), "model.safetensors").unlink()
    with pytest.raises(NoCompleteCheckpointError, match="but none is complete"):
        make().train(resume_from_checkpoint=True)
    assert checkpoint_steps(tmp_path / "out") == {2}


@pytest.mark.parametrize("asked", [True, "latest", "best"])
def test_a_resume_without_any_checkpoint_is_the_error_of_the_stock_trainer(make: Any, asked: Any) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make().train(resume_from_checkpoint=asked)


@pytest.mark.parametrize("asked", [None, False])
def test_without_being_asked_nothing_is_resumed(make: Any, asked: Any) -> None:
    make().train()
    trainer = make()
    began = note_starts(trainer)
    trainer.train(resume_from_checkpoint=asked)
    assert began == [0]


def test_the_best_of_checkpoints_without_metrics_is_an_error_that_says_what_to_do(
    make: Any, make_trainer: Any
) -> None:
    make_trainer(trainer_class=Trainer, arguments_class=TrainingArguments).train()
    with pytest.raises(NoCompleteCheckpointError, match="has an evaluation of its own step"):
        make().train(resume_from_checkpoint="best")


def test_a_run_resumed_from_the_best_ranks_the_checkpoints_it_comes_from_and_its_own(
    make: Any, tmp_path: Path
) -> None:
    make().train()
    trainer = make({6: 0.3, 8: 0.95, 10: 0.2}, max_steps=10, save_total_limit=1)
    trainer.train(resume_from_checkpoint="best")
    assert [(entry.step, entry.metric) for entry in trainer.best_checkpoints(9)] == [(8, 0.95), (10, 0.2)]
    assert checkpoint_steps(tmp_path / "out") == {8, 10}


# ---- as a mixin, and what it leaves behind


def test_the_mixins_guard_another_trainer(make_trainer: Any, tmp_path: Path) -> None:
    metric = MetricByStep(SCORES)
    trainer = make_trainer(
        trainer_class=OurTrainer,
        arguments_class=OurArguments,
        callbacks=[metric],
        compute_metrics=metric,
        eval_on_save=True,
        save_total_limit=1,
        **BEST,
    )
    trainer.train()
    assert checkpoint_steps(tmp_path / "out") == {4, 8}
    assert trainer.best_checkpoints()[0].step == 4


@pytest.mark.parametrize(
    ("trainer_class", "arguments_class"),
    [(DivGuardTrainer, DivGuardTrainingArguments), (DivGuardTrainer, TrainingArguments)],
)
def test_after_training_the_trainer_holds_the_callbacks_it_was_given(
    make_trainer: Any, trainer_class: Any, arguments_class: Any
) -> None:
    trainer = make_trainer(trainer_class=trainer_class, arguments_class=arguments_class, max_steps=2)
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == before


def test_an_error_in_training_leaves_the_arguments_and_callbacks_as_they_were(
    make: Any, tmp_path: Path
) -> None:
    class Breaks(Recorder):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    trainer = make(callbacks=[Breaks()], save_total_limit=1)
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.callback_handler.callbacks == before
    assert trainer.args.save_total_limit == 1
    assert checkpoint_steps(tmp_path / "out") == {2}


def test_a_quiet_run_warns_of_nothing(make: Any, our_log: Any) -> None:
    make(save_total_limit=1).train()
    assert [r.getMessage() for r in our_log.records if r.levelno >= logging.WARNING] == []
