"""Labels that are wrong for some steps are undone when right ones come back; new data with new inputs are left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from hf_divguard import DivGuardTrainer
from hf_divguard.hf.label_arbiter import LabelArbiter
from tests.hf.faults import Stream, moves
from tests.tiny import TokenRows, same_weights, weights

MakeTrainer = Callable[..., Any]
Row = dict[str, torch.Tensor]

FAULT, LASTS, STEPS = 40, 15, 100
BATCH = 8


def other_labels(row: Row) -> Row:
    """Labels that can be learnt as easily as the right ones."""
    return {**row, "labels": (row["input_ids"] * 7 + 3) % 16}


def next_labels(row: Row) -> Row:
    """Every label replaced by the next one."""
    return {**row, "labels": (row["labels"] + 1) % 16}


def other_domain(row: Row) -> Row:
    """Rows that count in threes: other inputs, with the labels that belong to them."""
    tokens = (row["input_ids"][0] + 3 * torch.arange(len(row["input_ids"]))) % 16
    return {"input_ids": tokens, "labels": tokens}


class Changed(Stream):
    """Rows that are changed in some steps."""

    def __init__(self, change: Callable[[Row], Row], *times: range, steps: int = STEPS) -> None:
        super().__init__([step % 8 for step in range(steps)], batch=BATCH)
        self.change, self.times = change, times

    def __iter__(self) -> Iterator[Row]:
        for place, row in enumerate(super().__iter__()):
            step = place // self.batch + 1
            yield self.change(row) if any(step in each for each in self.times) else row


def options(data: Any, **more: Any) -> dict[str, Any]:
    return {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 100,
        "train_dataset": data,
        "eval_dataset": TokenRows(rows=64),
        "divguard_detector": "adaptive",
        "divguard_action": "rollback",
        **more,
    }


def once(lasts: int = LASTS) -> range:
    return range(FAULT, FAULT + lasts)


def eval_loss(trainer: Any) -> float:
    return float(trainer.evaluate()["eval_loss"])


def random_labels() -> Stream:
    return Stream([step % 8 for step in range(STEPS)], batch=BATCH, wrong=once())


WRONG = {
    "random": random_labels,
    "other, learnable": lambda: Changed(other_labels, once()),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_wrong_labels_have_left_is_undone_when_right_ones_are_back(
    make_trainer: MakeTrainer, kind: str
) -> None:
    trainer = make_trainer(**options(WRONG[kind]()))
    trainer.train()
    ((at, target),) = moves(trainer)
    assert FAULT + LASTS <= at <= FAULT + LASTS + 6
    assert FAULT - 10 <= target < FAULT
    (event,) = [each for each in trainer.divguard_events if each["event"] == "rollback"]
    assert event["finding"]["cause"] == "data"
    assert "the labels contradicted what the model had learnt" in event["finding"]["message"]
    unguarded = make_trainer(**options(WRONG[kind](), divguard_compare="off", divguard_action="warn"))
    unguarded.train()
    assert eval_loss(trainer) < eval_loss(unguarded)


def test_micro_batches_of_accumulation_count_together(make_trainer: MakeTrainer) -> None:
    more = {"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(**options(WRONG["other, learnable"](), **more))
    trainer.train()
    ((at, target),) = moves(trainer)
    assert FAULT + LASTS <= at <= FAULT + LASTS + 6
    assert target < FAULT


def stock_of(make_trainer: MakeTrainer, data: Any) -> Any:
    plain = {name: value for name, value in options(data).items() if not name.startswith("divguard_")}
    stock = make_trainer(trainer_class=Trainer, arguments_class=TrainingArguments, **plain)
    stock.train()
    return stock


LEFT_ALONE = {
    "a domain that comes and goes": lambda: Changed(other_domain, once()),
    "domains in turns": lambda: Changed(other_domain, once(), range(70, 85)),
    "labels that are other ones for good": lambda: Changed(other_labels, range(FAULT, STEPS + 1)),
    "a domain for good": lambda: Changed(other_domain, range(FAULT, STEPS + 1)),
    "labels of which the model makes use": lambda: Changed(next_labels, once()),
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_what_may_be_new_is_left_alone_to_the_bit(make_trainer: MakeTrainer, kind: str) -> None:
    data = LEFT_ALONE[kind]()
    trainer = make_trainer(**options(data))
    trainer.train()
    assert any(each["event"] == "data" for each in trainer.divguard_events)  # it was seen
    assert moves(trainer) == []
    again = LEFT_ALONE[kind]()
    stock = stock_of(make_trainer, again)
    assert data.drawn == again.drawn
    assert same_weights(weights(stock.model), weights(trainer.model))


def test_inputs_were_compared_before_a_turn_of_domains_was_left_alone(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []
    were_wrong = LabelArbiter._labels_were_wrong
    monkeypatch.setattr(
        LabelArbiter,
        "_labels_were_wrong",
        lambda self, *args: found.append(were_wrong(self, *args)) or found[-1],
    )
    make_trainer(**options(Changed(other_domain, once()))).train()
    assert found
    assert not any(found)


def test_labels_that_take_turns_are_undone_twice_and_then_left(make_trainer: MakeTrainer) -> None:
    turns = [range(first, first + 12) for first in (40, 80, 120, 160)]
    data = Changed(other_labels, *turns, steps=200)
    trainer = make_trainer(**options(data, max_steps=200))
    trainer.train()
    assert len(moves(trainer)) == 2
    assert all(at < 120 for at, _ in moves(trainer))


def test_how_often_labels_were_undone_is_remembered(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(**options(WRONG["other, learnable"]()))
    trainer.train()
    memory = trainer._run.comparison.state_dict()
    assert memory["labels_undone"] == 1
    other = make_trainer(**options(WRONG["other, learnable"](), max_steps=1))
    other.train()
    other._run.comparison.load_state_dict(memory)
    assert other._run.comparison.state_dict()["labels_undone"] == 1


@pytest.mark.parametrize("action", ["stop", "abort"])
def test_a_run_is_not_ended_for_labels_that_have_passed(make_trainer: MakeTrainer, action: str) -> None:
    trainer = make_trainer(**options(WRONG["other, learnable"](), divguard_action=action))
    trainer.train()
    assert trainer.state.global_step == STEPS


class Odd:
    """Collates rows together with something that no one can describe, or that says which task is meant."""

    def __init__(self, name: Any, of_step: Callable[[int], Any]) -> None:
        self.name, self.of_step, self.calls = name, of_step, 0

    def __call__(self, rows: list[Row]) -> dict[Any, Any]:
        self.calls += 1
        batch: dict[Any, Any] = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {**batch, self.name: self.of_step(self.calls)}


class DropsOdd(DivGuardTrainer):
    """Takes out of the batch what the model does not know."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        known = {name: inputs[name] for name in ("input_ids", "labels")}
        return super().compute_loss(model, known, *args, **kwargs)


