"""The names of metrics are read from the source of `compute_metrics`, or nothing is claimed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from hf_divguard import DivGuardMixin
from hf_divguard.hf.returned_names import returned_names

MakeTrainer = Callable[..., Any]


def literal(prediction: Any) -> dict[str, float]:
    def inner() -> dict[str, float]:
        return {"not_this": 1.0}

    if inner()["not_this"] > 2.0:
        return {"f1": 0.0, "accuracy": 0.0}
    return {"f1": 1.0}


def computed(prediction: Any) -> dict[str, float]:
    result = {"f1": 1.0}
    result["accuracy"] = 0.5
    return result


def partly(prediction: Any) -> dict[str, float]:
    if prediction is None:
        return {"f1": 1.0}
    return json.loads("{}")


def spread(prediction: Any) -> dict[str, float]:
    return {"f1": 1.0, **computed(prediction)}


def adds(function: Any) -> Any:
    def wrapped(prediction: Any) -> dict[str, float]:
        return {**function(prediction), "added": 1.0}

    return wrapped


@adds
def decorated(prediction: Any) -> dict[str, float]:
    return {"f1": 1.0}


class Holder:
    def method(self, prediction: Any, beta: float = 1.0) -> dict[str, float]:
        return {"f_beta": beta}

    def __call__(self, prediction: Any) -> dict[str, float]:
        return {"f1": 1.0}


two = (lambda prediction: {"f1": 1.0}, lambda prediction: {"accuracy": 1.0})


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (literal, {"f1", "accuracy"}),
        (Holder().method, {"f_beta"}),
        (functools.partial(Holder().method, beta=2.0), {"f_beta"}),
        (lambda prediction: {"rouge": 0.5}, {"rouge"}),
        (computed, None),
        (partly, None),
        (spread, None),
        (decorated, None),
        (Holder(), None),
        (two[0], None),
        (print, None),
        (eval("lambda prediction: {'f1': 1.0}"), None),
    ],
    ids=range(12),
)
def test_names_are_read_where_the_source_shows_all_of_them(function: Any, names: set[str] | None) -> None:
    assert returned_names(function) == names


class AddsMetric(TrainerCallback):
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["metrics"]["eval_bleu"] = 0.5


class Evaluates(Trainer):
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {**super().evaluate(*args, **kwargs), "eval_bleu": 0.5}


@pytest.mark.parametrize("way", ["callback", "method"])
def test_a_metric_that_a_callback_or_an_evaluation_of_its_own_adds_is_legal(
    make_trainer: MakeTrainer, way: str
) -> None:
    guarded = type("Guarded", (DivGuardMixin, Evaluates if way == "method" else Trainer), {})
    trainer = make_trainer(
        trainer_class=guarded,
        callbacks=[AddsMetric()] if way == "callback" else [],
        compute_metrics=literal,
        preserve_best_model=True,
        eval_on_save=True,
        best_model_metric="bleu",
        save_steps=2,
        max_steps=4,
    )
    trainer.train()
    assert [checkpoint.metric for checkpoint in trainer.best_checkpoints()] == [0.5]
