"""Before the first step one batch is evaluated to see whether the ranking metric comes; nothing of it stays."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_divguard import MetricNotFoundError
from tests.conftest import Recorder, ScriptedMetric
from tests.tiny import TokenRows, same_weights, weights

BEST = {"preserve_best_model": True, "eval_on_save": True, "max_steps": 4}


class AddsAMetric(TrainerCallback):
    """Puts a metric of its own into the results, so that no trial can tell what comes."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_f1"] = metrics["eval_loss"]


class Counted:
    """A metric that counts the rows of each of its calls."""

    def __init__(self, name: str = "f1") -> None:
        self.name = name
        self.rows: list[int] = []

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.rows.append(len(prediction.predictions))
        return {self.name: float(len(self.rows))}

    def __deepcopy__(self, memo: Any) -> Counted:
        return self  # so that the trial is seen


class DrawsNumbers(TrainerCallback):
    """Notes what the random generators give at the first step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.numbers = (random.random(), float(np.random.rand()), float(torch.rand(1)))


def test_the_trial_evaluates_one_batch(make_trainer: Any) -> None:
    metric = Counted()
    trainer = make_trainer(
        **BEST,
        best_model_metric="f1",
        compute_metrics=metric,
        per_device_eval_batch_size=2,
        dataloader_num_workers=0,
    )
    trainer.train()
    assert metric.rows == [2, 8, 8]


def test_the_trial_changes_no_weight_and_no_random_number(make_trainer: Any) -> None:
    def run(*more: Any) -> tuple[Any, Any]:
        draws = DrawsNumbers()
        trainer = make_trainer(
            **BEST, best_model_metric="f1", compute_metrics=Counted(), callbacks=[draws, *more], dropout=0.2
        )
        trainer.train()
        return weights(trainer.model), draws.numbers

    (first, numbers), (second, others) = run(), run(AddsAMetric())
    assert same_weights(first, second)
    assert numbers == others


def test_neither_callbacks_nor_the_log_nor_a_metric_with_a_memory_see_the_trial(make_trainer: Any) -> None:
    class Steps(TrainerCallback):
        predictions = 0

        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.predictions += 1

    metric, steps, recorder = ScriptedMetric([0.5, 0.6]), Steps(), Recorder()
    trainer = make_trainer(
        **BEST,
        best_model_metric="score",
        best_model_greater_is_better=True,
        compute_metrics=metric,
        callbacks=[steps],
    )
    trainer.train()
    assert metric.calls == 2
    assert steps.predictions == 2
    assert [entry["eval_score"] for entry in trainer.state.log_history if "eval_score" in entry] == [0.5, 0.6]
    assert recorder.logs == []


def test_the_settings_of_the_data_loader_are_as_before(make_trainer: Any) -> None:
    trainer = make_trainer(
        **BEST,
        best_model_metric="f1",
        compute_metrics=Counted(),
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        dataloader_prefetch_factor=2,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    assert trainer.compute_metrics.rows == [4, 8, 8], "the workers that stay have all rows"
    assert (trainer.args.dataloader_num_workers, trainer.args.dataloader_prefetch_factor) == (1, 2)
    assert trainer.args.dataloader_persistent_workers is True


def test_a_metric_of_one_of_several_sets_is_looked_for_in_that_set(make_trainer: Any) -> None:
    sets = {"news": TokenRows(4), "books": TokenRows(6)}
    metric = Counted()
    make_trainer(**BEST, best_model_metric="books_f1", compute_metrics=metric, eval_dataset=sets).train()
    assert metric.rows[0] == 6
    with pytest.raises(MetricNotFoundError, match="no `eval_books_f2`"):
        make_trainer(
            **BEST,
            best_model_metric="books_f2",
            best_model_greater_is_better=True,
            compute_metrics=metric,
            eval_dataset=sets,
        ).train()


def test_a_metric_that_cannot_do_with_few_rows_is_no_error(make_trainer: Any, our_log: Any) -> None:
    def needs_all(prediction: Any) -> dict[str, float]:
        if len(prediction.predictions) < 8:
            raise ValueError("only one class is present")
        return {"f1": 0.5}

    trainer = make_trainer(
        **BEST, best_model_metric="f1", compute_metrics=needs_all, per_device_eval_batch_size=2
    )
    trainer.train()
    assert "could not be evaluated (ValueError: only one class is present)" in our_log.text
    assert [entry.metric for entry in trainer.best_checkpoints(2)] == [0.5, 0.5]


def test_a_metric_that_a_callback_adds_is_accepted(make_trainer: Any) -> None:
    trainer = make_trainer(**BEST, best_model_metric="f1", callbacks=[AddsAMetric()])
    trainer.train()
    assert len(trainer.best_checkpoints(9)) == 2


@pytest.mark.parametrize(
    "options", [{"best_model_metric": "loss"}, {"best_model_metric": "f1", "eval_on_start": True}]
)
def test_where_it_is_known_or_evaluated_anyway_there_is_no_trial(make_trainer: Any, options: Any) -> None:
    metric = Counted()
    make_trainer(**BEST, **options, compute_metrics=metric, per_device_eval_batch_size=2).train()
    assert 2 not in metric.rows


def test_a_run_that_resumes_has_no_trial_again(make_trainer: Any) -> None:
    make_trainer(**BEST, best_model_metric="f1", compute_metrics=Counted()).train()
    metric = Counted()
    options = {**BEST, "max_steps": 6}
    trainer = make_trainer(
        **options, best_model_metric="f1", compute_metrics=metric, per_device_eval_batch_size=2
    )
    trainer.train(resume_from_checkpoint=True)
    assert metric.rows == [8]
