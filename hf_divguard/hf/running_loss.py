"""The host's sum of the losses since its last log: kept over a resume, dropped by a rollback."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from hf_divguard.core.state import StateError, decode
from hf_divguard.hf.host import Host
from hf_divguard.hf.ranks import Ranks

__all__ = ["RUNNING_LOSS", "PendingLoss", "RunningLoss"]

logger = logging.getLogger(__name__)

RUNNING_LOSS = "divguard_running_loss"
"""Name under which :class:`RunningLoss` is kept among the states of callbacks."""


class RunningLoss:
    """Keeps the losses of the steps between the last log and a save, which the host forgets.

    The host logs the mean since the last log. After a resume in between it would be the mean
    of fewer steps, and a detector would see another value than in a run without interruption.

    Args:
        host: The host.
        ranks: The processes of the run.
    """

    def __init__(self, host: Host, ranks: Ranks) -> None:
        self._host = host
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
        step, last_logged = self._host.state.global_step, self._host.last_logged_step
        is_pending = self._sum is not None and self._step == step and last_logged < step
        if not is_pending or self._host.args.logging_strategy == "no":
            return None
        assert self._sum is not None
        return {"last_logged_step": last_logged, "sums": self._ranks.gather(float(self._sum.item()))}

    def restore(self, kept: Any) -> None:
        """Take over what ``collect`` gave, before the first step of a resumed run.

        What cannot be read costs only the mean of the first log.
        """
        try:
            last_logged, sums = decode(
                tuple[int, list[float]], [kept["last_logged_step"], kept["sums"]], "It"
            )
        except (StateError, KeyError, TypeError):
            sums = []
        if not sums:
            if kept is not None:
                logger.warning(
                    "The loss since the last log in the checkpoint cannot be read; it is left out."
                )
            return
        own = sums[self._ranks.rank] if len(sums) == self._ranks.world_size else sum(sums) / len(sums)
        self._host.last_logged_step = last_logged
        # The host's mean over the steps of this call of `train()` is to stay one.
        self._host.total_loss -= own
        self._to_add = self._host.add_to_running_loss(own)


class PendingLoss:
    """Drops the losses that wait for the next log, where a rollback undoes their steps.

    Args:
        host: The host.
        ranks: The processes of the run.
    """

    def __init__(self, host: Host, ranks: Ranks) -> None:
        self._host = host
        self._ranks = ranks
        self._finite_total = 0.0
        self._last_not_finite = -1

    def note(self, step: int, loss: float) -> None:
        """Note the raw loss of ``step``: the host's filter puts another number in the place of a NaN."""
        if not math.isfinite(loss):
            self._last_not_finite = step

    def end_step(self) -> None:
        """At the end of a step: note the sum of the logged losses while it is finite."""
        if math.isfinite(self._host.total_loss):
            self._finite_total = self._host.total_loss

    def drop(self, tr_loss: torch.Tensor) -> float | None:
        """Drop what waits. Called by all ranks.

        Args:
            tr_loss: The host's running sum of losses.

        Returns:
            Mean loss of the steps since the last log; ``None`` if there is none, if it is not
            finite, or if a filter has put another number in the place of a NaN.
        """
        host, ranks = self._host, self._ranks
        is_usable = self._last_not_finite <= host.last_logged_step
        n_steps = host.state.global_step - host.last_logged_step
        losses = ranks.gather(float(tr_loss.item()))
        pending = sum(losses) / len(losses)
        tr_loss.zero_()
        host.last_logged_step = host.state.global_step
        if not math.isfinite(host.total_loss):
            host.total_loss = self._finite_total
        if n_steps <= 0 or not is_usable or not math.isfinite(pending):
            return None
        host.total_loss += pending
        return pending / n_steps
