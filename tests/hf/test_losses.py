"""The raw loss of every step: equal to losses computed by hand, and no more waiting for the device than the host's."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset, IterableDataset
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hf_divguard import DivGuardMixin, DivGuardTrainer, NonFiniteDetector
from hf_divguard.core.detection.detector import StepValues
from hf_divguard.hf.losses import StepLosses
from tests.tiny import TokenRows, base_arguments, tiny_model


class Recorder(NonFiniteDetector):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__(action="warn")
        self.values: list[StepValues] = []
        self.looks = 0

    def on_raw_losses(self, values: list[StepValues], *args: Any) -> None:
        self.values += values
        self.looks += 1
        super().on_raw_losses(values, *args)


class RaggedRows(Dataset):
    """Rows with labels of unequal number, so that the mean over tokens is no mean over batches."""

    def __init__(self, rows: int) -> None:
        self.tokens = TokenRows(rows=rows)
        generator = torch.Generator().manual_seed(7)
        self.lengths = torch.randint(1, 8, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.tokens.rows[index]
        labels = row.clone()
        labels[0] = -100  # nothing predicts it, but the host counts it among the items
        labels[1 + int(self.lengths[index]) :] = -100
        return {"input_ids": row, "labels": labels}


class Stream(IterableDataset):
    """The same rows without a length."""

    def __init__(self, rows: int) -> None:
        self.rows = RaggedRows(rows)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter([self.rows[index] for index in range(len(self.rows))])


class MeanOnly(GPT2LMHeadModel):
    """A model that knows nothing of the number of items in a step."""

    def forward(self, input_ids: Any = None, labels: Any = None) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, labels=labels)


def mean_only_model() -> MeanOnly:
    model = MeanOnly(tiny_model().config)
    model.load_state_dict(tiny_model().state_dict())
    return model


class ByHand(DivGuardTrainer):
    """Adds up the losses of the tokens of each micro-batch on its own."""

    smoothing = 0.0
    autocast: Any = contextlib.nullcontext()

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), self.autocast:
            logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].float()
            labels = inputs["labels"][:, 1:]
            logs = torch.log_softmax(logits, -1)
            wanted = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            losses = -(1 - self.smoothing) * wanted - self.smoothing * logs.mean(-1)
            known = labels != -100
        if not hasattr(self, "by_step"):
            self.by_step: dict[int, list[tuple[float, int]]] = {}
        batches = self.by_step.setdefault(self.state.global_step + 1, [])
        batches.append((float(losses[known].double().sum()), int(known.sum())))
        return super().training_step(model, inputs, *args, **kwargs)


def mean_over_tokens(batches: list[tuple[float, int]]) -> float:
    return sum(total for total, _ in batches) / sum(count for _, count in batches)


def mean_over_batches(batches: list[tuple[float, int]]) -> float:
    return sum(total / count for total, count in batches) / len(batches)


def sum_over_items(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1])
    total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
    return total / num_items_in_batch


def watched(make_trainer: Callable[..., Any], recorder: Recorder, rows: int = 20, **options: Any) -> Any:
    options.setdefault("train_dataset", RaggedRows(rows))
    options = {"trainer_class": ByHand, "save_strategy": "no", "max_steps": 9, "logging_steps": 4, **options}
    return make_trainer(callbacks=[recorder], **options)


def assert_equals(recorder: Recorder, trainer: Any, by_hand: Callable[..., float], rel: float = 1e-5) -> None:
    steps = trainer.state.global_step
    assert [entry.step for entry in recorder.values] == list(range(1, steps + 1))
    expected = [by_hand(trainer.by_step[step]) for step in range(1, steps + 1)]
    assert [entry.loss for entry in recorder.values] == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("accumulation", [1, 2, 3, 8], ids="accumulation={}".format)
def test_a_steps_loss_is_the_mean_over_its_tokens(
    make_trainer: Callable[..., Any], accumulation: int
) -> None:
    # 5 batches an epoch: with 2 and 3 the last accumulation is partial, 8 is longer than the epoch.
    recorder = Recorder()
    trainer = watched(make_trainer, recorder, gradient_accumulation_steps=accumulation)
    trainer.train()
    assert_equals(recorder, trainer, mean_over_tokens)
    sizes = {len(batches) for batches in trainer.by_step.values()}
    assert sizes == {1: {1}, 2: {1, 2}, 3: {2, 3}, 8: {5}}[accumulation]


@pytest.mark.parametrize("accumulation", [1, 2, 3], ids="accumulation={}".format)
def test_a_model_that_takes_means_gives_the_mean_over_micro_batches(
    make_trainer: Callable[..., Any], accumulation: int
) -> None:
    recorder = Recorder()
    options = {"gradient_accumulation_steps": accumulation, "model": mean_only_model()}
    trainer = watched(make_trainer, recorder, **options)
    trainer.train()
    assert_equals(recorder, trainer, mean_over_batches)


def test_a_loss_function_of_the_user_gives_its_own_reduction(make_trainer: Callable[..., Any]) -> None:
    recorder = Recorder()
    trainer = watched(make_trainer, recorder, gradient_accumulation_steps=2)
    trainer.compute_loss_func = sum_over_items
    trainer.train()
    assert_equals(recorder, trainer, mean_over_tokens)


def test_label_smoothing_is_in_the_loss(make_trainer: Callable[..., Any]) -> None:
    recorder = Recorder()
    trainer = watched(make_trainer, recorder, label_smoothing_factor=0.1)
    trainer.smoothing = 0.1
    trainer.train()
    assert_equals(recorder, trainer, mean_over_tokens)


def test_losses_under_bf16_are_summed_in_full_precision(make_trainer: Callable[..., Any]) -> None:
    recorder = Recorder()
    trainer = watched(make_trainer, recorder, bf16=True, gradient_accumulation_steps=2)
    trainer.autocast = torch.autocast("cpu", torch.bfloat16)
    trainer.train()
    assert_equals(recorder, trainer, mean_over_tokens, rel=1e-3)


def test_a_stream_that_ends_within_an_accumulation_does_not_double_a_loss(
    make_trainer: Callable[..., Any],
) -> None:
    recorder = Recorder()
    trainer = watched(
        make_trainer,
        recorder,
        train_dataset=Stream(20),
        gradient_accumulation_steps=2,
        logging_strategy="epoch",
    )
    trainer.train()
    leftover = trainer.by_step[3]
    # The fifth batch of an epoch takes no step of its own: its gradient goes into the first step of the next.
    assert len(leftover) == 3
    expected = (mean_over_tokens(leftover[:1]) + mean_over_tokens(leftover[1:])) / 2
    assert recorder.values[2].loss == pytest.approx(expected, rel=1e-5)
    assert recorder.values[3].loss == pytest.approx(mean_over_tokens(trainer.by_step[4]), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1},
        {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0},
    ],
    ids=str,
)
def test_a_steps_loss_is_what_the_host_logs_for_it(
    make_trainer: Callable[..., Any], options: dict[str, Any]
) -> None:
    recorder = Recorder()
    trainer = watched(make_trainer, recorder, **options, logging_steps=1)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.loss for entry in recorder.values] == pytest.approx(logged, abs=6e-5)


def test_the_gradient_norm_is_that_before_clipping(make_trainer: Callable[..., Any]) -> None:
    norms = []

    class MeasureGradient(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            norms.append(math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients)))

    recorder = Recorder()
    trainer = watched(make_trainer, recorder, max_grad_norm=1e6, gradient_accumulation_steps=2)
    trainer.add_callback(MeasureGradient())
    trainer.train()
    assert [entry.grad_norm for entry in recorder.values] == pytest.approx(norms, rel=1e-5)


def test_a_saved_memory_holds_every_step_before_the_save(
    make_trainer: Callable[..., Any], tmp_path: Any
) -> None:
    seen = []

    class NoteAtSave(Recorder):
        def state_dict(self) -> dict[str, Any]:
            seen.append(len(self.values))
            return super().state_dict()

    trainer = watched(
        make_trainer,
        NoteAtSave(),
        save_strategy="steps",
        save_steps=3,
        logging_steps=100,
        divguard_check_steps=100,
    )
    trainer.train()
    assert set(seen) == {0, 3, 6, 9}


# ---- waiting for the device


class CountReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a number on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select"}:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count reads of tensors by the host: those torch dispatches, and the methods that copy without dispatching."""
    mode = CountReads()

    def counting(name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            mode.counts[name] += 1
            return method(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, mode:
        for name in ("tolist", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
        yield mode.counts


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="filter on"),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation", marks=pytest.mark.slow),
        pytest.param({"logging_nan_inf_filter": False}, id="filter off", marks=pytest.mark.slow),
    ],
)
def test_watching_waits_for_the_device_as_often_as_the_stock_trainer_and_once_more_per_look(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    from hf_divguard import AdaptiveDivergenceDetector, DivGuardTrainingArguments

    looks = []

    class Watching(AdaptiveDivergenceDetector):
        def on_raw_losses(self, values: list[StepValues], *args: Any) -> None:
            looks.append(len(values))
            super().on_raw_losses(values, *args)

    arguments = base_arguments(tmp_path, max_steps=40, logging_steps=20, save_strategy="no", **options)
    counts = []
    for trainer_class, arguments_class, callbacks in (
        (Trainer, TrainingArguments, []),
        (DivGuardTrainer, DivGuardTrainingArguments, []),
        (DivGuardTrainer, DivGuardTrainingArguments, [Watching()]),
    ):
        trainer = trainer_class(
            model=tiny_model(),
            args=arguments_class(**arguments),
            train_dataset=TokenRows(),
            callbacks=callbacks,
        )
        with counted_reads(monkeypatch) as reads:
            trainer.train()
        assert trainer.state.global_step == 40
        counts.append(reads)
    stock, off, watching = counts
    assert stock["_local_scalar_dense"] > (40 if options.get("logging_nan_inf_filter", True) else 0)
    assert off == stock
    assert looks == [10] * 4
    assert watching - stock == Counter(tolist=4)
    assert stock - watching == Counter()


def test_the_tap_holds_no_more_than_the_steps_since_the_last_look(make_trainer: Callable[..., Any]) -> None:
    recorder = Recorder()
    trainer = watched(make_trainer, recorder, max_steps=35, logging_steps=100, divguard_check_steps=10)
    trainer.train()
    assert [entry.step for entry in recorder.values] == list(range(1, 36))
    assert recorder.looks == 4


def test_half_precision_losses_are_not_summed_in_half_precision() -> None:
    losses = StepLosses(check_steps=1, world_size=1)
    losses.micro_batches = [torch.tensor(60000.0, dtype=torch.float16)] * 3
    losses.close_step(1, grad_norm=None)
    assert losses.drain(1) == [StepValues(step=1, loss=180000.0, grad_norm=None)]


class ReusesItsOutput(Trainer):
    """Returns every loss in the same memory, as a compiled model may."""

    output = torch.zeros(())

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.output.copy_(super().training_step(*args, **kwargs))


class GuardedReuse(DivGuardMixin, ReusesItsOutput):
    pass


def test_a_loss_that_the_model_overwrites_later_is_kept_as_it_was(make_trainer: Callable[..., Any]) -> None:
    seen = {}
    for trainer_class in (DivGuardTrainer, GuardedReuse):
        recorder = Recorder()
        options = {"gradient_accumulation_steps": 2, "max_steps": 6, "save_strategy": "no"}
        make_trainer(callbacks=[recorder], trainer_class=trainer_class, **options).train()
        seen[trainer_class] = [entry.loss for entry in recorder.values]
    assert len(set(seen[DivGuardTrainer])) == 6
    assert seen[GuardedReuse] == seen[DivGuardTrainer]
