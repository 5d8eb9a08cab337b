"""Preference training with TRL (DPO); the best checkpoints by the accuracy of the rewards stay on disk.

    python examples/trl_dpo.py --output_dir out --max_steps 40 --save_steps 10 --save_total_limit 1 \\
        --eval_on_save --preserve_best_model --preserve_n_best 2 \\
        --best_model_metric rewards/accuracies --best_model_greater_is_better true \\
        --divguard_detector adaptive --divguard_action rollback \\
        --learning_rate 1e-3 --max_length 64 --use_cpu --report_to none

The preferred answer describes the function, the other one is the same answer in capital letters. It
needs ``trl``.
"""

from __future__ import annotations

import datasets
from python_corpus import make_tokenizer, read_functions, save_base_model
from recipe import Fault, FaultArguments, parse, train_and_report
from trl import DPOConfig, DPOTrainer

from hf_divguard import guard


def main() -> None:
    """Train on pairs of answers and print the best checkpoints."""
    fault, args = parse(FaultArguments, guard(DPOConfig))
    functions = read_functions(limit=400, seed=args.seed)
    tokenizer = make_tokenizer([" ".join(each.values()) for each in functions])
    pairs = datasets.Dataset.from_list(
        [
            {
                "prompt": each["signature"] + ": ",
                "chosen": each["summary"],
                "rejected": each["summary"].upper(),
            }
            for each in functions
        ]
    )
    split = pairs.train_test_split(test_size=40, seed=args.seed)
    base = save_base_model(
        f"{args.output_dir}/base",
        vocabulary=len(tokenizer),
        block=64,
        hidden=64,
        layers=1,
        seed=args.seed,
    )
    trainer = guard(DPOTrainer)(
        model=base,
        args=args,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
        callbacks=[Fault(fault)],
    )
    train_and_report(trainer)


if __name__ == "__main__":
    main()
