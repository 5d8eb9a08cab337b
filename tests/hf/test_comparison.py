"""Before a rollback or a stop, kept and present weights are compared on the coming batches; nothing else changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_divguard import DivergenceDetector, DivGuardMixin, find_checkpoints, guard
from tests.hf.faults import ScriptedRule, Stream, moves
from tests.tiny import TokenRows, same_weights, tiny_model, weights

MakeTrainer = Callable[..., Any]

COMMON: dict[str, Any] = {
    "max_steps": 40,
    "save_steps": 10,
    "learning_rate": 3e-3,
    "train_dataset": TokenRows(rows=64),
}
GUARDED = {"divguard_detector": "adaptive", "divguard_check_steps": 1}


class Noise(TrainerCallback):
    """Noise on all weights before the forward pass of some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self.steps:
            lot = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for weight in kwargs["model"].parameters():
                    weight += 2.0 * torch.randn(weight.shape, generator=lot)


def asked(onsets: dict[int, int], action: str) -> DivergenceDetector:
    """Return a detector that asks for ``action`` at steps where nothing need be wrong."""
    return DivergenceDetector(ScriptedRule(onsets), action=action)


def passes(trainer: Any) -> int:
    """Return how many forward passes the comparisons of a run took."""
    return int(trainer._run.comparison.looks.passes)


