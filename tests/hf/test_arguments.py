"""The options parse from everywhere, survive being written down, and refuse what contradicts itself."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_divguard import DivGuardArgumentsMixin, DivGuardTrainingArguments

OURS = [field.name for field in fields(DivGuardArgumentsMixin)]


@dataclass
class OurSeq2SeqArguments(DivGuardArgumentsMixin, Seq2SeqTrainingArguments):
    pass


def arguments(cls: Any = DivGuardTrainingArguments, /, **options: Any) -> Any:
    return cls(**{"output_dir": "out", "use_cpu": True, "report_to": "none", **options})


def parse(*line: str, cls: Any = DivGuardTrainingArguments) -> Any:
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(
        ["--output_dir", "out", "--use_cpu", "true", "--report_to", "none", *line]
    )
    return args


# ---- parsing


ALL_ON = {
    "preserve_best_model": True,
    "best_model_metric": "eval_f1",
    "best_model_greater_is_better": True,
    "preserve_n_best": 3,
    "eval_on_save": True,
}


def from_command_line(folder: Path, options: dict[str, Any]) -> Any:
    line = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return parse(*line)


def from_file(folder: Path, options: dict[str, Any], kind: str) -> Any:
    path = folder / f"options.{kind}"
    options = {"output_dir": "out", "use_cpu": True, "report_to": "none", **options}
    if kind == "json":
        path.write_text(json.dumps(options))
    else:
        lines = {True: "true", False: "false", None: "null"}
        path.write_text(
            "".join(
                f"{name}: {lines[value] if value is None or isinstance(value, bool) else value}\n"
                for name, value in options.items()
            )
        )
    parser = HfArgumentParser(DivGuardTrainingArguments)
    (args,) = parser.parse_json_file(path) if kind == "json" else parser.parse_yaml_file(path)
    return args


def from_dict(folder: Path, options: dict[str, Any]) -> Any:
    parser = HfArgumentParser(DivGuardTrainingArguments)
    (args,) = parser.parse_dict({"output_dir": "out", "use_cpu": True, "report_to": "none", **options})
    return args


WAYS = {
    "command line": from_command_line,
    "json": lambda folder, options: from_file(folder, options, "json"),
    "yaml": lambda folder, options: from_file(folder, options, "yaml"),
    "dict": from_dict,
    "constructor": lambda folder, options: arguments(**options),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def read_options(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, Any]], Any]:
    return lambda options: request.param(tmp_path, options)


def test_every_option_is_read_alike_from_everywhere(read_options: Any) -> None:
    args = read_options(ALL_ON)
    assert {name: getattr(args, name) for name in ALL_ON} == ALL_ON
    assert args.divguard_ranking_key == "eval_f1"
    assert args.divguard_greater_is_better is True


@pytest.mark.parametrize(("given", "expected"), [(True, True), (False, False), (None, None)])
def test_the_direction_is_true_false_or_none_everywhere(
    read_options: Any, given: bool | None, expected: bool | None
) -> None:
    args = read_options({"best_model_metric": "zork", "best_model_greater_is_better": given})
    assert args.best_model_greater_is_better is expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("true", True),
        ("True", True),
        ("1", True),
        ("yes", True),
        ("false", False),
        ("FALSE", False),
        ("0", False),
        ("no", False),
        ("none", None),
        ("None", None),
        ("null", None),
    ],
)
def test_the_direction_is_a_word_on_the_command_line(word: str, expected: bool | None) -> None:
    args = parse("--best_model_metric", "zork", "--best_model_greater_is_better", word)
    assert args.best_model_greater_is_better is expected
    assert (
        arguments(best_model_metric="zork", best_model_greater_is_better=word).best_model_greater_is_better
        is expected
    )


@pytest.mark.parametrize("word", ["maybe", "2", "lower", "tru"])
def test_any_other_word_for_the_direction_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=f"must be true, false or none, got '{word}'"):
        parse("--best_model_greater_is_better", word)


def test_a_flag_without_a_value_switches_a_boolean_on() -> None:
    args = parse("--preserve_best_model", "--eval_on_save")
    assert args.preserve_best_model is True
    assert args.eval_on_save is True


def test_help_names_every_option_and_says_what_it_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        HfArgumentParser(DivGuardTrainingArguments).parse_args_into_dataclasses()
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(DivGuardArgumentsMixin):
        assert f"--{field.name}" in text
        # The parser breaks long lines within words at hyphens and slashes too, so only the beginning is compared.
        assert " ".join(field.metadata["help"].replace("%%", "%").split()[:4]) in text


# ---- written down and read again


def test_to_dict_and_json_hold_the_options_as_they_are() -> None:
    args = arguments(**ALL_ON)
    assert {name: args.to_dict()[name] for name in ALL_ON} == ALL_ON
    assert {name: json.loads(args.to_json_string())[name] for name in ALL_ON} == ALL_ON


@pytest.mark.parametrize("cls", [DivGuardTrainingArguments, OurSeq2SeqArguments])
def test_arguments_made_from_their_own_json_are_the_same(cls: Any) -> None:
    args = arguments(
        cls, **ALL_ON, save_steps=7, eval_steps=5, eval_strategy="steps", load_best_model_at_end=True
    )
    written = json.loads(args.to_json_string())
    again = cls(
        **{field.name: written[field.name] for field in fields(cls) if field.init and field.name in written}
    )
    assert again.to_dict() == args.to_dict()
    assert again.save_steps == 7
    assert again.load_best_model_at_end is True


def test_training_args_bin_gives_the_options_back(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "run",
        preserve_best_model=True,
        eval_on_save=True,
        preserve_n_best=2,
        save_total_limit=3,
        max_steps=2,
    )
    trainer.train()
    saved = torch.load(tmp_path / "run" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert type(saved) is DivGuardTrainingArguments
    assert saved.to_dict() == trainer.args.to_dict()
    assert saved.save_total_limit == 3
    assert trainer.args.save_total_limit == 3


def test_the_mixin_adds_the_options_to_any_class_of_arguments() -> None:
    args = arguments(OurSeq2SeqArguments, **ALL_ON, predict_with_generate=True)
    assert args.predict_with_generate is True
    assert {name: getattr(args, name) for name in ALL_ON} == ALL_ON
    parsed = parse("--predict_with_generate", "--eval_on_save", cls=OurSeq2SeqArguments)
    assert parsed.predict_with_generate is True
    assert parsed.eval_on_save is True


# ---- defaults


def test_defaults_leave_everything_as_in_the_stock_arguments() -> None:
    stock, ours = arguments(TrainingArguments).to_dict(), arguments().to_dict()
    assert {name: value for name, value in ours.items() if name not in OURS} == stock
    assert set(OURS) <= set(ours)


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("preserve_best_model", False),
        ("best_model_metric", "loss"),
        ("best_model_greater_is_better", None),
        ("preserve_n_best", 1),
        ("eval_on_save", False),
    ],
)
def test_the_options_have_the_promised_defaults(name: str, default: Any) -> None:
    assert getattr(arguments(), name) == default
    assert getattr(parse(), name) == default


# ---- load_best_model_at_end


MIXES = {
    "steps that do not meet": {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 7},
    "ratios that do not meet": {"eval_strategy": "steps", "eval_steps": 0.02, "save_steps": 0.1},
    "a ratio and a number": {"eval_strategy": "steps", "eval_steps": 0.3, "save_steps": 7},
    "a number and a ratio": {"eval_strategy": "steps", "eval_steps": 7, "save_steps": 0.3},
    "epochs and steps": {"eval_strategy": "epoch", "save_steps": 7},
    "steps and epochs": {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "epoch"},
    "no evaluation and steps": {"eval_strategy": "no", "save_steps": 7},
    "no evaluation and epochs": {"eval_strategy": "no", "save_strategy": "epoch"},
}


@pytest.mark.parametrize("options", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("preserve", [False, True])
def test_with_eval_on_save_saves_and_evaluations_need_not_meet_to_load_the_best(
    options: dict[str, Any], preserve: bool
) -> None:
    args = arguments(eval_on_save=True, load_best_model_at_end=True, preserve_best_model=preserve, **options)
    assert args.load_best_model_at_end is True
    assert args.metric_for_best_model == "loss"
    assert args.greater_is_better is False
    for name, value in options.items():
        assert getattr(args, name) == value, "the user's numbers are never rewritten"


@pytest.mark.parametrize(
    "options",
    [
        {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 7},
        {"eval_strategy": "epoch", "save_steps": 7},
        {"eval_strategy": "no"},
    ],
)
@pytest.mark.parametrize("preserve", [False, True])
def test_without_eval_on_save_the_stock_rules_for_loading_the_best_still_hold(
    options: dict[str, Any], preserve: bool
) -> None:
    with pytest.raises(ValueError, match=r"load_best_model_at_end|eval_on_save=True"):
        arguments(load_best_model_at_end=True, preserve_best_model=preserve, **options)


@pytest.mark.parametrize(
    ("options", "metric", "greater"),
    [
        ({}, "loss", False),
        ({"metric_for_best_model": "accuracy"}, "accuracy", True),
        ({"metric_for_best_model": "wer", "greater_is_better": False}, "wer", False),
        ({"preserve_best_model": True, "best_model_metric": "accuracy"}, "accuracy", True),
        ({"preserve_best_model": True, "best_model_metric": "wer"}, "wer", False),
        (
            {"preserve_best_model": True, "best_model_metric": "zork", "best_model_greater_is_better": True},
            "zork",
            True,
        ),
    ],
)
def test_the_metric_and_direction_of_the_host_agree_with_ours(
    options: dict[str, Any], metric: str, greater: bool
) -> None:
    args = arguments(eval_on_save=True, load_best_model_at_end=True, **options)
    assert args.metric_for_best_model == metric
    assert args.greater_is_better is greater
    if args.preserve_best_model:
        assert args.divguard_greater_is_better is greater


def test_an_error_of_the_stock_arguments_leaves_the_switch_as_it_was() -> None:
    class Watched(DivGuardTrainingArguments):
        last: Any = None

        def __post_init__(self) -> None:
            Watched.last = self
            super().__post_init__()

    with pytest.raises(ValueError, match="nonsense"):
        arguments(Watched, eval_on_save=True, load_best_model_at_end=True, lr_scheduler_type="nonsense")
    assert Watched.last.load_best_model_at_end is True


# ---- contradictions


BEST = {"preserve_best_model": True, "eval_on_save": True}
REFUSED = {
    "two metrics": (
        {**BEST, "metric_for_best_model": "f1", "best_model_metric": "accuracy"},
        "`metric_for_best_model='f1'` and `best_model_metric='accuracy'` name two metrics.*Set both to the same",
    ),
    "another metric than the default": (
        {**BEST, "metric_for_best_model": "f1"},
        "`metric_for_best_model='f1'` and `best_model_metric='loss'` name two metrics",
    ),
    "two directions": (
        {**BEST, "greater_is_better": True, "best_model_greater_is_better": False},
        "`greater_is_better=True` and `best_model_greater_is_better=False` contradict each other. Set one",
    ),
    "an unknown direction": (
        {**BEST, "best_model_metric": "zork"},
        "direction of `best_model_metric='zork'` is not known. Set `best_model_greater_is_better` to true",
    ),
    "none of them": (
        {**BEST, "preserve_n_best": 0},
        "`preserve_n_best` must be .* at least 1, got 0. .*set `preserve_best_model=False`",
    ),
    "fewer than none": ({**BEST, "preserve_n_best": -1}, "at least 1, got -1"),
    "half of one": ({**BEST, "preserve_n_best": 1.5}, "whole number of checkpoints, at least 1, got 1.5"),
    "one of a kind": ({**BEST, "preserve_n_best": True}, "whole number of checkpoints, at least 1, got True"),
    "no evaluation at all": (
        {"preserve_best_model": True, "eval_strategy": "no"},
        "`eval_strategy` is 'no' and `eval_on_save` is off. Set `eval_on_save=True`",
    ),
    "no metric": ({"best_model_metric": " "}, "`best_model_metric` must be the name of an evaluation metric"),
    "a metric that is none": ({"best_model_metric": None}, "`best_model_metric` must be the name"),
    "a word for a switch": ({"eval_on_save": "yes"}, "`eval_on_save` must be true or false, got 'yes'"),
    "a number for a switch": (
        {"preserve_best_model": 1},
        "`preserve_best_model` must be true or false, got 1",
    ),
}


@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_contradiction_is_refused_with_a_sentence_that_says_what_to_do(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        arguments(**options)


def test_saving_only_the_best_without_any_evaluation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`save_strategy` is 'best'.*Set `eval_strategy`"):
        arguments(save_strategy="best", eval_strategy="no", metric_for_best_model="loss", eval_on_save=True)


@pytest.mark.parametrize("trap", [{"metric_for_best_model": "eval_f1"}, {"metric_for_best_model": "f1"}])
@pytest.mark.parametrize("ours", ["f1", "eval_f1"])
def test_one_metric_may_be_spelt_with_or_without_its_prefix(trap: dict[str, str], ours: str) -> None:
    args = arguments(**BEST, best_model_metric=ours, **trap)
    assert args.metric_for_best_model == trap["metric_for_best_model"]
    assert args.divguard_ranking_key == "eval_f1"


def test_an_unknown_metric_with_its_direction_is_accepted() -> None:
    args = arguments(**BEST, best_model_metric="zork", best_model_greater_is_better=True)
    assert args.divguard_greater_is_better is True
    assert args.greater_is_better is True
    args = arguments(**BEST, best_model_metric="zork", greater_is_better=False)
    assert args.divguard_greater_is_better is False


def test_with_the_switch_off_the_metric_is_not_looked_at() -> None:
    args = arguments(best_model_metric="zork", metric_for_best_model="f1")
    assert args.metric_for_best_model == "f1"


def test_eval_on_save_without_an_eval_dataset_is_refused(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"there is no `eval_dataset`. Pass one to the trainer, or set"):
        make_trainer(eval_dataset=None, eval_on_save=True)


def test_a_metric_that_several_eval_datasets_cannot_produce_is_refused_with_likely_names(
    make_trainer: Any,
) -> None:
    from tests.tiny import TokenRows

    several = {"news": TokenRows(4), "books": TokenRows(4)}
    with pytest.raises(ValueError, match=r"'news_loss', 'books_loss'"):
        make_trainer(eval_dataset=several, **BEST)
    make_trainer(eval_dataset=several, **BEST, best_model_metric="news_loss")


def test_saves_that_no_evaluation_meets_are_told(our_log: pytest.LogCaptureFixture) -> None:
    arguments(preserve_best_model=True, eval_strategy="steps", eval_steps=5, save_steps=7)
    assert "some saves have none and can never be best. Set `eval_on_save=True`" in our_log.text


@pytest.mark.parametrize(
    "options",
    [
        {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 10},
        {"eval_strategy": "epoch", "save_strategy": "epoch"},
        {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "best"},
        {"eval_on_save": True, "save_steps": 7},
    ],
)
def test_saves_that_evaluations_meet_are_not_warned_about(
    options: dict[str, Any], our_log: pytest.LogCaptureFixture
) -> None:
    arguments(preserve_best_model=True, **options)
    assert not [record for record in our_log.records if record.levelno >= logging.WARNING]
