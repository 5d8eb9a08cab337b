"""Supervised fine-tuning with TRL, of a LoRA adapter; a flag makes the run diverge.

    python examples/trl_sft.py --output_dir out --max_steps 80 --save_steps 10 --save_total_limit 2 \\
        --eval_on_save --preserve_best_model --preserve_n_best 2 \\
        --divguard_detector adaptive --divguard_action rollback \\
        --learning_rate 1e-2 --lora_r 8 --fault learning_rate --fault_step 50 --use_cpu --report_to none

The data are conversations: a function of Python's standard library, and what it does. It needs
``trl`` and ``peft``. ``guard`` gives ``SFTTrainer`` and ``SFTConfig`` the options of hf_divguard;
nothing else differs from a script for TRL. ``--lora_r 0`` trains all weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import datasets
from peft import LoraConfig
from python_corpus import make_tokenizer, read_functions, small_llama
from recipe import Fault, FaultArguments, parse, train_and_report
from trl import SFTConfig, SFTTrainer

from hf_divguard import guard


@dataclass
class ModelArguments:
    """The adapter."""

    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA adapter; 0 trains all weights."})


def main() -> None:
    """Train on conversations and print the best checkpoints."""
    fault, model_args, args = parse(FaultArguments, ModelArguments, guard(SFTConfig))
    functions = read_functions(limit=600, seed=args.seed)
    tokenizer = make_tokenizer([" ".join(each.values()) for each in functions])
    conversations = datasets.Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": each["signature"]},
                    {"role": "assistant", "content": each["summary"]},
                ]
            }
            for each in functions
        ]
    )
    split = conversations.train_test_split(test_size=64, seed=args.seed)
    adapter = LoraConfig(
        r=model_args.lora_r,
        target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"],  # the base model is not trained, so it knows no token
        task_type="CAUSAL_LM",
    )
    trainer = guard(SFTTrainer)(
        model=small_llama(vocabulary=len(tokenizer), block=64, hidden=64, layers=2, seed=args.seed),
        args=args,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
        peft_config=adapter if model_args.lora_r else None,
        callbacks=[Fault(fault)],
    )
    train_and_report(trainer)


if __name__ == "__main__":
    main()
