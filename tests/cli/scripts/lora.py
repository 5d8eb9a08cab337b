"""Trains an adapter of PEFT on a text file; it knows no hf_divguard. Arguments: model, text file, and flags."""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

torch.set_num_threads(1)


def main(model_path: str, text: str, flags: list[str]) -> None:
    """Train."""
    [args] = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(flags)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_path),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    rows = load_dataset("text", data_files={"train": text})["train"]
    rows = rows.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
