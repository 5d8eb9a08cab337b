"""Checks that the Trainer has what the guards take part in, where its version was not tested."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Iterable

import transformers
from transformers import Trainer

from hf_divguard.errors import DivGuardError

__all__ = ["NEWEST_TESTED", "OLDEST_TESTED", "SEAMS", "check_host", "missing_seams"]

logger = logging.getLogger(__name__)

OLDEST_TESTED = (4, 57)
NEWEST_TESTED = (5, 24)
"""First two numbers of the versions of Transformers with which the tests were run."""

SEAMS = (
    "_determine_best_metric",
    "_evaluate",
    "_get_learning_rate",
    "_get_output_dir",
    "_inner_training_loop",
    "_load_best_model",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_load_scaler",
    "_maybe_log_save_evaluate",
    "_prepare_inputs",
    "_push_from_checkpoint",
    "_save",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "get_batch_samples",
    "get_train_dataloader",
    "training_step",
)
"""Methods of the Trainer that the guards extend or call, in every version that was tested."""


def missing_seams(trainer_class: type, names: Iterable[str] = SEAMS) -> list[str]:
    """Return the methods that ``trainer_class`` does not have, or that its code never calls.

    Example:
        >>> missing_seams(Trainer), missing_seams(Trainer, ["training_step", "train_a_step"])
        ([], ['train_a_step'])
    """
    source = inspect.getsource(inspect.getmodule(trainer_class) or trainer_class)
    return [
        name
        for name in names
        if not hasattr(trainer_class, name) or not re.search(rf"\bself\.{name}\b\(?", source)
    ]


def check_host(version: str = transformers.__version__) -> None:
    """Raise if a Transformers that was not tested lacks what the guards need; warn once if it has it.

    Args:
        version: Version of Transformers.

    Raises:
        DivGuardError: If a method is missing. Without it a guard would be silent.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not OLDEST_TESTED <= numbers <= NEWEST_TESTED:
        _check_untested(version)


@functools.cache
def _check_untested(version: str) -> None:
    tested = f"Transformers {_text(OLDEST_TESTED)} to {_text(NEWEST_TESTED)}"
    missing = missing_seams(Trainer)
    if missing:
        raise DivGuardError(
            f"hf_divguard was tested with {tested}, found {version}, whose Trainer no longer has or calls "
            f"{', '.join(f'`{name}`' for name in missing)}. Training would not be guarded. Install a version of "
            "Transformers in this range, or a newer hf_divguard."
        )
    logger.warning(
        "hf_divguard was tested with %s, found %s. The %d methods that the guards need are there. Please report what "
        "does not work.",
        tested,
        version,
        len(SEAMS),
    )


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
