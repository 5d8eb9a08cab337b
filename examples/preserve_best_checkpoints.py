"""Keep the best checkpoints of a run, in addition to the last ones.

    python examples/preserve_best_checkpoints.py --output_dir out --max_steps 160 --save_steps 20 \\
        --save_total_limit 1 --eval_on_save --preserve_best_model --preserve_n_best 3 \\
        --learning_rate 1e-2 --lr_scheduler_type constant --use_cpu --report_to none

Every checkpoint is evaluated before it is saved. At the end the last one and the best three are on
disk, and no other.
"""

from __future__ import annotations

from python_corpus import read_texts, small_llama, tokenize_and_pack
from recipe import FaultArguments, parse, train_and_report

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments, find_checkpoints


def main() -> None:
    """Train a small language model on few texts, so that its evaluation loss rises again."""
    _, args = parse(FaultArguments, DivGuardTrainingArguments)
    train_data, eval_data = tokenize_and_pack(
        read_texts(limit=4_000), vocabulary=300, block=32, eval_blocks=16, seed=args.seed
    )
    trainer = DivGuardTrainer(
        model=small_llama(vocabulary=300, block=32, hidden=128, layers=2, seed=args.seed),
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
    )
    train_and_report(trainer)
    if trainer.is_world_process_zero():
        for checkpoint in find_checkpoints(args.output_dir):
            print(f"on disk: step {checkpoint.step}  {checkpoint.metric_name} {checkpoint.metric:.4f}")


if __name__ == "__main__":
    main()
