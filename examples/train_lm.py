"""Train a small language model; every setting is a flag.

Every field of ``TrainingArguments`` is a flag, and so is every option of hf_divguard::

    python examples/train_lm.py --output_dir out --max_steps 60 --logging_steps 5 \\
        --save_steps 20 --save_total_limit 1 --eval_on_save --preserve_best_model \\
        --preserve_n_best 2 --divguard_detector adaptive --divguard_action rollback \\
        --learning_rate 2e-3 --use_cpu --report_to none

``--resume_from_checkpoint`` takes ``latest``, ``best`` or a path. Without ``--text_folder`` the
model is trained on the source code of Python's standard library; nothing is downloaded. The exit
code is 79 if rollbacks (``--divguard_action rollback``) did not help a run that diverged.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from python_corpus import read_texts, small_llama, tokenize_and_pack
from recipe import Fault, FaultArguments, parse, train_and_report
from transformers import PreTrainedModel, TrainingArguments

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments


@dataclass
class ScriptArguments:
    """The data and the model."""

    text_folder: str | None = field(
        default=None, metadata={"help": "Folder of text files. Default: Python's own standard library."}
    )
    text_pattern: str = field(default="*.py", metadata={"help": "Which files of text_folder to take."})
    text_limit: int = field(default=1_000_000, metadata={"help": "Characters of text to take, about."})
    vocabulary: int = field(default=1024, metadata={"help": "Tokens of the tokenizer, at least 257."})
    block: int = field(default=64, metadata={"help": "Tokens per training example."})
    eval_blocks: int = field(default=64, metadata={"help": "Examples held out for evaluation."})
    hidden: int = field(default=128, metadata={"help": "Width of the model, a multiple of 32."})
    layers: int = field(default=2, metadata={"help": "Layers of the model."})
    fsdp_size: int = field(
        default=1,
        metadata={
            "help": "Processes to shard the model over, by FSDP2 as Transformers 5 has it; 1: not sharded."
        },
    )


def shard(model: PreTrainedModel, processes: int, args: TrainingArguments) -> PreTrainedModel:
    """Return the model with its weights sharded over the processes; Transformers does so while it loads them."""
    from transformers.distributed import DistributedConfig

    path = os.path.join(args.output_dir, "initial_model")
    with args.main_process_first():
        if args.process_index == 0:
            model.save_pretrained(path)
    return type(model).from_pretrained(path, distributed_config=DistributedConfig(fsdp_size=processes))


def main() -> None:
    """Parse the flags, train, and print the best checkpoints."""
    fault, script, args = parse(FaultArguments, ScriptArguments, DivGuardTrainingArguments)
    texts = read_texts(script.text_folder, script.text_pattern, script.text_limit)
    train_data, eval_data = tokenize_and_pack(
        texts,
        vocabulary=script.vocabulary,
        block=script.block,
        eval_blocks=script.eval_blocks,
        seed=args.seed,
    )
    model: PreTrainedModel = small_llama(
        vocabulary=script.vocabulary,
        block=script.block,
        hidden=script.hidden,
        layers=script.layers,
        seed=args.seed,
    )
    trainer = DivGuardTrainer(
        model=model if script.fsdp_size == 1 else shard(model, script.fsdp_size, args),
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        callbacks=[Fault(fault)],
    )
    train_and_report(trainer)


if __name__ == "__main__":
    main()
