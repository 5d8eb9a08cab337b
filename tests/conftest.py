"""A factory of real Trainers on CPU, and callbacks that record, ask and script what a run sees."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.tiny import TokenRows, base_arguments, checkpoint_steps, tiny_model

torch.set_num_threads(1)


TURNS = 4
"""Shares into which the slow tests are divided: `make test-slow-share` runs one of them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that chooses a share of the tests."""
    parser.addoption("--turn", type=int, help=f"run one share of the chosen tests: the number modulo {TURNS}")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say which share runs, and how to repeat it."""
    turn = config.getoption("--turn")
    if turn is None:
        return None
    return f"share {turn % TURNS} of {TURNS}; to repeat it: make test-slow-share TURN={turn % TURNS}"


# After the markers have chosen.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every fourth test, by their names: the same ones on each machine."""
    turn = config.getoption("--turn")
    if turn is None:
        return
    mine = set(sorted(item.nodeid for item in items)[turn % TURNS :: TURNS])
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in mine])
    items[:] = [item for item in items if item.nodeid in mine]


def pytest_collection_finish() -> None:
    """Every training collects garbage; without what imports and collection left, it takes half the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _settings_of_accelerate() -> Iterator[None]:
    """Take back what the arguments of one test leave in the environment for the trainers of the next ones.

    Transformers 4 notes `bf16=True` there, and all later trainers of the process use it.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") and name not in before]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """Return a factory of trainers: ``make_trainer(save_steps=2, ...)``; options go to the arguments."""
    from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments

    def make(
        output_dir: Any = None,
        *,
        trainer_class: Any = DivGuardTrainer,
        arguments_class: Any = DivGuardTrainingArguments,
        callbacks: Any = None,
        compute_metrics: Any = None,
        model: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = "default",
        dropout: float = 0.0,
        **options: Any,
    ) -> Any:
        args = arguments_class(**base_arguments(output_dir or tmp_path / "out", **options))
        return trainer_class(
            model=model if model is not None else tiny_model(dropout=dropout),
            args=args,
            train_dataset=train_dataset if train_dataset is not None else TokenRows(),
            eval_dataset=TokenRows(rows=8, seed=1) if eval_dataset == "default" else eval_dataset,
            callbacks=callbacks,
            compute_metrics=compute_metrics,
        )

    return make


class ScriptedMetric:
    """A ``compute_metrics`` that returns the next value of a list at each evaluation."""

    def __init__(self, values: list[float], name: str = "score") -> None:
        self.values = list(values)
        self.name = name
        self.calls = 0

    def __call__(self, prediction: Any) -> dict[str, float]:
        value = self.values[self.calls]
        self.calls += 1
        return {self.name: value}


class MetricByStep(TrainerCallback):
    """A ``compute_metrics`` that returns the value of a function or a mapping at the step of the training.

    Has to be given to the trainer as a callback as well, which is how it learns the step.
    """

    def __init__(self, values: Any, name: str = "score") -> None:
        self.values = values
        self.name = name
        self.state: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state = state

    def __call__(self, prediction: Any) -> dict[str, float]:
        step = 0 if self.state is None else self.state.global_step
        value = self.values(step) if callable(self.values) else self.values[step]
        return {self.name: float(value)}


class Recorder(TrainerCallback):
    """Notes logs, evaluations and saves with their steps, and which checkpoints exist after each save."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.logs: list[dict[str, Any]] = []
        self.disk: list[set[int]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append({"step": state.global_step, **logs})
        if "loss" in logs:
            self.events.append(("log", state.global_step))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("evaluate", state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("save", state.global_step))
        self.disk.append(checkpoint_steps(args.output_dir))

    def steps(self, kind: str) -> list[int]:
        """Return the steps at which events of ``kind`` took place, in order."""
        return [step for event, step in self.events if event == kind]


class AskAt(TrainerCallback):
    """Asks at given steps for an evaluation, a save or the end, as a user's callback may."""

    def __init__(
        self,
        *,
        evaluate: Any = (),
        save: Any = (),
        stop: Any = (),
        when: str = "on_step_end",
    ) -> None:
        self.evaluate, self.save, self.stop = set(evaluate), set(save), set(stop)
        setattr(self, when, self.ask)

    def ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate |= state.global_step in self.evaluate
        control.should_save |= state.global_step in self.save
        control.should_training_stop |= state.global_step in self.stop


@pytest.fixture
def our_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Capture what hf_divguard logs, from INFO up."""
    with caplog.at_level(logging.INFO, logger="hf_divguard"):
        yield caplog
