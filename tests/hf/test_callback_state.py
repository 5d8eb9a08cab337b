"""The state of callbacks lives in ``divguard_state.json`` beside each checkpoint and comes back into the live objects."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_divguard import (
    DivGuardTrainer,
    DivGuardTrainingArguments,
    DualTimeScaleDivergenceDetector,
    DualWindowDivergenceDetector,
)
from tests.conftest import AskAt, MetricByStep, Recorder
from tests.tiny import TokenRows

pytestmark = pytest.mark.filterwarnings("ignore:mtime may not be reliable")

NAN, INF = math.nan, math.inf
OURS = (DivGuardTrainer, DivGuardTrainingArguments)
STOCK = (Trainer, TrainingArguments)
BOTH_TRAINERS = pytest.mark.parametrize(
    ("trainer_class", "arguments_class"), [STOCK, OURS], ids=["stock", "ours"]
)


class Keeps(TrainerCallback):
    """A callback of somebody else, after PyTorch's ``Stateful`` protocol."""

    def __init__(self, state: Any = None, **settings: Any) -> None:
        self.state = {} if state is None else state
        self.settings = settings

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class Counts(Keeps):
    """Counts steps in a list that it hands out as it is, as careless callbacks do."""

    def __init__(self) -> None:
        super().__init__({"steps": []})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state["steps"].append(state.global_step)


class CannotSave(Keeps):
    def state_dict(self) -> Any:
        raise RuntimeError("no state today")


class HoldsWhatJsonCannot(Keeps):
    def state_dict(self) -> Any:
        return {"lock": object()}


class HasNumbersForKeys(Keeps):
    def state_dict(self) -> Any:
        return {"moments": {0: 0.5}}


class CannotLoad(Keeps):
    def load_state_dict(self, state: Any) -> None:
        raise RuntimeError("no thanks")


@pytest.fixture
def train(make_trainer: Any, tmp_path: Path) -> Any:
    def train(*callbacks: Any, resume: Any = None, of: Any = OURS, **options: Any) -> Any:
        trainer = make_trainer(
            trainer_class=of[0],
            arguments_class=of[1],
            callbacks=list(callbacks),
            **{"max_steps": 4, "logging_strategy": "no", **options},
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def sidecar_path(tmp_path: Path, step: int = 4) -> Path:
    return tmp_path / "out" / f"checkpoint-{step}" / "divguard_state.json"


def read_strictly(path: Path) -> dict[str, Any]:
    """Read JSON as a strict reader does: NaN and Infinity are errors."""

    def refuse(token: str) -> None:
        raise ValueError(f"{token} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage()
        for r in log.records
        if r.name.startswith("hf_divguard") and r.levelno >= logging.WARNING
    ]


# ---- what is written


def test_the_sidecar_is_strict_versioned_json_keyed_by_stable_names(train: Any, tmp_path: Path) -> None:
    first, second = Keeps({"a": 1}), DualWindowDivergenceDetector(name="mine", use_eval_loss=False)
    train(first, second)
    data = read_strictly(sidecar_path(tmp_path))
    assert data["format"] == 1
    assert data["step"] == 4
    assert {name for name in data["callbacks"] if not name.startswith("divguard_")} == {"Keeps", "mine"}
    assert data["callbacks"]["mine"] == {"short_buffer": [], "long_buffer": []}


STATES: dict[str, Any] = {
    "not finite": {"nan": NAN, "inf": INF, "minus": -INF, "deep": [[NAN]]},
    "numbers": {"int": 2**70, "float": 0.1 + 0.2, "tiny": 5e-324, "negative zero": -0.0, "bool": True},
    "text": {"": "", "ü": "ß\n\u2028 \U0001f600", "none": None},
    "a key that looks like ours": {"__float__": "NaN", "__dict__": [[1, 2]]},
    "nested": {"a": [{"b": [1, 2, {"c": []}]}]},
    "empty": {},
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_every_state_of_plain_values_comes_back_as_it_was(train: Any, tmp_path: Path, state: Any) -> None:
    train(Keeps(state), max_steps=2)
    read_strictly(sidecar_path(tmp_path, 2))
    restored = Keeps({"other": "state"})
    train(restored, resume=True)
    assert repr(restored.state) == repr(state)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(1.5), 1.5),
        (np.int64(3), 3),
        (torch.tensor(2.5), 2.5),
        (np.float64("nan"), NAN),
        ((1, 2), [1, 2]),
    ],
)
def test_numbers_of_other_libraries_come_back_as_plain_ones(
    train: Any, tmp_path: Path, value: Any, plain: Any
) -> None:
    train(Keeps({"value": value}), max_steps=2)
    read_strictly(sidecar_path(tmp_path, 2))
    restored = Keeps()
    train(restored, resume=True)
    assert repr(restored.state["value"]) in (repr(plain), repr(value))


