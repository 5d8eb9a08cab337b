"""The training loss since the last log, carried over a resume so that the next log is the one of an uncut run."""

from __future__ import annotations

from typing import Any

import torch

from hf_divguard.hf.ranks import Ranks

__all__ = ["RUNNING_LOSS", "RunningLoss"]

RUNNING_LOSS = "divguard_running_loss"
"""Name under which it is kept among the states of callbacks."""


class RunningLoss:
    """Keeps what the host forgets: the losses of the steps between the last log and a save.

    The host logs the mean since the last log. After a resume in between it would be the mean
    of fewer steps, and a detector would see another value than in a run that was never cut.

    Args:
        trainer: The trainer.
        ranks: The processes of the run.
    """

    def __init__(self, trainer: Any, ranks: Ranks) -> None:
        self._trainer = trainer
        self._ranks = ranks
        self._sum: torch.Tensor | None = None
        self._step = -1
        self._to_add = 0.0

    def end_step(self, tr_loss: torch.Tensor, step: int) -> None:
        """Note the host's running sum at the end of ``step``, before the host logs."""
        if self._to_add:
            tr_loss += self._to_add
            self._to_add = 0.0
        self._sum, self._step = tr_loss.detach().clone(), step

    def collect(self) -> dict[str, Any] | None:
        """Return what the next log needs, ``None`` if the host has just logged. Called by all ranks."""
        trainer = self._trainer
        step, last_logged = trainer.state.global_step, trainer._globalstep_last_logged
        if (
            self._sum is None
            or self._step != step
            or last_logged >= step
            or trainer.args.logging_strategy == "no"
        ):
            return None
        return {"last_logged_step": last_logged, "sums": self._ranks.gather(float(self._sum.item()))}

    def restore(self, kept: dict[str, Any] | None) -> None:
        """Take over what ``collect`` gave, before the first step of a resumed run."""
        if not isinstance(kept, dict):
            return
        trainer, sums = self._trainer, kept["sums"]
        own = sums[self._ranks.rank] if len(sums) == self._ranks.world_size else sum(sums) / len(sums)
        trainer._globalstep_last_logged = kept["last_logged_step"]
        # The host's mean over the steps of this call of `train()` is to stay one.
        trainer._total_loss_scalar -= own
        running = getattr(trainer, "_tr_loss", None)
        if isinstance(running, torch.Tensor):
            running += own
        else:  # until 5.0 the sum is a local of the host's loop
            self._to_add = own
