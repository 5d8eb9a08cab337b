"""What users do wrong, and how early they get an answer that says what must hold, what was found and what to do.

Each row of a table is one mistake: how it is made, at which moment it is answered, and words that
the answer must hold. The objects are real. ``LATE`` and ``UNANSWERED`` give the reason for what
cannot be known before a run is under way, or not at all.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_divguard import (
    AdaptiveDivergenceDetector,
    CheckpointError,
    DivergenceDetector,
    DivGuardArgumentsMixin,
    DivGuardMixin,
    DivGuardTrainer,
    DivGuardTrainingArguments,
    DualTimeScaleDivergenceDetector,
    HistoryError,
    NonFiniteDetector,
    Verdict,
    best_checkpoints,
    find_checkpoints,
    guard,
    latest_complete_checkpoint,
    replay,
    verify_checkpoint,
)
from tests.tiny import TokenRows, base_arguments, tiny_model

MOMENTS = ("class", "arguments", "trainer", "start", "training", "end")


class FollowMoment(TrainerCallback):
    """Notes when the first step begins, and when training has ended."""

    def __init__(self, user: User) -> None:
        self.user = user

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.user.moment = "training"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.user.moment = "end"


class User(logging.Handler):
    """Makes arguments and trainers, and hears what the package says, with the moment at which it does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.WARNING)
        self.folder = folder
        self.moment = "class"
        self.heard: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append((self.moment, record.getMessage()))

    def hear_python_warning(self, message: Any, *_: Any, **__: Any) -> None:
        self.heard.append((self.moment, str(message)))

    def arguments(self, cls: Any = DivGuardTrainingArguments, **options: Any) -> Any:
        self.moment = "arguments"
        return cls(**base_arguments(options.pop("output_dir", self.folder / "out"), **options))

    def trainer(
        self, cls: Any = DivGuardTrainer, *, args: Any = None, given: Any = None, **options: Any
    ) -> Any:
        args = self.arguments(**options) if args is None else args
        self.moment = "trainer"
        parts = {
            "model": tiny_model(),
            "args": args,
            "train_dataset": TokenRows(),
            "eval_dataset": TokenRows(rows=8, seed=1),
            **(given or {}),
        }
        trainer = cls(**parts)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def train(self, cls: Any = DivGuardTrainer, *, resume: Any = None, **options: Any) -> Any:
        trainer = self.trainer(cls, **{"max_steps": 4, **options})
        trainer.add_callback(FollowMoment(self))
        self.moment = "start"
        trainer.train(resume_from_checkpoint=resume)
        return trainer


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    user = User(tmp_path)
    log = logging.getLogger("hf_divguard")
    log.addHandler(user)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = user.hear_python_warning
        yield user
    log.removeHandler(user)


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Args:
        make: Makes it.
        moment: When it is answered: when a class, the arguments or the trainer are made, when
            training starts (before the first step), or while it goes on.
        says: Words of the answer, in their order: what must hold or was set, what was found, what to do.
        error: The type of the answer where it is an error; else it is a warning.
    """

    make: Callable[[User], Any]
    moment: str
    says: tuple[str, ...]
    error: type[Exception] | None = None


def with_options(**options: Any) -> Callable[[User], Any]:
    return lambda user: user.train(**options)


def only_arguments(**options: Any) -> Callable[[User], Any]:
    return lambda user: user.arguments(**options)


def score(name: str, value: Any = 0.5) -> dict[str, Any]:
    return {"compute_metrics": lambda prediction: {name: value}}


def literal_rouge(prediction: Any) -> dict[str, float]:
    return {"rouge": 0.5, "rouge_2": 0.25}


BEST = {"preserve_best_model": True, "eval_on_save": True}
ROLLBACK = {"divguard_detector": "adaptive", "divguard_action": "rollback", "max_steps": 8}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}

METRICS = {
    "a metric that compute_metrics does not return": Mistake(
        with_options(**BEST, best_model_metric="bleu", given=score("rouge")),
        "training",
        ("`best_model_metric='bleu'`", "no `eval_bleu`", "'eval_rouge'", "Set `best_model_metric`"),
        KeyError,
    ),
    "a metric close to one that is returned": Mistake(
        with_options(**BEST, best_model_metric="f1", given=score("f1_a")),
        "training",
        ("no `eval_f1`", "Did you mean 'eval_f1_a'?"),
        KeyError,
    ),
    "a metric that the source of compute_metrics does not return": Mistake(
        with_options(**BEST, best_model_metric="bleu", given={"compute_metrics": literal_rouge}),
        "trainer",
        ("`best_model_metric='bleu'`", "no evaluation produces `eval_bleu`", "['rouge', 'rouge_2']", "set"),
        ValueError,
    ),
    "a typo that the source of compute_metrics shows": Mistake(
        with_options(
            **BEST,
            best_model_metric="rouge_l",
            best_model_greater_is_better=True,
            given={"compute_metrics": lambda prediction: {"rouge_1": 0.5}},
        ),
        "trainer",
        ("`best_model_metric='rouge_l'`", "no evaluation produces", "Did you mean 'eval_rouge_1'?"),
        ValueError,
    ),
    "accuracy as the host's best metric without compute_metrics": Mistake(
        with_options(eval_on_save=True, metric_for_best_model="accuracy", greater_is_better=True),
        "trainer",
        (
            "`metric_for_best_model='accuracy'` is to select",
            "no `compute_metrics`",
            "Pass a `compute_metrics`",
        ),
        ValueError,
    ),
    "accuracy without compute_metrics": Mistake(
        with_options(**BEST, best_model_metric="accuracy"),
        "trainer",
        (
            "`best_model_metric='accuracy'`",
            "no `compute_metrics`",
            "Pass a `compute_metrics` that returns 'accuracy'",
        ),
        ValueError,
    ),
    "a typo close to a known name": Mistake(
        only_arguments(**BEST, best_model_metric="acuracy"),
        "arguments",
        ("direction of `best_model_metric='acuracy'` is not known", "Did you mean 'accuracy'?", "Set"),
        ValueError,
    ),
    "an unknown name without its direction": Mistake(
        only_arguments(**BEST, best_model_metric="zork"),
        "arguments",
        ("'zork'", "is not known", "Set `best_model_greater_is_better` to true if"),
        ValueError,
    ),
    "a metric that is a text": Mistake(
        with_options(**BEST, best_model_metric="accuracy", given=score("accuracy", "good")),
        "training",
        ("must be a number", "`eval_accuracy` is 'good'", "Let `compute_metrics` return a number"),
        TypeError,
    ),
    "a metric that is always NaN": Mistake(
        with_options(**BEST, best_model_metric="accuracy", given=score("accuracy", math.nan)),
        "training",
        (
            "`eval_accuracy` = nan at two evaluations in a row",
            "ranks last",
            "set another `best_model_metric`",
        ),
    ),
    "an empty name": Mistake(
        only_arguments(best_model_metric=""),
        "arguments",
        ("`best_model_metric` must be the name of an evaluation metric", "got ''"),
        ValueError,
    ),
    "f1 with lower is better": Mistake(
        only_arguments(**BEST, best_model_metric="f1", best_model_greater_is_better=False),
        "arguments",
        ("`best_model_greater_is_better=False` contradicts", "f1 is better when higher", "Leave"),
        ValueError,
    ),
    "f1 with lower is better, in the words of the host": Mistake(
        only_arguments(**BEST, best_model_metric="eval_f1", greater_is_better=False),
        "arguments",
        ("`greater_is_better=False` contradicts", "'eval_f1'", "Leave `greater_is_better` out"),
        ValueError,
    ),
    "a loss with higher is better": Mistake(
        only_arguments(**BEST, best_model_greater_is_better=True),
        "arguments",
        ("`best_model_metric='loss'`", "better when lower", "Leave"),
        ValueError,
    ),
    "a name that ends like f1 with lower is better": Mistake(
        only_arguments(**BEST, best_model_metric="news_f1", best_model_greater_is_better=False),
        "arguments",
        ("'news_f1'", "usually better when higher", "Leave `best_model_greater_is_better` out"),
    ),
    "two metrics": Mistake(
        only_arguments(**BEST, metric_for_best_model="f1", best_model_metric="accuracy"),
        "arguments",
        ("`metric_for_best_model='f1'` and `best_model_metric='accuracy'`", "Set both to the same"),
        ValueError,
    ),
    "several evaluation sets without the name of one": Mistake(
        with_options(**BEST, given={"eval_dataset": {"news": TokenRows(4), "books": TokenRows(4)}}),
        "trainer",
        ("names no metric of the evaluation sets", "['news', 'books']", "'news_loss'"),
        ValueError,
    ),
    "load_best_model_at_end without evaluation": Mistake(
        only_arguments(load_best_model_at_end=True),
        "arguments",
        ("load_best_model_at_end requires", "Evaluation strategy"),
        ValueError,
    ),
    "a direction that is no truth value": Mistake(
        only_arguments(best_model_greater_is_better="lower"),
        "arguments",
        ("must be true, false or none", "got 'lower'"),
        ValueError,
    ),
}

SAVING = {
    "eval_on_save without an evaluation set": Mistake(
        with_options(eval_on_save=True, given={"eval_dataset": None}),
        "trainer",
        ("`eval_on_save=True`", "no `eval_dataset`", "Pass one"),
        ValueError,
    ),
    "an arbiter without an evaluation set": Mistake(
        with_options(divguard_eval_arbiter=True, given={"eval_dataset": None}),
        "trainer",
        ("`divguard_eval_arbiter=True`", "no `eval_dataset`", "Pass one"),
        ValueError,
    ),
    "an arbiter without comparisons": Mistake(
        with_options(**ROLLBACK, divguard_eval_arbiter=True, divguard_compare="off"),
        "start",
        ("`divguard_eval_arbiter` has no effect", "`divguard_compare` is 'off'", "Set"),
    ),
    "an arbiter without a detector that acts": Mistake(
        with_options(divguard_eval_arbiter=True),
        "start",
        ("`divguard_eval_arbiter` has no effect", "no detector acts", "Set `divguard_action`"),
    ),
    "an empty evaluation set": Mistake(
        with_options(**BEST, given={"eval_dataset": TokenRows(rows=0)}),
        "trainer",
        ("`eval_dataset` must have rows", "is empty", "Look at the split"),
        ValueError,
    ),
    "one of several evaluation sets empty": Mistake(
        with_options(
            **BEST,
            best_model_metric="news_loss",
            given={"eval_dataset": {"news": TokenRows(4), "books": TokenRows(0)}},
        ),
        "trainer",
        ("`eval_dataset` 'books' must have rows", "is empty"),
        ValueError,
    ),
    "preserve_best_model with no evaluation": Mistake(
        only_arguments(preserve_best_model=True),
        "arguments",
        ("ranks checkpoints by evaluations", "`eval_strategy` is 'no'", "Set `eval_on_save=True`"),
        ValueError,
    ),
    "preserve_best_model without saves": Mistake(
        only_arguments(preserve_best_model=True, save_strategy="no", **EVALUATES),
        "arguments",
        ("`preserve_best_model=True`", "`save_strategy` is 'no'", "Set `save_strategy`"),
    ),
    "eval_on_save without saves": Mistake(
        only_arguments(eval_on_save=True, save_strategy="no"),
        "arguments",
        ("`eval_on_save=True`", "nothing is saved", "Set `save_strategy`"),
    ),
    "saving the best with nothing evaluated": Mistake(
        only_arguments(eval_on_save=True, save_strategy="best", metric_for_best_model="loss"),
        "arguments",
        ("`save_strategy` is 'best'", "`eval_strategy` is 'no'", "Set `eval_strategy`"),
        ValueError,
    ),
    "evaluations and saves that do not meet": Mistake(
        only_arguments(preserve_best_model=True, eval_strategy="steps", eval_steps=5, save_steps=7),
        "arguments",
        ("ranked only where an evaluation falls", "eval_steps=5", "save_steps=7", "Set `eval_on_save=True`"),
    ),
    "preserve_n_best=0": Mistake(
        only_arguments(**BEST, preserve_n_best=0),
        "arguments",
        ("`preserve_n_best` must be", "at least 1", "got 0", "set `preserve_best_model=False`"),
        ValueError,
    ),
    "preserve_n_best=-1": Mistake(
        only_arguments(**BEST, preserve_n_best=-1), "arguments", ("at least 1", "got -1"), ValueError
    ),
    "preserve_n_best without preserve_best_model": Mistake(
        only_arguments(preserve_n_best=3, eval_on_save=True),
        "arguments",
        (
            "`preserve_n_best=3` has no effect",
            "`preserve_best_model` is off",
            "Set `preserve_best_model=True`",
        ),
    ),
    "a ranking metric with nothing to rank by": Mistake(
        only_arguments(best_model_metric="f1"),
        "arguments",
        (
            "`best_model_metric` ranks checkpoints",
            "`preserve_best_model` is off",
            "Set `preserve_best_model=True`",
        ),
    ),
    "a typo in the save mode": Mistake(
        only_arguments(divguard_save_mode="stagged"),
        "arguments",
        ("`divguard_save_mode` must be one of", "'stagged'", "Did you mean 'staged'?"),
        ValueError,
    ),
    "checksums with safe saves off": Mistake(
        only_arguments(divguard_save_mode="off", divguard_checksums=True),
        "arguments",
        ("`divguard_checksums=True`", "`divguard_save_mode` is 'off'", "Set `divguard_save_mode='auto'`"),
        ValueError,
    ),
    "fsync with safe saves off": Mistake(
        only_arguments(divguard_save_mode="off", divguard_fsync=True),
        "arguments",
        ("`divguard_fsync=True`", "`divguard_save_mode` is 'off'", "Set `divguard_save_mode='auto'`"),
        ValueError,
    ),
    "an output folder that is a file": Mistake(
        lambda user: ((user.folder / "out").write_text("x"), user.train())[1],
        "trainer",
        ("File exists", "out"),
        OSError,
    ),
}

DETECTORS = {
    "an unknown detector": Mistake(
        only_arguments(divguard_detector="adaptiv"),
        "arguments",
        ("`divguard_detector` must be one of", "'adaptiv'", "Did you mean 'adaptive'?"),
        ValueError,
    ),
    "a class name for the flag": Mistake(
        only_arguments(divguard_detector="AdaptiveDivergenceDetector"),
        "arguments",
        ("must be one of ['adaptive', 'ema', 'window', 'nonfinite', 'none']", "'AdaptiveDivergenceDetector'"),
        ValueError,
    ),
    "None as detector": Mistake(
        only_arguments(divguard_detector=None),
        "arguments",
        ("must be one of", "got None", "'none'"),
        ValueError,
    ),
    "True as detector": Mistake(
        only_arguments(divguard_detector=True), "arguments", ("must be one of", "got True"), ValueError
    ),
    "single quotes in JSON": Mistake(
        only_arguments(divguard_detector="ema", divguard_detector_kwargs="{'threshold': 1}"),
        "arguments",
        ("must be a JSON object like '{\"threshold\": 1.0}'", "got", "double quotes"),
        ValueError,
    ),
    "a list as settings": Mistake(
        only_arguments(divguard_detector="ema", divguard_detector_kwargs="[1]"),
        "arguments",
        ("must be a JSON object or a dict", "got [1]"),
        ValueError,
    ),
    "NaN as a setting": Mistake(
        only_arguments(divguard_detector="ema", divguard_detector_kwargs='{"threshold": NaN}'),
        "arguments",
        ("`threshold` must be a finite number", "got nan"),
        ValueError,
    ),
    "null as a setting": Mistake(
        only_arguments(divguard_detector="ema", divguard_detector_kwargs='{"threshold": null}'),
        "arguments",
        ("`threshold` must be a number", "got None"),
        TypeError,
    ),
    "an unknown setting": Mistake(
        only_arguments(divguard_detector="ema", divguard_detector_kwargs={"treshold": 1.0}),
        "arguments",
        ("'ema' has no parameter 'treshold'", "It has: short_alpha"),
        TypeError,
    ),
    "a negative threshold": Mistake(
        only_arguments(divguard_detector="window", divguard_detector_kwargs={"threshold": -1}),
        "arguments",
        ("`threshold` must be a finite number above 0", "got -1"),
        ValueError,
    ),
    "a threshold of zero": Mistake(
        lambda user: DualTimeScaleDivergenceDetector(threshold=0.0),
        "class",
        ("`threshold` must be a finite number above 0", "got 0"),
        ValueError,
    ),
    "a sensitivity of zero": Mistake(
        only_arguments(divguard_detector="adaptive", divguard_detector_kwargs={"sensitivity": 0}),
        "arguments",
        ("`sensitivity` must be a finite number above 0", "got 0"),
        ValueError,
    ),
    "swapped averages": Mistake(
        only_arguments(
            divguard_detector="ema", divguard_detector_kwargs={"short_alpha": 0.01, "long_alpha": 0.1}
        ),
        "arguments",
        ("`short_alpha=0.01` should be greater than `long_alpha=0.1`",),
    ),
    "settings without a detector": Mistake(
        only_arguments(divguard_detector_kwargs={"threshold": 1.0}),
        "arguments",
        ("settings of a detector", "`divguard_detector` is 'none'", "Set it to one of"),
        ValueError,
    ),
    "an evaluation metric without eval_": Mistake(
        with_options(divguard_detector="ema", divguard_metric_key="f1", **EVALUATES, given=score("f1")),
        "training",
        ("watches `f1`", "evaluations give `eval_f1`", "`divguard_metric_key`) to `eval_f1`"),
    ),
    "a metric to watch that never comes": Mistake(
        with_options(divguard_detector="ema", divguard_metric_key="eval_f2", **EVALUATES, given=score("f1")),
        "training",
        ("watches `eval_f2`", "has not come", "Did you mean 'eval_f1'?", "`divguard_metric_key`"),
    ),
    "an evaluation metric to watch without evaluations": Mistake(
        with_options(divguard_detector="ema"),
        "start",
        ("watches `eval_loss`", "`eval_strategy` is 'no'", "Set `eval_strategy`"),
    ),
    "the same detector by flag and as callback": Mistake(
        with_options(divguard_detector="adaptive", given={"callbacks": [AdaptiveDivergenceDetector()]}),
        "start",
        ("Two detectors of the class AdaptiveDivergenceDetector watch `loss`", "Leave one out", "`name`"),
    ),
    "the same detector twice as callback": Mistake(
        lambda user: user.train(given={"callbacks": [NonFiniteDetector(), NonFiniteDetector()]}),
        "start",
        ("Two detectors of the class NonFiniteDetector", "Leave one out"),
    ),
    "two detectors of one name": Mistake(
        lambda user: user.train(
            given={"callbacks": [NonFiniteDetector(name="a"), NonFiniteDetector(name="a")]}
        ),
        "start",
        ("Two callbacks are named 'a'", "Give each its own `name`"),
        ValueError,
    ),
    "the base class as a callback": Mistake(
        with_options(given={"callbacks": [DivergenceDetector]}), "trainer", ("missing", "'rule'"), TypeError
    ),
    "an action in capitals": Mistake(
        only_arguments(divguard_detector="adaptive", divguard_action="STOP"),
        "arguments",
        ("`divguard_action` must be one of", "'STOP'", "Did you mean 'stop'?"),
        ValueError,
    ),
    "an unknown action of a callback": Mistake(
        lambda user: NonFiniteDetector(action="halt"), "class", ("must be one of", "got 'halt'"), ValueError
    ),
    "an action without a detector": Mistake(
        only_arguments(divguard_action="abort"),
        "arguments",
        (
            "`divguard_action='abort'` has no detector",
            "`divguard_detector` is 'none'",
            "Set `divguard_detector`",
        ),
    ),
    "looks at losses without a detector": Mistake(
        with_options(divguard_check_steps=1),
        "start",
        ("`divguard_check_steps=1` has no effect", "no detector", "Set `divguard_detector`"),
    ),
    "no steps between looks": Mistake(
        only_arguments(divguard_check_steps=0), "arguments", ("at least 1", "got 0"), ValueError
    ),
}

ROLLBACKS = {
    "rollback without a detector": Mistake(
        only_arguments(divguard_action="rollback"),
        "arguments",
        ("`divguard_action='rollback'` has no detector", "Set `divguard_detector`"),
    ),
    "options of a rollback without one": Mistake(
        with_options(
            divguard_detector="adaptive", divguard_snapshot_steps=2, divguard_rollback_lr_factor=0.5
        ),
        "start",
        (
            "`divguard_rollback_lr_factor`, `divguard_snapshot_steps` have no effect",
            "no detector rolls back",
            "Set `divguard_action='rollback'`.",
        ),
    ),
    "options of a rollback without a detector": Mistake(
        with_options(divguard_rewarm_steps=3),
        "start",
        ("`divguard_rewarm_steps` has no effect", "Set `divguard_action='rollback'` and `divguard_detector`"),
    ),
    "rollback without saves": Mistake(
        with_options(**ROLLBACK, save_strategy="no", divguard_compare="off"),
        "start",
        ("Nothing is saved", "nothing to roll back to", "Set `save_strategy`", "`divguard_snapshot_steps`"),
    ),
    "rollback with one checkpoint": Mistake(
        with_options(**ROLLBACK, save_total_limit=1),
        "start",
        ("`save_total_limit=1` keeps the newest only", "Set `save_total_limit` to 2 or more"),
    ),
    "a first save after the end": Mistake(
        with_options(**ROLLBACK, save_steps=500),
        "start",
        ("the first is saved at step 8 of 8", "Set a smaller `save_steps`", "`divguard_snapshot_steps`"),
    ),
    "a first save late in the run": Mistake(
        with_options(**ROLLBACK, save_steps=4),
        "start",
        ("the first is saved at step 4 of 8", "Set a smaller `save_steps`"),
    ),
    "a factor above 1": Mistake(
        only_arguments(**ROLLBACK, divguard_rollback_lr_factor=2.0),
        "arguments",
        ("`divguard_rollback_lr_factor` must be above 0 and at most 1", "got 2.0"),
        ValueError,
    ),
    "rollback without the optimizer": Mistake(
        with_options(**ROLLBACK, save_only_model=True),
        "start",
        ("needs the optimizer", "`save_only_model=True` saves none", "Set it to false"),
        ValueError,
    ),
    "rollback in the stock Trainer": Mistake(
        lambda user: user.train(
            Trainer,
            args=user.arguments(TrainingArguments),
            given={"callbacks": [NonFiniteDetector(action="rollback")]},
        ),
        "start",
        ("`action='rollback'` needs `DivGuardTrainer`", "With this trainer use 'stop'"),
        ValueError,
    ),
}


def class_inside_a_function(user: User) -> Any:
    @dataclass
    class Inside(DivGuardArgumentsMixin, TrainingArguments):
        pass

    return user.train(args=user.arguments(Inside))


def class_without_decorator(user: User) -> Any:
    class Bare(DivGuardArgumentsMixin, TrainingArguments):
        pass

    return user.arguments(Bare)


CLASSES = {
    "the mixin of trainers on the right": Mistake(
        lambda user: type("Swapped", (Trainer, DivGuardMixin), {}),
        "class",
        ("`DivGuardMixin` must stand left", "`Swapped` has it on the right", "Swap the two"),
        TypeError,
    ),
    "the mixin of arguments on the right": Mistake(
        lambda user: type("Swapped", (TrainingArguments, DivGuardArgumentsMixin), {}),
        "class",
        ("`DivGuardArgumentsMixin` must stand left", "`Swapped` has it on the right", "Swap the two"),
        TypeError,
    ),
    "the mixin of trainers on arguments": Mistake(
        lambda user: type("Odd", (DivGuardMixin, TrainingArguments), {}),
        "class",
        ("`Odd` is a class of training arguments", "Use `DivGuardArgumentsMixin`"),
        TypeError,
    ),
    "the mixin of arguments on a trainer": Mistake(
        lambda user: type("Odd", (DivGuardArgumentsMixin, Trainer), {}),
        "class",
        ("`Odd` is a Trainer", "Use `DivGuardMixin`"),
        TypeError,
    ),
    "an object for guard": Mistake(
        lambda user: guard(TrainingArguments("out", use_cpu=True)),  # type: ignore[type-var]
        "class",
        ("takes a class", "got an object of `TrainingArguments`", "Write `guard(TrainingArguments)(...)`"),
        TypeError,
    ),
    "a class of arguments without the decorator": Mistake(
        class_without_decorator,
        "arguments",
        ("`Bare` must be a dataclass", "Write `@dataclass`"),
        TypeError,
    ),
    "a class of arguments inside a function": Mistake(
        class_inside_a_function,
        "trainer",
        ("must be importable by its name", "Inside` is not", "Define it at the top of a module"),
        TypeError,
    ),
    "guarded arguments in the stock Trainer": Mistake(
        lambda user: user.train(Trainer, **BEST),
        "start",
        (
            "`preserve_best_model`, `eval_on_save` have no effect",
            "need a guarded trainer",
            "Use `DivGuardTrainer`",
        ),
    ),
    "guarded arguments and a detector in the stock Trainer": Mistake(
        lambda user: user.train(Trainer, divguard_action="warn", given={"callbacks": [NonFiniteDetector()]}),
        "start",
        ("`divguard_action` has no effect", "need a guarded trainer", "guard(YourTrainer)"),
    ),
    "a misspelt option": Mistake(
        only_arguments(preserve_best_models=True),
        "arguments",
        ("no option 'preserve_best_models'", "Did you mean 'preserve_best_model'"),
        TypeError,
    ),
}


def resumed(
    name: Any, *, trained: bool = True, damage: Callable[[Path], Any] | None = None, **options: Any
) -> Any:
    def make(user: User) -> Any:
        if trained:
            user.train(**{"divguard_save_mode": "staged", **options})
            user.heard.clear()
        if damage is not None:
            for checkpoint in (user.folder / "out").glob("checkpoint-*"):
                damage(checkpoint)
        return user.train(resume=name, max_steps=6, **options)

    return make


def cut(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"x")


RESUMES = {
    "a typo of latest": Mistake(
        resumed("lastest"),
        "start",
        ("must be 'auto', 'latest'", "got 'lastest'", "Did you mean 'latest'?", "checkpoint-4"),
        CheckpointError,
    ),
    "an empty text": Mistake(
        resumed(""),
        "start",
        ("must be 'auto', 'latest'", "got ''", "an unset variable of the shell", "checkpoint-4"),
        CheckpointError,
    ),
    "a checkpoint that is not there": Mistake(
        resumed("checkpoint-10"),
        "start",
        ("got 'checkpoint-10'", "holds: checkpoint-2, checkpoint-4"),
        CheckpointError,
    ),
    "a path that is not there": Mistake(
        resumed("/nowhere/checkpoint-3", trained=False),
        "start",
        ("the path of a checkpoint", "got '/nowhere/checkpoint-3'"),
        CheckpointError,
    ),
    "nothing there": Mistake(
        resumed("latest", trained=False),
        "start",
        ("No valid checkpoint found", "set `resume_from_checkpoint='auto'`"),
        ValueError,
    ),
    "all of them damaged": Mistake(
        resumed("latest", damage=cut),
        "start",
        ("none is complete", "`model.safetensors` is too short", "To start from scratch"),
        CheckpointError,
    ),
    "the best of checkpoints without evaluations": Mistake(
        resumed("best"),
        "start",
        ("there is no best one", "Resume with resume_from_checkpoint=True"),
        CheckpointError,
    ),
}


def replayed(text: str, *, name: str = "trainer_state.json") -> Callable[[User], Any]:
    def make(user: User) -> Any:
        (user.folder / name).write_text(text, encoding="utf-8")
        return replay(user.folder / name)

    return make


def made_folder(user: User, name: str) -> Path:
    """Return a folder of this name in the user's, with a file in it and beside it."""
    folder = user.folder / name
    folder.mkdir(parents=True)
    for place in (folder, user.folder):
        (place / "config.json").write_text("{}")
    return folder