def test_the_state_is_taken_after_the_evaluation_of_its_step(train: Any, tmp_path: Path) -> None:
    detector = DualWindowDivergenceDetector(2, 50, metric_key="eval_error")
    metric = MetricByStep({2: 0.5, 4: 0.25}, "error")
    train(metric, detector, eval_on_save=True, compute_metrics=metric)
    for step, buffer in ((2, [0.5]), (4, [0.5, 0.25])):
        states = read_strictly(sidecar_path(tmp_path, step))["callbacks"]
        assert states["DualWindowDivergenceDetector"]["long_buffer"] == buffer


def test_the_sidecar_grows_by_no_more_than_one_record_a_save_and_its_states_not_at_all(
    train: Any, tmp_path: Path
) -> None:
    detectors = [DualTimeScaleDivergenceDetector(name=name, metric_key="eval_loss") for name in ("a", "b")]
    train(*detectors, eval_on_save=True, save_steps=1, max_steps=20, save_total_limit=2)
    states = read_strictly(sidecar_path(tmp_path, 20))["callbacks"]
    assert {name: set(state) for name, state in states.items() if not name.startswith("divguard_")} == {
        name: {"short_ema", "long_ema", "initialized"} for name in ("a", "b")
    }
    sizes = [sidecar_path(tmp_path, step).stat().st_size for step in (19, 20)]
    assert abs(sizes[0] - sizes[1]) < 150  # one record, and numbers with more or fewer digits
    assert sizes[1] < 2500


@BOTH_TRAINERS
def test_trainer_state_json_knows_nothing_of_it(
    make_trainer: Any, tmp_path: Path, trainer_class: Any, arguments_class: Any
) -> None:
    texts = []
    for name, callbacks in (
        ("without", []),
        ("with", [DualTimeScaleDivergenceDetector(use_eval_loss=False)]),
    ):
        make_trainer(
            tmp_path / name,
            trainer_class=trainer_class,
            arguments_class=arguments_class,
            callbacks=callbacks,
            max_steps=4,
        ).train()
        texts.append((tmp_path / name / "checkpoint-4" / "trainer_state.json").read_bytes())
    assert texts[0] == texts[1]


# ---- restored into live objects


def test_the_live_objects_get_their_states_and_keep_their_identity_and_settings(train: Any) -> None:
    metric = MetricByStep({2: 1.0, 4: 2.0, 6: 3.0}, "error")
    options = {"eval_on_save": True, "compute_metrics": metric}
    train(metric, DualWindowDivergenceDetector(2, 10, threshold=5.0, metric_key="eval_error"), **options)
    detector = DualWindowDivergenceDetector(1, 2, threshold=0.9, metric_key="eval_error")
    trainer = train(metric, detector, resume=True, max_steps=6, **options)
    assert any(callback is detector for callback in trainer.callback_handler.callbacks)
    assert detector.state_dict() == {"short_buffer": [3.0], "long_buffer": [2.0, 3.0]}
    assert detector.findings == []
    detector = DualWindowDivergenceDetector(1, 2, threshold=0.5, metric_key="eval_error")
    trainer = train(
        metric, detector, resume=str(Path(trainer.args.output_dir, "checkpoint-4")), max_steps=6, **options
    )
    assert [finding.step for finding in detector.findings] == [6], "the new threshold counts"


