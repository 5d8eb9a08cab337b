"""A training script that knows nothing of hf_divguard. Arguments: kind, output folder, step of a fault."""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from tests.tiny import LENGTH, VOCABULARY, TokenRows, base_arguments, tiny_model

torch.set_num_threads(1)


class BreakWeights(TrainerCallback):
    """Makes the weights NaN before one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Break the weights."""
        if state.global_step + 1 == self.step:
            next(model.parameters()).data.fill_(float("nan"))


class WeightedTrainer(Trainer):
    """A user's own trainer, with a loss of its own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return half of the loss."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (loss / 2, outputs) if return_outputs else loss / 2


def seq2seq_model() -> Any:
    """Return a tiny encoder-decoder."""
    set_seed(0)
    size: dict[str, Any] = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
    size |= {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    size |= {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "dropout": 0.0, "max_position_embeddings": LENGTH}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **size))


def main(kind: str, folder: str, fault: int) -> None:
    """Train."""
    options: dict[str, Any] = {"max_steps": 24, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 8}
    trainer: Any = {"plain": Trainer, "own": WeightedTrainer, "seq2seq": Seq2SeqTrainer}[kind]
    arguments: Any = Seq2SeqTrainingArguments if kind == "seq2seq" else TrainingArguments
    if kind == "seq2seq":
        options |= {"predict_with_generate": True, "generation_max_length": 4}
    run = trainer(
        model=seq2seq_model() if kind == "seq2seq" else tiny_model(),
        args=arguments(**base_arguments(folder, **options)),
        train_dataset=TokenRows(),
        eval_dataset=TokenRows(rows=8, seed=1),
        callbacks=[BreakWeights(fault)],
    )
    run.train()
    if run.is_world_process_zero():
        run.save_state()
    print("trained by", type(run).__name__, "with", type(run.args).__name__)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
