"""A detector by flags: on a command line, in JSON, in YAML, in a dict; no code needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_divguard import (
    AdaptiveDivergenceDetector,
    DivGuardTrainer,
    DivGuardTrainingArguments,
    DualTimeScaleDivergenceDetector,
    DualWindowDivergenceDetector,
    NonFiniteDetector,
)
from hf_divguard.hf.detectors_by_name import make_detector
from tests.tiny import TokenRows, base_arguments, same_weights, tiny_model, weights

FLAGS: dict[str, Any] = {
    "divguard_detector": "ema",
    "divguard_action": "abort",
    "divguard_metric_key": "loss",
    "divguard_detector_kwargs": {"threshold": 0.75, "short_alpha": 0.5},
    "divguard_check_steps": 3,
}


def parse(source: str, values: dict[str, Any], tmp_path: Path) -> DivGuardTrainingArguments:
    parser = HfArgumentParser(DivGuardTrainingArguments)
    values = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", **values}
    if source == "command line":
        line = []
        for name, value in values.items():
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            line += [f"--{name}", text]
        return parser.parse_args_into_dataclasses(line)[0]
    if source == "dict":
        return parser.parse_dict(values)[0]
    file = tmp_path / f"args.{source}"
    if source == "json":
        file.write_text(json.dumps(values))
        return parser.parse_json_file(str(file))[0]
    yaml = pytest.importorskip("yaml")
    file.write_text(yaml.safe_dump(values))
    return parser.parse_yaml_file(str(file))[0]


SOURCES = ["command line", "dict", "json", "yaml"]


@pytest.mark.parametrize("source", SOURCES)
def test_every_way_of_giving_arguments_makes_the_same_detector(source: str, tmp_path: Path) -> None:
    args = parse(source, FLAGS, tmp_path)
    detector = make_detector(args)
    assert isinstance(detector, DualTimeScaleDivergenceDetector)
    assert (detector.action, detector.metric_key) == ("abort", "loss")
    assert (detector.rule.threshold, detector.rule.short_alpha) == (0.75, 0.5)
    assert args.divguard_check_steps == 3


@pytest.mark.parametrize("source", SOURCES)
def test_without_flags_there_is_no_detector(source: str, tmp_path: Path) -> None:
    args = parse(source, {}, tmp_path)
    assert args.divguard_detector == "none"
    assert make_detector(args) is None


@pytest.mark.parametrize(
    ("name", "kind", "metric"),
    [
        ("adaptive", AdaptiveDivergenceDetector, "loss"),
        ("nonfinite", NonFiniteDetector, "loss"),
        ("ema", DualTimeScaleDivergenceDetector, "eval_loss"),
        ("window", DualWindowDivergenceDetector, "eval_loss"),
    ],
)
def test_each_name_makes_its_detector_with_the_metric_it_is_made_for(
    name: str, kind: Any, metric: str, tmp_path: Path
) -> None:
    detector = make_detector(parse("command line", {"divguard_detector": name}, tmp_path))
    assert type(detector) is kind
    assert (detector.metric_key, detector.action) == (metric, "stop")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"divguard_detector_kwargs": {"treshold": 1.0}}, "no parameter 'treshold'.*It has: .*threshold"),
        ({"divguard_detector_kwargs": "{threshold: 1.0"}, "`divguard_detector_kwargs` must be a JSON object"),
        ({"divguard_detector_kwargs": "[1, 2]"}, "`divguard_detector_kwargs` must be a JSON object"),
        ({"divguard_detector_kwargs": {"short_alpha": 2.0}}, "`short_alpha` must be"),
        ({"divguard_action": "explode"}, "`divguard_action` must be one of .*'warn', 'stop', 'abort'"),
        ({"divguard_detector": "emma"}, "`divguard_detector` must be one of .*'adaptive'"),
        ({"divguard_check_steps": 0}, "`divguard_check_steps` must be a whole number .* at least 1"),
        ({"divguard_detector": "none"}, "are settings of a detector, but `divguard_detector` is 'none'"),
    ],
    ids=str,
)
def test_a_flag_that_makes_no_sense_is_refused_with_what_would(
    flags: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        parse("dict", {**FLAGS, **flags}, tmp_path)


@pytest.mark.parametrize("flag", ["divguard_action", "divguard_detector"])
def test_a_command_line_refuses_an_unknown_choice(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("command line", {flag: "nonsense"}, tmp_path)
    assert flag in capsys.readouterr().err


def test_the_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(DivGuardTrainingArguments).parse_args_into_dataclasses(["--help"])
    text = capsys.readouterr().out
    for flag in FLAGS:
        assert f"--{flag}" in text


def test_empty_settings_are_none(tmp_path: Path) -> None:
    args = parse("command line", {"divguard_detector": "adaptive", "divguard_detector_kwargs": {}}, tmp_path)
    assert isinstance(make_detector(args), AdaptiveDivergenceDetector)


def classes_of(trainer: Any) -> list[type]:
    return [type(callback) for callback in trainer.callback_handler.callbacks]


def test_by_default_a_trainer_has_the_callbacks_of_the_stock_one_and_trains_the_same(tmp_path: Path) -> None:
    trainers = []
    for trainer_class, arguments_class in (
        (Trainer, TrainingArguments),
        (DivGuardTrainer, DivGuardTrainingArguments),
    ):
        args = arguments_class(**base_arguments(tmp_path, save_strategy="no"))
        trainers.append(trainer_class(model=tiny_model(), args=args, train_dataset=TokenRows()))
        trainers[-1].train()
    stock, ours = trainers
    assert classes_of(ours) == classes_of(stock)
    assert same_weights(weights(ours.model), weights(stock.model))
    untimed = [
        [
            {k: v for k, v in entry.items() if "second" not in k and "runtime" not in k}
            for entry in t.state.log_history
        ]
        for t in trainers
    ]
    assert untimed[0] == untimed[1]


def test_a_flag_adds_one_callback(make_trainer: Callable[..., Any]) -> None:
    plain, flagged = make_trainer(), make_trainer(divguard_detector="adaptive")
    assert classes_of(flagged) == [*classes_of(plain), AdaptiveDivergenceDetector]


def test_detectors_passed_as_callbacks_work_beside_a_flag(make_trainer: Callable[..., Any]) -> None:
    passed = [
        NonFiniteDetector(action="warn"),
        NonFiniteDetector(action="warn"),
        DualTimeScaleDivergenceDetector(
            0.9, 0.01, threshold=1e-9, action="warn", metric_key="loss", greater_is_better=True
        ),
    ]
    trainer = make_trainer(
        callbacks=passed,
        divguard_detector="nonfinite",
        divguard_action="abort",
        divguard_skip_nonfinite=False,
        max_steps=6,
    )
    healthy = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (
        healthy(*args, **kwargs) * (float("nan") if trainer.state.global_step == 3 else 1.0)
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert [[f.step for f in detector.findings if f.severity == "error"] for detector in passed[:2]] == [
        [4],
        [4],
    ]
    assert passed[2].findings
    assert all(type(detector) in classes_of(trainer) for detector in passed)


def test_a_training_script_needs_no_code(tmp_path: Path) -> None:
    args = parse(
        "command line", {"divguard_detector": "adaptive", "max_steps": 4, "save_strategy": "no"}, tmp_path
    )
    trainer = DivGuardTrainer(model=tiny_model(), args=args, train_dataset=TokenRows())
    trainer.train()
    assert trainer.state.global_step == 4