def test_two_callbacks_of_one_class_each_get_their_own_state_back_whatever_their_order(train: Any) -> None:
    class Named(Keeps):
        def __init__(self, name: str, state: Any = None) -> None:
            super().__init__(state)
            self.name = name

    train(Named("a", {"is": "a"}), Named("b", {"is": "b"}), max_steps=2)
    b, a = Named("b"), Named("a")
    train(b, a, resume=True)
    assert (a.state, b.state) == ({"is": "a"}, {"is": "b"})


def test_two_callbacks_of_one_class_without_names_are_told_apart_by_their_order(train: Any) -> None:
    train(Keeps({"is": "first"}), Keeps({"is": "second"}), max_steps=2)
    first, second = Keeps(), Keeps()
    train(Counts(), first, second, resume=True)
    assert (first.state, second.state) == ({"is": "first"}, {"is": "second"})


def test_two_callbacks_of_one_name_are_refused_naming_it(train: Any) -> None:
    with pytest.raises(ValueError, match=r"Two callbacks are named 'x'.*Give each its own `name`"):
        train(
            DualTimeScaleDivergenceDetector(name="x", use_eval_loss=False),
            DualWindowDivergenceDetector(name="x", use_eval_loss=False),
        )


def test_a_callback_that_was_not_there_before_starts_anew(train: Any, our_log: Any) -> None:
    train(Keeps({"a": 1}), max_steps=2)
    old, new = Keeps(), Counts()
    train(old, new, resume=True)
    assert old.state == {"a": 1}
    assert new.state == {"steps": [3, 4]}
    assert any("no state of callback Counts" in line for line in warnings_of(our_log))


def test_a_state_whose_callback_is_gone_is_left_alone(train: Any, our_log: Any, tmp_path: Path) -> None:
    train(Keeps({"a": 1}), Counts(), max_steps=2)
    train(Keeps(), resume=True)
    assert warnings_of(our_log) == []
    assert set(read_strictly(sidecar_path(tmp_path))["callbacks"]) == {"Keeps"}


# ---- what can go wrong


@pytest.mark.parametrize("broken", [CannotSave, HoldsWhatJsonCannot, HasNumbersForKeys])
def test_a_callback_that_cannot_be_saved_loses_only_its_own_state(
    train: Any, tmp_path: Path, our_log: Any, broken: Any
) -> None:
    train(broken(), Keeps({"a": 1}), max_steps=2)
    assert read_strictly(sidecar_path(tmp_path, 2))["callbacks"] == {"Keeps": {"a": 1}}
    assert any(f"callback {broken.__name__} could not be saved" in line for line in warnings_of(our_log))


def test_a_callback_that_cannot_load_loses_only_its_own_state(train: Any, our_log: Any) -> None:
    train(CannotLoad({"b": 2}), Keeps({"a": 1}), max_steps=2)
    fine = Keeps()
    train(CannotLoad(), fine, resume=True)
    assert fine.state == {"a": 1}
    assert any(
        "callback CannotLoad could not be restored (RuntimeError: no thanks)" in w
        for w in warnings_of(our_log)
    )


def test_a_detector_with_a_state_that_does_not_fit_starts_anew(
    train: Any, our_log: Any, tmp_path: Path
) -> None:
    train(
        Keeps({"short_ema": NAN, "long_ema": 1.0, "initialized": True}), max_steps=2, divguard_save_mode="off"
    )
    path = sidecar_path(tmp_path, 2)
    detector = DualTimeScaleDivergenceDetector(name="Keeps", use_eval_loss=False)
    assert path.is_file()
    train(detector, resume=True)
    assert detector.state_dict() == {"short_ema": None, "long_ema": None, "initialized": False}
    assert any("Keeps could not be restored" in line for line in warnings_of(our_log))


