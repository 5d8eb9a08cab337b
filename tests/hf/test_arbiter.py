"""With `divguard_eval_arbiter` the evaluation set decides on data that stay bad until the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from hf_divguard.hf.evaluation_batches import evaluation_batches
from tests.hf.faults import Stream, moves
from tests.tiny import TokenRows, same_weights, weights

MakeTrainer = Callable[..., Any]

FAULT = 40


class Rows(TokenRows):
    """The rows of a stream, with the labels that the stream gives from some step on."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__(rows=64)
        self.shift = shift

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        return {"input_ids": row, "labels": (row * 7 + self.shift) % 16 if self.shift else row}


class Switch(Stream):
    """Rows that are other ones, with other, learnable labels, from a step on, until another."""

    def __init__(self, order: list[int], until: int = 1000) -> None:
        super().__init__(order)
        self.until = until

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for place, row in enumerate(super().__iter__()):
            is_new = FAULT - 1 <= place // self.batch < self.until - 1
            tokens = (row["input_ids"][0] + 3 * torch.arange(len(row["input_ids"]))) % 16
            yield {"input_ids": tokens, "labels": (tokens * 7 + 3) % 16} if is_new else row


def options(steps: int, data: Any, **more: Any) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 100,
        "train_dataset": data,
        "eval_dataset": Rows(),
        "divguard_detector": "adaptive",
        "divguard_action": "rollback",
        "divguard_eval_arbiter": True,
        **more,
    }


def noise_until(steps: int) -> Stream:
    return Stream([step % 16 for step in range(steps)], wrong=range(FAULT, steps + 1))


def eval_loss(trainer: Any) -> float:
    return float(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("steps", [60, 140], ids=["within the incident", "when it counts as usual"])
def test_what_noise_to_the_end_has_left_is_undone_at_the_end(make_trainer: MakeTrainer, steps: int) -> None:
    trainer = make_trainer(**options(steps, noise_until(steps)))
    trainer.train()
    assert trainer.state.global_step == steps
    ((at, target),) = moves(trainer)
    assert at in (steps - 1, steps)
    assert FAULT - 10 <= target < FAULT
    (event,) = [each for each in trainer.divguard_events if each["event"] == "rollback"]
    assert event["finding"]["cause"] == "data"
    assert "on the evaluation set the weights of step" in event["finding"]["message"]
    before = make_trainer(**options(FAULT - 1, noise_until(steps)))
    before.train()
    assert eval_loss(trainer) < 1.15 * eval_loss(before)


def test_without_it_the_end_is_as_the_data_have_it(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(**options(60, noise_until(60), divguard_eval_arbiter=False))
    trainer.train()
    assert moves(trainer) == []
    before = make_trainer(**options(FAULT - 1, noise_until(60)))
    before.train()
    assert eval_loss(trainer) > 1.25 * eval_loss(before)


def test_a_stop_comes_while_the_noise_lasts(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(**options(140, noise_until(140), divguard_action="stop"))
    trainer.train()
    assert FAULT + 5 <= trainer.state.global_step <= FAULT + 25
    assert trainer.state.divguard_finding.cause == "data"


@pytest.mark.parametrize("action", ["rollback", "stop"])
def test_new_data_with_an_evaluation_set_of_them_are_left_alone_to_the_bit(
    make_trainer: MakeTrainer, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation set was asked, and dropout, random states and the order of the data are as without it."""
    from hf_divguard.hf.arbiter import Arbiter

    asked: list[bool] = []
    ask = Arbiter.ask
    monkeypatch.setattr(Arbiter, "ask", lambda self, **when: asked.append(True) or ask(self, **when))
    data = [Switch([step % 16 for step in range(100)]) for _ in range(2)]
    more = {"eval_dataset": Rows(shift=3), "dropout": 0.2, "divguard_action": action}
    trainer = make_trainer(**options(100, data[0], **more))
    trainer.train()
    assert asked
    assert trainer.state.global_step == 100
    assert moves(trainer) == []
    stock_options = {
        name: value
        for name, value in options(100, data[1], **more).items()
        if not name.startswith("divguard_")
    }
    stock = make_trainer(trainer_class=Trainer, arguments_class=TrainingArguments, **stock_options)
    stock.train()
    assert data[0].drawn == data[1].drawn
    assert same_weights(weights(stock.model), weights(trainer.model))


def there_and_back(lasts: int = 15, steps: int = 100) -> Switch:
    """Rows that are other ones for some steps: bad ones, or a task that comes and goes."""
    return Switch([step % 16 for step in range(steps)], until=FAULT + lasts)


def test_data_that_were_bad_for_some_steps_are_undone_when_they_have_passed(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(**options(100, there_and_back()))
    trainer.train()
    ((at, target),) = moves(trainer)
    assert FAULT + 15 <= at <= FAULT + 30
    assert target < FAULT
    (event,) = [each for each in trainer.divguard_events if each["event"] == "rollback"]
    assert "on the evaluation set the weights of step" in event["finding"]["message"]
    without = make_trainer(**options(100, there_and_back(), divguard_eval_arbiter=False))
    without.train()
    assert moves(without) == []
    assert eval_loss(trainer) < eval_loss(without)


def test_wrong_labels_that_were_usual_by_then_are_undone_when_the_data_change_again(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(**options(140, there_and_back(60, steps=140)))
    trainer.train()
    ((at, target),) = moves(trainer)
    assert FAULT + 60 <= at <= FAULT + 70
    assert target < FAULT


def test_a_task_that_comes_and_goes_is_not_undone_where_the_evaluation_set_has_it(
    make_trainer: MakeTrainer,
) -> None:
    both = torch.utils.data.ConcatDataset([Rows(), Rows(shift=3)])
    trainer = make_trainer(**options(100, there_and_back(), eval_dataset=both))
    trainer.train()
    assert moves(trainer) == []


class Unreadable(TokenRows):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        raise OSError("no such file")


def test_an_evaluation_set_that_cannot_be_read_is_said_in_a_line(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(**options(60, noise_until(60), eval_dataset=Unreadable(rows=8)))
    trainer.train()
    assert moves(trainer) == []
    assert our_log.text.count("The evaluation set decides on nothing in this run") == 1
    assert "no such file" in our_log.text


# ---- the batches


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        row = TokenRows(rows=1)[0]
        while True:
            yield row


@pytest.mark.parametrize(
    ("sets", "most", "count"),
    [
        (TokenRows(rows=64), 4, 4),
        (TokenRows(rows=8), 16, 2),
        ({"news": TokenRows(rows=64), "books": TokenRows(rows=64, seed=1)}, 4, 4),
        (Endless(), 4, 4),
    ],
    ids=["spread", "few", "two sets", "stream"],
)
def test_batches_are_those_of_an_evaluation_and_leave_no_trace(
    make_trainer: MakeTrainer, sets: Any, most: int, count: int
) -> None:
    trainer = make_trainer(max_steps=2, per_device_eval_batch_size=4, eval_dataset=sets)
    accelerator = trainer.accelerator
    before = len(accelerator._dataloaders), len(accelerator.gradient_state.dataloader_references)
    batches = evaluation_batches(trainer, most)
    assert len(batches) == count
    assert all(batch["input_ids"].shape[0] == 4 for batch in batches)
    assert before == (len(accelerator._dataloaders), len(accelerator.gradient_state.dataloader_references))
    if isinstance(sets, TokenRows) and count == 4:
        loader = list(trainer.get_eval_dataloader())
        assert all(
            torch.equal(batch["input_ids"], loader[place]["input_ids"])
            for batch, place in zip(batches, (0, 4, 8, 12), strict=True)
        )
