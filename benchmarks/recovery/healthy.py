"""The healthy runs: forty-four kinds in which nothing is wrong. A guard has to leave them alone, to the bit.

Many look alarming: losses that rise by design, jump between domains, spike in single batches, or are no measure of
progress at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.recovery import objectives
from benchmarks.recovery.switches import Schedule, Shares, every, mixed, stages, steady, turns


@dataclass(frozen=True)
class Healthy:
    """A run in which nothing is wrong.

    Args:
        name: Short name.
        title: What it is.
        half: Half of the benchmark.
        task: Name of its model.
        args: Arguments of the Trainer that differ from those of the task.
        schedule: Its data.
        objective: Its loss, where it is not that of the model.
        rows: Number of rows, where there are several epochs.
        batch: Rows of a micro-batch, where they differ from those of the task.
    """

    name: str
    title: str
    half: str
    task: str
    args: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule = steady
    objective: Callable[..., Any] | None = None
    rows: int | None = None
    batch: int | None = None


def ramp(*domains: str) -> Schedule:
    """Drift from domain to domain over the whole run, row by row."""

    def shares(done: float, step: int) -> Shares:
        place = min(done, 0.999) * (len(domains) - 1)
        low = int(place)
        return {domains[low]: 1.0 - (place - low), domains[low + 1]: place - low}

    return shares


def only(domain: str) -> Schedule:
    """One domain for the whole run."""
    return lambda done, step: {domain: 1.0}


RESTARTS = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 4}}
CONSTANT = {"lr_scheduler_type": "constant", "warmup_steps": 0}
ONE_CYCLE = {"lr_scheduler_type": "linear", "warmup_steps": 100}

HEALTHY = {
    run.name: run
    for run in (
        Healthy("restarts_lm", "cosine with four warm restarts", "design", "decoder", RESTARTS),
        Healthy("restarts_mlm", "cosine with four warm restarts", "judge", "mlm", RESTARTS),
        Healthy(
            "restarts_t5",
            "warm restarts at three times the rate",
            "judge",
            "t5",
            {**RESTARTS, "learning_rate": 6e-2},
        ),
        Healthy("few_rows_lm", "60 epochs over 64 rows: the loss goes to 0", "design", "decoder", rows=64),
        Healthy("few_rows_vit", "30 epochs over 256 images", "judge", "vit", rows=256),
        Healthy("epochs_lora", "four epochs: a sawtooth", "judge", "lora", rows=960),
        Healthy(
            "grpo",
            "policy gradient of value 0 with a distance that rises from 0",
            "design",
            "decoder",
            {"learning_rate": 2e-3},
            objective=objectives.grpo,
        ),
        Healthy(
            "grpo_accum",
            "the same with accumulation and a high rate",
            "judge",
            "accum",
            objective=objectives.grpo,
        ),
        Healthy(
            "reinforce",
            "policy gradient around 0",
            "judge",
            "decoder",
            {"learning_rate": 2e-3},
            objective=objectives.reinforce,
        ),
        Healthy("negative", "a negative loss", "judge", "vit", objective=objectives.expected_accuracy),
        Healthy(
            "entropy_bonus",
            "a loss that crosses zero",
            "design",
            "decoder",
            {"learning_rate": 3e-3},
            objective=objectives.entropy_bonus,
        ),
        Healthy(
            "rising",
            "a loss that rises through the run",
            "design",
            "vit",
            objective=objectives.falling_reward,
        ),
        Healthy(
            "rising_lm",
            "a loss that rises through the run",
            "design",
            "accum",
            {"learning_rate": 3e-3},
            objective=objectives.falling_reward,
        ),
        Healthy(
            "dpo",
            "a preference loss from log 2 to 0",
            "judge",
            "lora",
            {"learning_rate": 2e-3},
            objective=objectives.dpo,
        ),
        Healthy("summed", "a loss of some thousands", "judge", "decoder", objective=objectives.summed),
        Healthy("tiny", "a loss of 1e-5", "design", "decoder", objective=objectives.tiny),
        Healthy(
            "outliers",
            "a regression with heavy-tailed targets",
            "judge",
            "vit",
            {"learning_rate": 3e-3},
            objective=objectives.outliers,
        ),
        Healthy(
            "outliers_bn",
            "a regression with heavy-tailed targets and batch norm",
            "design",
            "resnet",
            {"learning_rate": 3e-3},
            objective=objectives.outliers,
        ),
        Healthy(
            "oscillating",
            "a loss whose weight goes up and down",
            "design",
            "decoder",
            objective=objectives.oscillating,
        ),
        Healthy(
            "two_losses",
            "label smoothing and a second loss from the middle on",
            "judge",
            "decoder",
            objective=objectives.smoothed,
        ),
        Healthy(
            "smoothing",
            "label smoothing by the Trainer",
            "design",
            "decoder",
            {"label_smoothing_factor": 0.1},
        ),
        Healthy("batch_1", "batches of one row", "design", "decoder", {"learning_rate": 3e-3}, batch=1),
        Healthy(
            "batch_1_vit",
            "batches of one image",
            "judge",
            "vit",
            {"learning_rate": 3e-3},
            schedule=only("easy"),
            batch=1,
        ),
        Healthy(
            "batch_1_mlm",
            "batches of one row with few labels",
            "judge",
            "mlm",
            {"learning_rate": 2e-3},
            batch=1,
        ),
        Healthy("batch_norm", "batch norm", "design", "resnet"),
        Healthy(
            "batch_norm_4", "batch norm over four rows", "judge", "resnet", {"learning_rate": 0.02}, batch=4
        ),
        Healthy(
            "high_rate_lm",
            "a high but stable rate, no warm-up",
            "design",
            "decoder",
            {"learning_rate": 5e-2, **CONSTANT},
        ),
        Healthy(
            "high_rate_vit", "a high but stable rate", "judge", "vit", {"learning_rate": 0.12, **CONSTANT}
        ),
        Healthy("high_rate_t5", "a high but stable rate", "judge", "t5", {"learning_rate": 0.1}),
        Healthy("noise_vit", "two of five labels random, always", "design", "vit", schedule=only("noisy")),
        Healthy("noise_lm", "two of five tokens random, always", "judge", "accum", schedule=only("noisy")),
        Healthy("nothing_to_learn", "random data", "judge", "decoder", schedule=only("random")),
        Healthy("nothing_vit", "random labels, batch norm", "design", "resnet", schedule=only("random")),
        Healthy("drift", "gradual drift to other data", "design", "vit", schedule=ramp("a", "b")),
        Healthy(
            "drift_lm", "gradual drift over three domains", "judge", "decoder", schedule=ramp("a", "b", "c")
        ),
        Healthy("harder", "ever harder data", "judge", "mlm", schedule=ramp("easy", "a", "hard")),
        Healthy("curriculum", "easy, usual, hard", "design", "lora", schedule=stages("easy", "a", "hard")),
        Healthy(
            "rare_hard",
            "every twentieth batch is hard",
            "design",
            "decoder",
            schedule=every(20, "random", 0.0),
        ),
        Healthy(
            "turns",
            "domains in turn every 10 steps from the start",
            "design",
            "decoder",
            schedule=turns(10, "b", since=0.0),
        ),
        Healthy(
            "turns_t5",
            "domains in turn every 25 steps from the start",
            "judge",
            "t5",
            schedule=turns(25, "c", since=0.0),
        ),
        Healthy("dropout", "dropout 0.3, constant rate", "design", "dropout", CONSTANT),
        Healthy(
            "known_data", "LoRA on data that the base model knows", "design", "lora", schedule=only("base")
        ),
        Healthy(
            "known_then_new",
            "LoRA on known data into which new ones come",
            "judge",
            "lora",
            schedule=mixed(0.3, "b", 0.3, ramp=0.5),
        ),
        Healthy(
            "one_cycle",
            "warm-up over 100 steps to three times the rate",
            "design",
            "lora",
            {**ONE_CYCLE, "learning_rate": 3e-2},
        ),
        Healthy("one_cycle_mlm", "warm-up over 100 steps", "judge", "mlm", ONE_CYCLE),
        Healthy("no_clipping", "no clipping", "design", "vit", {"max_grad_norm": 0.0, "learning_rate": 0.04}),
        Healthy("decay", "strong weight decay", "design", "decoder", {"weight_decay": 1.0}),
        Healthy(
            "sgd_edge",
            "SGD at the edge of stability with batch norm",
            "design",
            "resnet",
            {"learning_rate": 0.8, **CONSTANT, "max_grad_norm": 0.0},
        ),
    )
}