DAMAGE = {
    "of the future": lambda text: text.replace('"format": 1', '"format": 99').replace(
        '"format":1', '"format":99'
    ),
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "not an object": lambda text: "[1, 2]",
    "not JSON": lambda text: "\x00\xff garbage",
    "with a changed byte": lambda text: text.replace('"a"', '"z"'),
}


@pytest.mark.parametrize(
    ("damage", "resume"),
    [*((damage, None) for damage in DAMAGE.values()), (DAMAGE["cut short"], True)],
    ids=[*DAMAGE, "cut short, in the newest"],
)
@pytest.mark.parametrize(
    ("of", "has_manifest"),
    [(STOCK, False), (OURS, True), (OURS, False)],
    ids=["stock", "ours", "ours, its manifest gone"],
)
def test_a_sidecar_that_cannot_be_read_is_a_warning_and_callbacks_start_anew(
    train: Any, tmp_path: Path, our_log: Any, damage: Any, of: Any, has_manifest: bool, resume: Any
) -> None:
    train(
        DualWindowDivergenceDetector(name="a", metric_key="loss"),
        of=of,
        max_steps=2,
        logging_strategy="steps",
    )
    path = sidecar_path(tmp_path, 2)
    damaged = damage(path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
    if not has_manifest:
        (path.parent / "divguard_manifest.json").unlink(missing_ok=True)
    detector = DualWindowDivergenceDetector(name="a", metric_key="loss")
    trainer = train(detector, resume=resume or str(path.parent), of=of, logging_strategy="steps")
    assert trainer.state.global_step == 4
    assert len(detector.state_dict()["long_buffer"]) == 2
    assert any("divguard_state.json" in line for line in warnings_of(our_log))


def test_a_checkpoint_of_the_stock_trainer_without_a_sidecar_is_no_reason_to_complain(
    train: Any, our_log: Any
) -> None:
    train(of=STOCK, max_steps=2)
    counts = Counts()
    train(counts, resume=True)
    assert counts.state == {"steps": [3, 4]}
    assert warnings_of(our_log) == []


# ---- again and again


def test_a_second_train_on_one_trainer_starts_clean(train: Any) -> None:
    counts, keeps = Counts(), Keeps({"given": "before the first training"})
    trainer = train(counts, keeps)
    keeps.state["given"] = "changed since"
    assert counts.state == {"steps": [1, 2, 3, 4]}
    trainer.train()
    assert counts.state == {"steps": [1, 2, 3, 4]}
    assert keeps.state == {"given": "before the first training"}
    trainer.train()
    assert counts.state == {"steps": [1, 2, 3, 4]}


def test_a_callback_that_is_added_later_starts_clean_too(train: Any) -> None:
    trainer, late = train(Keeps()), Counts()
    trainer.add_callback(late)
    for _ in range(3):
        trainer.train()
        assert late.state == {"steps": [1, 2, 3, 4]}


def test_a_second_train_that_resumes_takes_nothing_over_from_the_first(
    train: Any, make_trainer: Any, tmp_path: Path
) -> None:
    make_trainer(
        tmp_path / "stock", trainer_class=Trainer, arguments_class=TrainingArguments, max_steps=2
    ).train()
    counts = Counts()
    trainer = train(counts)
    trainer.train(resume_from_checkpoint=str(tmp_path / "stock" / "checkpoint-2"))
    assert counts.state == {"steps": [3, 4]}


def test_a_smaller_batch_after_running_out_of_memory_starts_clean(make_trainer: Any) -> None:
    class RunsOutOnce(DivGuardTrainer):
        has_run_out = False

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 3 and not self.has_run_out:
                self.has_run_out = True
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    counts, window, recorder = Counts(), DualWindowDivergenceDetector(2, 50, use_eval_loss=False), Recorder()
    trainer = make_trainer(
        trainer_class=RunsOutOnce,
        callbacks=[counts, window, recorder],
        auto_find_batch_size=True,
        eval_on_save=True,
        preserve_best_model=True,
        max_steps=5,
    )
    trainer.train()
    assert recorder.steps("log") == [1, 2, 3, 1, 2, 3, 4, 5], "it began anew"
    assert counts.state == {"steps": [1, 2, 3, 4, 5]}
    assert window.state_dict()["long_buffer"] == [log["loss"] for log in recorder.logs if "loss" in log][3:]
    assert [entry.step for entry in sorted(trainer.best_checkpoints(9), key=lambda e: e.step)] == [2, 4, 5]
    assert not [c for c in trainer.callback_handler.callbacks if type(c).__module__.endswith("hf.run_events")]


def test_a_detector_may_go_from_our_trainer_to_the_stock_one(
    train: Any, tmp_path: Path, make_trainer: Any
) -> None:
    detector = DualWindowDivergenceDetector(2, 50, use_eval_loss=False)
    train(detector, logging_strategy="steps")
    make_trainer(
        tmp_path / "stock",
        trainer_class=Trainer,
        arguments_class=TrainingArguments,
        callbacks=[detector],
        max_steps=2,
    ).train()
    states = read_strictly(tmp_path / "stock" / "checkpoint-2" / "divguard_state.json")["callbacks"]
    assert len(states["DualWindowDivergenceDetector"]["long_buffer"]) == 2


# ---- with the stock Trainer


def test_with_the_stock_trainer_detectors_keep_their_own_state(train: Any, tmp_path: Path) -> None:
    def make() -> list[Any]:
        return [
            DualWindowDivergenceDetector(2, 50, metric_key="loss"),
            DualWindowDivergenceDetector(2, 50, metric_key="eval_loss"),
            DualTimeScaleDivergenceDetector(metric_key="grad_norm", greater_is_better=False),
        ]

    options = {
        "of": STOCK,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "max_steps": 8,
    }
    whole, cut, resumed = make(), make(), make()
    train(*whole, output_dir=tmp_path / "whole", **options)
    train(*cut, AskAt(stop={4}), **options)
    train(*resumed, resume=True, **options)
    assert [d.state_dict() for d in resumed] == [d.state_dict() for d in whole]
    assert [len(d.state_dict()["long_buffer"]) for d in resumed[:2]] == [8, 4]
    assert set(read_strictly(sidecar_path(tmp_path, 8))["callbacks"]) == {
        "DualWindowDivergenceDetector",
        "DualWindowDivergenceDetector#2",
        "DualTimeScaleDivergenceDetector",
    }


@pytest.mark.parametrize(("first", "second"), [(STOCK, OURS), (OURS, STOCK)])
def test_a_detector_goes_on_where_another_trainer_left_it(train: Any, first: Any, second: Any) -> None:
    options = {"logging_strategy": "steps", "max_steps": 6}
    whole = DualWindowDivergenceDetector(2, 50, use_eval_loss=False)
    train(whole, of=first, **options)
    resumed = DualWindowDivergenceDetector(2, 50, use_eval_loss=False)
    trainer = train(
        AskAt(stop={4}), DualWindowDivergenceDetector(2, 50, use_eval_loss=False), of=first, **options
    )
    train(resumed, of=second, resume=str(Path(trainer.args.output_dir, "checkpoint-4")), **options)
    assert resumed.state_dict() == whole.state_dict()


def test_the_stock_trainer_resumes_with_the_state_from_an_eval_dict(train: Any) -> None:
    sets = {"a": TokenRows(4, seed=1), "b": TokenRows(4, seed=2)}
    options = {"of": STOCK, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": sets, "max_steps": 6}
    train(DualWindowDivergenceDetector(2, 50, metric_key="eval_b_loss"), AskAt(stop={4}), **options)
    resumed = DualWindowDivergenceDetector(2, 50, metric_key="eval_b_loss")
    train(resumed, resume=True, **options)
    assert len(resumed.state_dict()["long_buffer"]) == 3
