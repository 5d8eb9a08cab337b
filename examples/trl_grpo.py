"""Reinforcement learning with TRL (GRPO); a NaN never gets into the weights that generate.

    python examples/trl_grpo.py --output_dir out --max_steps 20 --save_steps 5 --save_total_limit 2 \\
        --divguard_detector adaptive --divguard_action rollback \\
        --learning_rate 1e-3 --beta 0.05 --num_generations 4 --max_completion_length 12 \\
        --fault gradient --fault_step 13 --use_cpu --report_to none

The reward is the share of vowels in the completion. The loss of a policy gradient does not measure
progress, so only values that are not finite act. It needs ``trl``.
"""

from __future__ import annotations

from typing import Any

import datasets
from python_corpus import make_tokenizer, read_functions, save_base_model
from recipe import Fault, FaultArguments, parse, train_and_report
from trl import GRPOConfig, GRPOTrainer

from hf_divguard import guard


def vowels(completions: list[str], **_: Any) -> list[float]:
    """Return the share of vowels in each completion."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def main() -> None:
    """Train for a reward and print how the run ended."""
    fault, args = parse(FaultArguments, guard(GRPOConfig))
    functions = read_functions(limit=200, seed=args.seed)
    tokenizer = make_tokenizer([" ".join(each.values()) for each in functions], vocabulary=300)
    base = save_base_model(
        f"{args.output_dir}/base",
        vocabulary=len(tokenizer),
        block=128,
        hidden=32,
        layers=1,
        seed=args.seed,
    )
    trainer = guard(GRPOTrainer)(
        model=base,
        args=args,
        reward_funcs=vowels,
        train_dataset=datasets.Dataset.from_list([{"prompt": each["signature"]} for each in functions]),
        processing_class=tokenizer,
        callbacks=[Fault(fault)],
    )
    train_and_report(trainer)


if __name__ == "__main__":
    main()
