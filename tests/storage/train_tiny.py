"""Trains tiny models with the stock Trainer and leaves their checkpoints in the folder given."""

import importlib.util
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

torch.set_num_threads(1)


def train(output_dir: str, *, adapter: bool = False, **options: object) -> Trainer:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    if adapter:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 32, (16, 8))]
    arguments = TrainingArguments(
        output_dir,
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    return trainer


if __name__ == "__main__":
    root = sys.argv[1]
    trainer = train(os.path.join(root, "full"))
    train(os.path.join(root, "only_model"), save_only_model=True)
    if importlib.util.find_spec("peft") is not None:
        train(os.path.join(root, "adapter"), adapter=True)
    trainer.model.save_pretrained(os.path.join(root, "sharded"), max_shard_size="3KB")
    torch.save(trainer.model.state_dict(), os.path.join(root, "pytorch_model.bin"))