def refuse(verdict: Verdict) -> None:
    """Raise what a verdict says, as a script would."""
    if verdict.status != "complete":
        raise ValueError(verdict.reason)


READING = {
    "a history that is not there": Mistake(
        lambda user: replay("/nowhere"),
        "class",
        ("must be an existing file or folder", "`/nowhere`", "Give a `trainer_state.json`"),
        HistoryError,
    ),
    "a history that is cut": Mistake(
        replayed("{"), "class", ("must be complete JSON", "cut off"), HistoryError
    ),
    "an empty folder": Mistake(
        lambda user: replay(user.folder),
        "class",
        ("no readable `trainer_state.json`", "writes one into"),
        HistoryError,
    ),
    "an unknown detector to replay": Mistake(
        lambda user: replay({"loss": [2.0, 1.0]}, "emma"),
        "class",
        ("no detector 'emma'", "There are: adaptive"),
        ValueError,
    ),
    "the config of a model for a history": Mistake(
        replayed('{"model_type": "llama", "activation_function": "gelu", "layers": 2}'),
        "class",
        ("is no training history", "the config of a model", "Give a `trainer_state.json`"),
        HistoryError,
    ),
    "a pointer of Git LFS for a history": Mistake(
        replayed("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "class",
        ("is a Git LFS pointer", "git lfs pull"),
        HistoryError,
    ),
    "a metric that the history lacks": Mistake(
        lambda user: replay({"loss": [2.0, 1.0]}, metric_key="los"),
        "class",
        ("holds no `los`", "Its keys are: loss"),
        HistoryError,
    ),
    "a misspelt setting to replay": Mistake(
        lambda user: replay({"loss": [2.0, 1.0]}, "ema", treshold=1.0),
        "class",
        ("no parameter 'treshold'", "It has:", "threshold"),
        TypeError,
    ),
    "checkpoints of a folder that is not there": Mistake(
        lambda user: find_checkpoints(user.folder / "none"), "class", ("no folder", "Check the path")
    ),
    "the best checkpoints of a folder that is not there": Mistake(
        lambda user: best_checkpoints(user.folder / "none"), "class", ("no folder", "Check the path")
    ),
    "the checkpoints of a checkpoint": Mistake(
        lambda user: find_checkpoints(made_folder(user, "checkpoint-4")),
        "class",
        ("is a checkpoint", "Give the output folder"),
    ),
    "the newest checkpoint of a file": Mistake(
        lambda user: latest_complete_checkpoint(__file__), "class", ("is a file", "Give the output folder")
    ),
    "an output folder to verify": Mistake(
        lambda user: refuse(verify_checkpoint(made_folder(user, "checkpoint-4").parent)),
        "class",
        ("none of the files", "It is an output folder", "'checkpoint-4'"),
        ValueError,
    ),
}

TABLES = {
    "metrics": METRICS,
    "saving": SAVING,
    "detectors": DETECTORS,
    "rollback": ROLLBACKS,
    "classes": CLASSES,
    "resume": RESUMES,
    "reading": READING,
}
ROWS = {f"{table}: {name}": row for table, rows in TABLES.items() for name, row in rows.items()}

LATE = {
    "metrics: a metric that compute_metrics does not return": "its source does not show the names, and an evaluation "
    "more would change metrics with a state",
    "metrics: a metric close to one that is returned": "as above",
    "metrics: a metric that is a text": "as above",
    "metrics: a metric that is always NaN": "the metric of a model that has not been trained may be NaN once",
    "detectors: an evaluation metric without eval_": "what evaluations give is known when one has taken place",
    "detectors: a metric to watch that never comes": "a callback may log it later, so three rounds are waited for",
}
"""Mistakes that are answered while training goes on, with the reason."""

UNANSWERED = {
    "another metric on resume": "the run may want to change it; earlier checkpoints are then not ranked",
    "a guarded trainer with stock arguments": "it is documented: all options are at their defaults",
    "guarded arguments in a stock Trainer with a schedule of the user's own and without a detector": (
        "nothing of ours is called"
    ),
    "a misspelt option on a command line": "the parser of Transformers refuses it before any class of ours exists",
    "an output folder that is read-only for this user alone": "known only when the first file is written there",
}
"""Mistakes without an answer of ours, with the reason."""


@pytest.mark.parametrize("name", ROWS)
def test_a_mistake_is_answered_at_its_moment_with_what_to_do(name: str, user: User) -> None:
    row = ROWS[name]
    if row.error is not None:
        with pytest.raises(row.error) as caught:
            row.make(user)
        answers = [(user.moment, str(caught.value))]
    else:
        row.make(user)
        answers = user.heard
    fitting = [moment for moment, sentence in answers if in_order(row.says, sentence)]
    assert fitting, f"no answer holds {row.says}: {answers}"
    assert fitting == [row.moment], "answered at another moment, or more than once"


def test_only_what_has_a_reason_is_answered_later_than_the_start() -> None:
    late = {name for name, row in ROWS.items() if MOMENTS.index(row.moment) > MOMENTS.index("start")}
    assert late == set(LATE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {**BEST, "preserve_n_best": 2, "save_total_limit": 2, "save_steps": 1},
        {**BEST, "best_model_metric": "f1", "given": score("f1")},
        {**ROLLBACK, "save_steps": 2, "divguard_rewarm_steps": 2},
        {**ROLLBACK, "save_strategy": "no", "divguard_snapshot_steps": 2},
        {"divguard_detector": "ema", "divguard_action": "warn", **EVALUATES},
        {"divguard_checksums": True, "divguard_fsync": True},
    ],
    ids=["nothing", "best", "best by f1", "rollback", "snapshots", "ema", "checksums"],
)
def test_options_that_fit_are_warned_about_by_nothing(options: dict[str, Any], user: User) -> None:
    user.train(**options)
    assert user.heard == []


def in_order(words: tuple[str, ...], sentence: str) -> bool:
    """Return whether ``sentence`` holds the words one after the other."""
    place = 0
    for word in words:
        place = sentence.find(word, place)
        if place < 0:
            return False
        place += len(word)
    return True