# ---- a healthy run


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.2},
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},
        pytest.param({"bf16": True}, marks=pytest.mark.slow),
        pytest.param({"max_grad_norm": 0.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_healthy_run_that_is_looked_into_is_the_unguarded_one_to_the_bit(
    make_trainer: MakeTrainer, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Random states, training modes and data order are as if nobody had looked."""
    stock = make_trainer(
        tmp_path / "stock", trainer_class=Trainer, arguments_class=TrainingArguments, **COMMON, **options
    )
    stock.train()
    guarded = make_trainer(
        callbacks=[asked({20: 18, 25: 23, 40: 38}, "rollback")], **COMMON, **GUARDED, **options
    )
    guarded.train()
    assert passes(guarded) >= 6
    assert {event["event"] for event in guarded.divguard_events} == {"dismissed"}
    assert same_weights(weights(stock.model), weights(guarded.model))
    assert not any(key.startswith("divguard/") for entry in guarded.state.log_history for key in entry)


class Packed(TokenRows):
    """Rows of two documents each, whose positions begin at 0 again."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        half = len(row["input_ids"]) // 2
        places = torch.cat([torch.arange(half), torch.arange(len(row["input_ids"]) - half)])
        return {**row, "position_ids": places}


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Return a loss that is a share of the step's, as `compute_loss_func` has to."""
    logits = outputs["logits"][:, :-1].transpose(1, 2)
    total = torch.nn.functional.cross_entropy(logits, labels[:, 1:], reduction="sum")
    return total / (num_items_in_batch or labels[:, 1:].numel())


class OwnLoss(Trainer):
    """Takes a `compute_loss_func`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=own_loss, **kwargs)


class Starved(Trainer):
    """Runs out of memory with more than four rows."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(inputs["labels"]) > 4:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        (lambda: {"train_dataset": Stream([step % 16 for step in range(60)])}, Trainer),
        (lambda: {"train_dataset": Packed(rows=64)}, Trainer),
        (lambda: {"gradient_accumulation_steps": 2}, OwnLoss),
        (lambda: {"auto_find_batch_size": True, "per_device_train_batch_size": 8}, Starved),
    ],
    ids=["stream", "packed", "compute_loss_func", "auto_find_batch_size"],
)
def test_ways_to_train_are_the_unguarded_ones_to_the_bit_when_looked_into(
    make_trainer: MakeTrainer, tmp_path: Path, parts: Callable[[], dict[str, Any]], kind: type
) -> None:
    options = {**COMMON, "dropout": 0.2}
    stock = make_trainer(
        tmp_path / "stock", trainer_class=kind, arguments_class=TrainingArguments, **{**options, **parts()}
    )
    stock.train()
    guarded = make_trainer(
        trainer_class=type("Guarded", (DivGuardMixin, kind), {}),
        callbacks=[asked({20: 18, 25: 23}, "rollback")],
        **{**options, **parts()},
        **GUARDED,
    )
    guarded.train()
    assert passes(guarded) >= 4
    assert {event["event"] for event in guarded.divguard_events} == {"dismissed"}
    assert same_weights(weights(stock.model), weights(guarded.model))


class WithBatchNorm(torch.nn.Module):
    """A model with running statistics and a counter that goes up in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(16, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Any, labels: Any = None) -> dict[str, Any]:
        self.calls += 1
        hidden = self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        logits = self.head(hidden)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 16), labels[:, 1:].reshape(-1))
        return {"loss": loss, "logits": logits}


def test_buffers_are_as_if_nobody_had_looked(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        model=WithBatchNorm(),
        callbacks=[asked({20: 18, 25: 23}, "stop")],
        **{**COMMON, "save_strategy": "no"},
    )
    trainer.train()
    assert passes(trainer) > 0
    assert float(trainer.model.calls) == float(trainer.model.norm.num_batches_tracked) == 40


class Tracker:
    """An object of a trainer that follows its losses."""

    def __init__(self) -> None:
        self.mean, self.seen = 0.0, 0


class Counts(torch.nn.Module):
    """A model that counts its forward passes in a number that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.calls = tiny_model(), 0

    def forward(self, input_ids: Any, labels: Any = None) -> Any:
        self.calls += 1
        return self.model(input_ids=input_ids, labels=labels)


class Metrics(Trainer):
    """Collects metrics, counts calls and moves averages while it computes the loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics: dict[str, list[float]] = {"train": [], "eval": []}
        self.calls, self.tracker = 0, Tracker()
        self.queue, self.average = deque([0], maxlen=3), torch.zeros(2)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.tracker.seen += 1
        self.queue.append(self.calls)
        self.average += 1.0
        self._metrics["train" if model.training else "eval"].append(1.0)
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_what_computing_a_loss_changes_is_put_back(make_trainer: MakeTrainer) -> None:
    guarded = type("Guarded", (DivGuardMixin, Metrics), {})
    options = {**COMMON, "save_strategy": "no"}
    trainer = make_trainer(
        model=Counts(), trainer_class=guarded, callbacks=[asked({20: 18}, "stop")], **options
    )
    trainer.train()
    assert passes(trainer) > 0
    assert trainer._metrics == {"train": [1.0] * 40, "eval": []}
    assert trainer.calls == trainer.tracker.seen == trainer.model.calls == 40
    assert list(trainer.queue) == [38, 39, 40]
    assert trainer.average.tolist() == [40.0, 40.0]


class TooLarge(Trainer):
    """Changes a tensor that is too large to be copied for each loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bank = torch.zeros(2_000_000)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.bank[0] += 1.0
        return super().compute_loss(*args, **kwargs)


def test_what_cannot_be_put_back_is_said_in_a_line_and_nothing_is_compared_again(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture
) -> None:
    guarded = type("Guarded", (DivGuardMixin, TooLarge), {})
    trainer = make_trainer(trainer_class=guarded, callbacks=[asked({20: 18}, "stop")], **COMMON)
    trainer.train()
    assert trainer.state.global_step == 21
    assert our_log.text.count("no longer compared in this run") == 1
    assert "computing a loss changes `Guarded.bank`, which cannot be put back" in our_log.text


# ---- what the curve asks for


@pytest.mark.parametrize("action", ["stop", "abort", "rollback"])
@pytest.mark.parametrize("step", [20, 40], ids=["on the way", "at the end"])
def test_what_the_curve_asks_for_is_not_done_where_kept_weights_do_no_better(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture, action: str, step: int
) -> None:
    trainer = make_trainer(callbacks=[asked({step: step - 2}, action)], **COMMON)
    trainer.train()
    assert trainer.state.global_step == 40
    assert trainer.state.divguard_finding is None
    assert moves(trainer) == []
    assert "Nothing is undone: kept weights have a loss of" in our_log.text


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_without_comparison_the_curve_decides(make_trainer: MakeTrainer, action: str) -> None:
    trainer = make_trainer(callbacks=[asked({20: 18}, action)], **COMMON, divguard_compare="off")
    trainer.train()
    assert trainer.state.global_step == (20 if action == "stop" else 40)
    assert len(moves(trainer)) == (action == "rollback")


def test_where_nothing_is_kept_the_curve_decides_and_says_so(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture
) -> None:
    options = {**COMMON, "divguard_compare_memory_gb": 1e-6}
    trainer = make_trainer(callbacks=[asked({20: 18}, "stop")], **options)
    trainer.train()
    assert trainer.state.global_step == 21
    assert trainer.state.divguard_finding.cause == "unknown"
    assert "No kept weights to compare with" in our_log.text
    assert "no weights are kept and compared" in our_log.text


def test_a_save_that_waits_for_the_comparison_is_made_one_step_later(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(callbacks=[asked({20: 18}, "stop")], **COMMON).train()
    assert {info.step for info in find_checkpoints(tmp_path / "out")} == {10, 21, 30, 40}


class NeedsTraining(Trainer):
    """A loss that exists in training mode only."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            raise RuntimeError("no loss in evaluation mode")
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_loss_that_cannot_be_computed_apart_is_said_in_a_line_and_the_curve_decides(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture
) -> None:
    guarded = type("Guarded", (DivGuardMixin, NeedsTraining), {})
    trainer = make_trainer(trainer_class=guarded, callbacks=[asked({20: 18}, "stop")], **COMMON)
    trainer.train()
    assert trainer.state.global_step == 21
    assert our_log.text.count("no longer compared in this run: the loss could not be computed apart") == 1


def test_the_level_of_a_policy_gradient_ends_no_run(make_trainer: MakeTrainer) -> None:
    """Known by the name of a class."""
    guarded = type("Guarded", (DivGuardMixin, type("GRPOTrainer", (Trainer,), {})), {})
    trainer = make_trainer(trainer_class=guarded, callbacks=[asked({20: 18}, "stop")], **COMMON)
    trainer.train()
    assert trainer.state.global_step == 40
    assert passes(trainer) == 0


# ---- weights


def test_damaged_weights_are_rolled_back_within_a_step(make_trainer: MakeTrainer) -> None:
    """To kept weights; no batch but that of the fault is lost beside those since they were kept."""
    trainer = make_trainer(callbacks=[Noise(28)], **COMMON, **GUARDED, divguard_action="rollback")
    trainer.train()
    ((at, target),) = moves(trainer)
    assert 27 <= at <= 28
    assert at - target <= 6
    (event,) = trainer.divguard_events
    assert event["finding"]["cause"] == "weights"
    assert event["target"] == "memory"
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert losses[40] < losses[28] - 0.5


def test_a_look_at_some_of_many_micro_batches_has_the_scale_of_the_step(make_trainer: MakeTrainer) -> None:
    """The loss of a micro-batch is its share of that of the step; all of them count, not those that are looked at."""
    steps: dict[str, Any] = {"gradient_accumulation_steps": 8, "per_device_train_batch_size": 1}
    trainer = make_trainer(callbacks=[Noise(28)], **COMMON, **steps, **GUARDED, divguard_action="rollback")
    trainer.train()
    ((at, target),) = moves(trainer)
    assert (27 <= at <= 28, at - target <= 6) == (True, True)
    evidence = trainer.divguard_events[0]["finding"]["evidence"]
    assert evidence["kept_loss"] == pytest.approx(evidence["usual_loss"], rel=0.4)


@pytest.mark.parametrize("action", ["stop", "abort"])
def test_damaged_weights_stop_a_run_within_two_steps(make_trainer: MakeTrainer, action: str) -> None:
    trainer = make_trainer(callbacks=[Noise(28)], **COMMON, **GUARDED, divguard_action=action)
    trainer.train()
    assert 28 <= trainer.state.global_step <= 29
    finding = trainer.state.divguard_finding
    assert (finding.kind, finding.cause) == ("damage", "weights")
    assert trainer.state.divguard_aborted == (action == "abort")


def test_damage_in_the_last_step_is_undone(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(callbacks=[Noise(40)], **COMMON, **GUARDED, divguard_action="rollback")
    trainer.train()
    ((at, target),) = moves(trainer)
    assert at in (39, 40)
    assert target <= 39


def test_two_faults_close_together_are_both_undone(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(callbacks=[Noise(25, 33)], **COMMON, **GUARDED, divguard_action="rollback")
    trainer.train()
    assert [at in (step - 1, step) for (at, _), step in zip(moves(trainer), (25, 33), strict=True)] == [
        True,
        True,
    ]


def test_an_incident_survives_a_resume(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(callbacks=[Noise(28)], **COMMON, **GUARDED, divguard_action="rollback")
    trainer.train()
    resumed = make_trainer(**{**COMMON, "max_steps": 44}, **GUARDED, divguard_action="rollback")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-30"))
    assert resumed.state.global_step == 44
    assert moves(resumed) == moves(trainer)


# ---- data


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_wrong_data_are_named_and_stop_nothing_while_they_last(
    make_trainer: MakeTrainer, action: str
) -> None:
    data = Stream([step % 16 for step in range(60)], wrong=range(28, 60))
    options = {**COMMON, "train_dataset": data, "learning_rate": 1e-2}
    trainer = make_trainer(callbacks=[], **options, **GUARDED, divguard_action=action)
    trainer.train()
    assert trainer.state.global_step == 40
    assert moves(trainer) == []
    assert trainer.divguard_events[0]["event"] == "data"
    assert trainer.divguard_events[0]["cause"] == "data"


BAD_ROW_OPTIONS: dict[str, Any] = {
    "max_steps": 90,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
}


class BadRow:
    """A collator that gives one row of one batch wrong labels."""

    def __init__(self, step: int, row: int) -> None:
        self.step, self.row, self.calls = step, row, 0

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.calls += 1
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if self.calls == self.step:
            batch["labels"] = batch["labels"].clone()
            batch["labels"][self.row] = (batch["labels"][self.row] * 7 + 3) % 16
        return batch


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "options", [GUARDED, {**GUARDED, "logging_nan_inf_filter": False, "divguard_check_steps": 7}]
)
def test_a_bad_row_is_named(make_trainer: MakeTrainer, micro_batches: int, options: dict[str, Any]) -> None:
    """By the position in its batch, also when its loss is seen some steps later; nothing is undone for it."""
    trainer = make_trainer(
        train_dataset=TokenRows(rows=64),
        gradient_accumulation_steps=micro_batches,
        **{**BAD_ROW_OPTIONS, "logging_steps": 100},
        **options,
    )
    trainer.data_collator = BadRow(step=70 * micro_batches, row=5)
    trainer.train()
    assert trainer.state.global_step == 90
    (row,) = trainer.divguard_suspect_rows
    assert row.items() >= {"step": 70, "rank": 0, "micro_batch": micro_batches - 1, "row": 5}.items()


class NeedsWholeBatch(Trainer):
    """A loss that only a batch of eight rows has, as one that compares the rows with each other."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(inputs["labels"]) != 8:
            raise RuntimeError("no loss of a part of a batch")
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_where_rows_have_no_loss_of_their_own_none_is_named(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture
) -> None:
    """The search for the row must not end the run."""
    guarded = type("Guarded", (DivGuardMixin, NeedsWholeBatch), {})
    trainer = make_trainer(
        trainer_class=guarded, train_dataset=TokenRows(rows=64), **BAD_ROW_OPTIONS, **GUARDED
    )
    trainer.data_collator = BadRow(step=70, row=5)
    trainer.train()
    assert trainer.state.global_step == 90
    assert trainer.divguard_suspect_rows == []
    assert our_log.text.count("No rows are named") == 1


class RowWithoutLoss(Trainer):
    """The loss of a batch with one marked row is not a number."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * float("nan") if bool((inputs["labels"] == 15).all(dim=1).any()) else loss


class MarkedRow(BadRow):
    """A collator that marks the row."""

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        if self.calls == self.step:
            batch["labels"][self.row] = 15
        return batch


class Spends(TrainerCallback):
    """Leaves nothing of the budget of looks, before a step."""

    trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 68:
            self.trainer._run.comparison.looks.budget.take_anyway(200)


def test_a_row_whose_loss_is_not_a_number_is_named_when_the_budget_is_spent(
    make_trainer: MakeTrainer,
) -> None:
    """There is something to find for certain, and there are few such steps."""
    guarded, spends = type("Guarded", (DivGuardMixin, RowWithoutLoss), {}), Spends()
    trainer = make_trainer(
        trainer_class=guarded,
        callbacks=[spends],
        train_dataset=TokenRows(rows=64),
        **BAD_ROW_OPTIONS,
        **GUARDED,
    )
    spends.trainer = trainer
    trainer.data_collator = MarkedRow(step=70, row=5)
    trainer.train()
    (row,) = trainer.divguard_suspect_rows
    assert row.items() >= {"step": 70, "row": 5}.items()


class ComparesStates(TrainerCallback):
    """Asks, in the middle of training, whether the newest kept state is damaged: as it is, and with noise on it."""

    trainer: Any = None
    answers: tuple[bool, bool] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self.trainer._run
        if state.global_step != 38:
            return
        looks, (good, newest) = run.comparison.looks, run.snapshots.all()[-2:]
        as_it_is = looks._is_damaged(newest.step, good.step)
        floating = {name: value for name, value in newest.tensors.items() if value.is_floating_point()}
        before = {name: value.clone() for name, value in floating.items()}
        for value in floating.values():
            value += torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        self.answers = (as_it_is, looks._is_damaged(newest.step, good.step))
        for name, value in before.items():
            newest.tensors[name].copy_(value)


def test_a_kept_state_is_damaged_if_an_older_one_does_better_on_its_own_batches(
    make_trainer: MakeTrainer,
) -> None:
    compares = ComparesStates()
    trainer = make_trainer(callbacks=[compares], divguard_snapshot_steps=5, **COMMON, **GUARDED)
    compares.trainer = trainer
    trainer.train()
    assert compares.answers == (False, True)


def test_after_training_nothing_is_kept_in_memory(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(**{**COMMON, **GUARDED, "max_steps": 12})
    trainer.train()
    assert trainer._run.snapshots.all() == []
    looks = trainer._run.comparison.looks
    assert (looks.coming, looks.recent.all()) == (None, [])
    assert not trainer._run.comparison.bad_batches._steps


class Marked(TokenRows):
    """Rows of which one has wrong labels; it notes which rows are asked for."""

    def __init__(self, bad: int, rows: int) -> None:
        super().__init__(rows=rows)
        self.bad, self.asked = bad, []  # type: ignore[var-annotated]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.asked.append(index)
        row = dict(super().__getitem__(index))
        if index == self.bad:
            row["labels"] = (row["labels"] * 7 + 3) % 16
        return row


def test_a_bad_row_is_named_by_its_number_in_the_dataset_and_left_out_of_a_resumed_run(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    options = {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "save_steps": 40, "max_steps": 90}
    probe = make_trainer(tmp_path / "order", train_dataset=Marked(-1, 720), **options, **GUARDED)
    probe.train()
    bad = probe.train_dataset.asked[69 * 8 + 5]
    trainer = make_trainer(train_dataset=Marked(bad, 720), **options, **GUARDED)
    trainer.train()
    assert [(row["step"], row["dataset_index"]) for row in trainer.divguard_suspect_rows] == [(70, bad)]
    assert probe.train_dataset.asked == trainer.train_dataset.asked  # following changes nothing
    for leaves_out in (False, True):
        again = Marked(bad, 720)
        resumed = make_trainer(
            train_dataset=again, **options, **GUARDED, divguard_skip_suspect_rows=leaves_out
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-40"))
        assert (bad in again.asked) is not leaves_out
        assert resumed.state.global_step == 90
        named = [(row["step"], row["dataset_index"]) for row in resumed.divguard_suspect_rows]
        assert named == ([] if leaves_out else [(70, bad)])


# ---- a rise that is older than all kept states


class GrowingPenalty(Trainer):
    """A loss that rises through the run because a penalty grows, while the model learns."""

    growth = 0.05

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * (1.0 + self.growth * self.state.global_step)


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_a_loss_that_rises_by_itself_ends_nothing(make_trainer: MakeTrainer, action: str) -> None:
    """The weights of 60 steps ago do no better on the present batches, although their loss was lower then."""
    options = {**COMMON, "max_steps": 110, "trainer_class": guard(GrowingPenalty), **GUARDED}
    trainer = make_trainer(callbacks=[asked({100: 5}, action)], **options, divguard_action="warn")
    trainer.train()
    assert trainer.state.global_step == 110
    assert trainer.state.divguard_finding is None
    events = [(each["event"], each["step"]) for each in trainer.divguard_events]
    assert ("dismissed", 100) in events
    assert "rollback" not in dict(events)


def test_where_the_loss_has_not_risen_since_the_curve_decides(make_trainer: MakeTrainer) -> None:
    """Damage that is older than all kept states shows in none of them."""
    options = {**COMMON, "max_steps": 110, "trainer_class": guard(Trainer), **GUARDED}
    trainer = make_trainer(callbacks=[asked({100: 5}, "stop")], **options, divguard_action="warn")
    trainer.train()
    assert trainer.state.global_step == 101
    assert trainer.state.divguard_finding.cause == "unknown"
