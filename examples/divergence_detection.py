"""Detect a divergence and stop, or roll back and train on; a flag makes the run diverge.

    python examples/divergence_detection.py --output_dir out --max_steps 120 --save_steps 10 \\
        --fault learning_rate --fault_step 60 \\
        --divguard_detector adaptive --divguard_action rollback \\
        --learning_rate 2e-3 --max_grad_norm 0 --use_cpu --report_to none

With ``--divguard_action stop`` the run ends soon after step 60 instead, and the last lines of its log
name the checkpoint to resume from. With ``--divguard_detector none`` nothing notices the fault.
"""

from __future__ import annotations

from python_corpus import read_texts, small_llama, tokenize_and_pack
from recipe import Fault, FaultArguments, parse, train_and_report

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments


def main() -> None:
    """Train a small language model; the flags choose the fault, the detector and the action."""
    fault, args = parse(FaultArguments, DivGuardTrainingArguments)
    train_data, eval_data = tokenize_and_pack(
        read_texts(limit=300_000), vocabulary=300, block=32, eval_blocks=32, seed=args.seed
    )
    trainer = DivGuardTrainer(
        model=small_llama(vocabulary=300, block=32, hidden=64, layers=1, seed=args.seed),
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        callbacks=[Fault(fault)],
    )
    train_and_report(trainer)


if __name__ == "__main__":
    main()
