"""What a life trains: a tiny GPT-2 with dropout, by the stock Trainer or by ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.kill_resume.series import BEST, SAVE_STEPS, STEPS, Series
from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments
from tests.tiny import RandomRows, base_arguments, gpt2


def make_model(size: str) -> GPT2LMHeadModel:
    width, layers = {"small": (128, 2), "large": (256, 5)}[size]  # checkpoints of 5 MB and 48 MB
    return gpt2(vocabulary=256, length=16, width=width, layers=layers, heads=4, dropout=0.1)


def score(prediction: Any) -> dict[str, float]:
    # Jumps about from step to step, so that the best checkpoints are seldom the newest, and depends on every
    # bit of the weights.
    return {"score": float(abs(prediction.predictions.astype("float64").sum()) * 1e3 % 1.0)}


def make_trainer(series: Series, run_dir: str, announce: Callable[[str], None], limit: int | None) -> Any:
    common = base_arguments(
        run_dir,
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=5,
        save_steps=SAVE_STEPS,
        save_total_limit=limit,
        metric_for_best_model="score",
        greater_is_better=True,
        ddp_backend="gloo" if series.ranks > 1 else None,
    )

    class Announcing:
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            step = self.state.global_step  # type: ignore[attr-defined]
            announce(f"save {step}")
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
            announce(f"saved {step}")

    class AnnounceStart(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            announce(f"started {state.global_step}")

    parts = {
        "model": make_model(series.size),
        "train_dataset": RandomRows(64, 16, vocabulary=256, seed=1),
        "eval_dataset": RandomRows(16, 16, vocabulary=256, seed=2),
        "compute_metrics": score,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.mean(dim=-1),
        "callbacks": [AnnounceStart()],
    }
    if not series.is_ours:
        args = TrainingArguments(**common, eval_strategy="steps", eval_steps=SAVE_STEPS)
        return type("StockTrainer", (Announcing, Trainer), {})(args=args, **parts)
    options: dict[str, Any] = {"divguard_save_mode": "in_place"} if series.trainer == "in_place" else {}
    args = DivGuardTrainingArguments(
        **common,
        **options,
        eval_on_save=True,
        preserve_best_model=True,
        preserve_n_best=BEST,
        best_model_metric="score",
        best_model_greater_is_better=True,
    )
    return type("OurTrainer", (Announcing, DivGuardTrainer), {})(args=args, **parts)
