"""Two detectors together, a rule of your own, and a callback of your own that survives a resume.

    python examples/advanced_detectors.py --output_dir out --max_steps 60 --save_steps 20 \\
        --learning_rate 2e-3 --logging_steps 5 --eval_strategy steps --eval_steps 10 \\
        --fault learning_rate --fault_step 40 --use_cpu --report_to none

Three detectors watch: ``adaptive`` the loss of every step, ``ema`` the evaluation loss, and
``GradientLimit``, which is defined here, the gradient norm. ``TokenCounter`` counts the tokens of
the run. Its count continues with ``--resume_from_checkpoint latest``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from python_corpus import read_texts, small_llama, tokenize_and_pack
from recipe import Fault, FaultArguments, parse, train_and_report
from transformers import TrainerCallback

from hf_divguard import (
    AdaptiveDivergenceDetector,
    DivergenceDetector,
    DivGuardTrainer,
    DivGuardTrainingArguments,
    DualTimeScaleDivergenceDetector,
    Finding,
)


@dataclass
class GradientLimit:
    """A rule of your own: the gradient norm is above a limit several times in a row.

    Args:
        limit: Largest gradient norm that is accepted.
        patience: Number of values in a row above ``limit`` that are a finding.
    """

    limit: float = 50.0
    patience: int = 2
    metric_key: str = "grad_norm"
    name: ClassVar[str] = "gradient_limit"

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything that was observed."""
        self.above = 0
        self.since = 0

    def observe(self, step: int, value: float) -> Finding | None:
        """Return a finding once ``patience`` values in a row are above the limit."""
        if value <= self.limit:
            self.above = 0
            return None
        self.above += 1
        self.since = step if self.above == 1 else self.since
        if self.above != self.patience:
            return None
        return Finding(
            step=step,
            onset_step=self.since,
            kind="jump",
            severity="error",
            metric=self.metric_key,
            value=value,
            limit=self.limit,
            message=f"`{self.metric_key}` = {value:.4g} at step {step} is above {self.limit:g} since step {self.since}.",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was observed, as JSON values."""
        return {"above": self.above, "since": self.since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.above, self.since = int(state_dict["above"]), int(state_dict["since"])


class TokenCounter(TrainerCallback):
    """A callback of your own with a state. The two methods at the end are all that is needed.

    Args:
        tokens_per_step: Number of tokens of one step.
    """

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.tokens = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the tokens of the step."""
        self.tokens += self.tokens_per_step

    def state_dict(self) -> dict[str, Any]:
        """Return the count; it is kept in every checkpoint."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the count of the checkpoint from which training is resumed."""
        self.tokens = state_dict["tokens"]


def main() -> None:
    """Train with all of them."""
    fault, args = parse(FaultArguments, DivGuardTrainingArguments)
    block = 32
    train_data, eval_data = tokenize_and_pack(
        read_texts(limit=300_000), vocabulary=300, block=block, eval_blocks=32, seed=args.seed
    )
    detectors = [
        AdaptiveDivergenceDetector(action="stop"),
        DualTimeScaleDivergenceDetector(short_alpha=0.5, long_alpha=0.1, threshold=0.5, action="warn"),
        DivergenceDetector(GradientLimit(), action="warn", metric_key="grad_norm", name="GradientLimit"),
    ]
    counter = TokenCounter(tokens_per_step=args.train_batch_size * block)
    trainer = DivGuardTrainer(
        model=small_llama(vocabulary=300, block=block, hidden=64, layers=1, seed=args.seed),
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        callbacks=[Fault(fault), counter, *detectors],
    )
    train_and_report(trainer)
    for detector in detectors:
        for finding in detector.findings:
            print(f"{detector.name or type(detector).__name__} ({detector.action}): {finding.message}")
    print(f"tokens: {counter.tokens:,}")


if __name__ == "__main__":
    main()