@pytest.mark.parametrize(
    ("name", "of_step"),
    [
        ("what", lambda step: object()),
        (7, lambda step: "a name that is a number"),
        ("task", lambda step: "other" if step in once() else "usual"),
        ("task", lambda step: int(step in once())),
    ],
    ids=["an object", "a number as name", "a name for the task", "a number for the task"],
)
def test_what_cannot_be_described_or_marks_a_task_leaves_the_run_alone(
    make_trainer: MakeTrainer, name: Any, of_step: Callable[[int], Any]
) -> None:
    more = {"trainer_class": DropsOdd, "remove_unused_columns": False, "eval_dataset": None}
    trainer = make_trainer(**options(WRONG["other, learnable"](), **more))
    trainer.data_collator = Odd(name, of_step)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert any(each["event"] == "data" for each in trainer.divguard_events)
    assert moves(trainer) == []


def test_nothing_is_kept_after_training(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(**options(Changed(other_labels, range(90, STEPS + 1))))
    trainer.train()
    arbiter = trainer._run.comparison._arbiter
    assert any(each["event"] == "data" for each in trainer.divguard_events)
    assert (arbiter.since, arbiter._described, trainer._run.snapshots.pinned) == (None, {}, None)


# ---- a model of another kind


class Pictures(IterableDataset):
    """Noisy pictures of ten glyphs; their classes are renamed in some steps, or other glyphs come."""

    def __init__(self, wrong: range, *, renames: bool) -> None:
        self.wrong, self.renames = wrong, renames

    def __iter__(self) -> Iterator[Row]:
        lot = torch.Generator().manual_seed(5)
        glyphs = torch.randn(2, 10, 1, 8, 8, generator=lot).sign()
        for place in range(STEPS * BATCH):
            is_wrong = place // BATCH + 1 in self.wrong
            label = torch.randint(0, 10, (), generator=lot)
            glyph = glyphs[int(is_wrong and not self.renames), label]
            picture = glyph + 0.5 * torch.randn(1, 8, 8, generator=lot)
            yield {"pixel_values": picture, "labels": (label + 3 * (is_wrong and self.renames)) % 10}


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        logits = self.layers(pixel_values)
        assert labels is not None
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("renames", [True, False], ids=["classes renamed", "other pictures"])
def test_pictures_are_told_apart_by_their_pixels(make_trainer: MakeTrainer, renames: bool) -> None:
    data = Pictures(once(), renames=renames)
    trainer = make_trainer(**options(data, model=Classifier(), eval_dataset=None))
    trainer.train()
    assert any(each["event"] == "data" for each in trainer.divguard_events)
    assert len(moves(trainer)) == renames
