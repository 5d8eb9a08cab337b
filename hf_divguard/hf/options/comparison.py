"""The options of the comparison of weights, and of updates that are not finite."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hf_divguard.hf.options.values import require_bool, require_choice, require_whole

__all__ = ["ComparisonOptions"]


@dataclass(repr=False, eq=False)
class ComparisonOptions:
    """What is compared before a detector acts, and what never reaches the weights."""

    divguard_compare: Literal["auto", "off"] = field(
        default="auto",
        metadata={
            "help": "Before divguard_action is taken because of the level of a loss, compare kept with present weights "
            "on the coming batches. auto: act only if the kept ones do better there; off: the curve alone decides."
        },
    )
    divguard_compare_memory_gb: float = field(
        default=5.0,
        metadata={
            "help": "CPU memory in GB that the kept states may take, above 0. They are four: of trained parameters and "
            "buffers, and with rollback of the optimizer, which is left out where it does not fit."
        },
    )
    divguard_eval_arbiter: bool = field(
        default=False,
        metadata={
            "help": "Let the evaluation set decide on data that stay bad: with rollback when they have passed or "
            "training ends, with stop or abort after some looks, it is acted on if kept weights do clearly better on "
            "up to 16 batches. Off by default, because new data may rightly make an old evaluation set worse."
        },
    )
    divguard_skip_suspect_rows: bool = field(
        default=False,
        metadata={
            "help": "On a resume, leave the rows of the dataset out that events of the run name as suspect: "
            "dataset_index in divguard/events.jsonl. The dataset must be the same. Their batches are smaller by them."
        },
    )
    divguard_skip_nonfinite: bool = field(
        default=True,
        metadata={
            "help": "Skip the update of a step whose loss or gradient is not finite, wherever a detector is on. The data "
            "and the learning rate continue. With false such an update reaches the weights."
        },
    )
    divguard_max_skipped_in_a_row: int = field(
        default=10,
        metadata={
            "help": "How many updates in a row divguard_skip_nonfinite may skip, at least 1; with the next one "
            "divguard_action is taken."
        },
    )

    def _check_values(self) -> None:
        require_choice("divguard_compare", self.divguard_compare, Literal["auto", "off"])
        require_bool("divguard_skip_nonfinite", self.divguard_skip_nonfinite)
        require_bool("divguard_eval_arbiter", self.divguard_eval_arbiter)
        require_bool("divguard_skip_suspect_rows", self.divguard_skip_suspect_rows)
        require_whole(
            "divguard_max_skipped_in_a_row", self.divguard_max_skipped_in_a_row, "updates", at_least=1
        )
        memory_gb = self.divguard_compare_memory_gb
        if not isinstance(memory_gb, (int, float)) or isinstance(memory_gb, bool) or not memory_gb > 0.0:
            raise ValueError(
                f"`divguard_compare_memory_gb` must be a number of GB above 0, got {memory_gb!r}."
            )
