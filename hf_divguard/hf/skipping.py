"""Keeps gradients that are not finite from the optimizer, without a further wait for the device."""

from __future__ import annotations

import ctypes
import logging
import math
from typing import Any

import torch

from hf_divguard.core.detection.detector import StepValues
from hf_divguard.core.findings import json_number
from hf_divguard.hf.engines import engine_of
from hf_divguard.hf.engines.tensors import local_part
from hf_divguard.hf.host import Host
from hf_divguard.hf.journal import RunJournal
from hf_divguard.hf.ranks import Ranks

__all__ = ["NonFiniteUpdates"]

logger = logging.getLogger(__name__)


class NonFiniteUpdates:
    """Leaves out the update of a step whose loss or gradient is not finite.

    After the backward pass one flag is computed on the device. How it is used depends on
    whether the host waits for the device in each step anyway, to filter losses
    (``logging_nan_inf_filter``, the default):

    - If it does, the flag is copied before that wait, and is on the host when it ends. The
      gradients are dropped, and every optimizer passes over parameters without a gradient:
      neither momentum nor weight decay act.
    - If it does not, the gradients are set to zero on the device. Momentum and weight decay
      act as in any step, without what was not finite.

    With several ranks the gradient decides, which is the same on all of them. Where a
    gradient scaler is at work, the scaler leaves out the update; under DeepSpeed its engine does.
    Then it is only reported here.

    Args:
        host: The host.
        ranks: The processes of the run.
        is_wanted: Whether updates are to be left out.
        max_in_a_row: Updates that may be left out one after the other, until a detector reports
            an error. So many have an event of their own.
    """

    journal: RunJournal
    """Gets an event for each update that was left out."""

    def __init__(self, host: Host, ranks: Ranks, *, is_wanted: bool, max_in_a_row: int) -> None:
        self._host, self._ranks = host, ranks
        self.max_in_a_row = max_in_a_row
        self._engine = engine_of(host)
        reason = self._engine.why_nothing_skipped()
        self.is_on = is_wanted and reason is None
        self._leaves_to_scaler = host.scales_losses
        self._is_done_elsewhere = self._leaves_to_scaler or self._engine.skips_by_itself
        self.total = 0
        """Updates left out in this run, as far as the losses were delivered."""
        self._in_a_row = 0
        self._loss: torch.Tensor | None = None
        self._flag: torch.Tensor | None = None
        self._on_host = torch.zeros(2, dtype=torch.float32, pin_memory=torch.cuda.is_available())
        # Reading this is reading memory of the host; nothing is asked of a device.
        self._as_seen = (ctypes.c_float * 2).from_address(self._on_host.data_ptr())
        self.seen: tuple[float, float] | None = None
        """Loss and gradient norm of the present step on this rank, where the host sees them without a wait."""
        self.gradient_norm: torch.Tensor | None = None
        """Norm of the gradients of this step before clipping."""
        if is_wanted and not self.is_on and ranks.rank == 0:
            logger.warning(
                "`divguard_skip_nonfinite` does not work with %s. Set it to false to leave this line out.",
                reason,
            )

    def begin(self, step: int) -> None:
        """Count on from the events of a run that is resumed at ``step``."""
        events = [each for each in self.journal.events if each["event"] == "update_skipped"]
        if events:
            self.total = events[-1]["number"]
            self._in_a_row = events[-1]["in_a_row"] if events[-1]["step"] == step else 0

    def after_micro_batch(self, loss: torch.Tensor) -> None:
        """Compute the flag when the gradients of a step are complete, and send it to the host."""
        if not self.is_on or self._is_done_elsewhere:
            return
        loss = loss.detach()
        self._loss = loss.clone() if self._loss is None else self._loss + loss
        if not self._host.completes_step:
            return
        self.gradient_norm = self._engine.gradient_norm()
        flag = torch.isfinite(self._loss if self.gradient_norm is None else self.gradient_norm)
        if self._ranks.world_size == 1 and self.gradient_norm is not None:
            flag = flag & torch.isfinite(self._loss).to(flag.device)
        if self._host_sees_the_flag(flag):
            norm = self._loss if self.gradient_norm is None else self.gradient_norm
            both = torch.stack([self._loss.float().reshape(()), norm.float().to(self._loss.device)])
            self._on_host.copy_(both, non_blocking=both.is_cuda)
        self._loss, self._flag = None, flag

    def _host_sees_the_flag(self, flag: torch.Tensor) -> bool:
        return not flag.is_cuda or bool(self._host.args.logging_nan_inf_filter)

    def drop_gradients(self) -> bool:
        """Before the optimizer's step, drop gradients that are not finite.

        Returns:
            Whether it is known that they were dropped.
        """
        flag, self._flag, self.seen = self._flag, None, None
        if flag is None:
            return False
        if self._host_sees_the_flag(flag):
            loss, norm = self.seen = self._as_seen[0], self._as_seen[1]
            if math.isfinite(norm) and (math.isfinite(loss) or self._ranks.world_size > 1):
                return False
            for weight in self._host.model.parameters():
                weight.grad = None
            return True
        bad = ~flag
        for weight in self._host.model.parameters():
            if weight.grad is not None:
                part = local_part(weight.grad)
                part.masked_fill_(bad.to(part.device), 0.0)
        return False

    def on_raw_losses(self, values: list[StepValues], args: Any, state: Any, control: Any) -> None:
        """Count and report the updates that were left out."""
        for entry in values if self.is_on else ():
            norm_is_bad = entry.grad_norm is not None and not math.isfinite(entry.grad_norm)
            if not norm_is_bad and (math.isfinite(entry.loss) or self._ranks.world_size > 1):
                self._in_a_row = 0
                continue
            if norm_is_bad and self._leaves_to_scaler and math.isfinite(entry.loss):
                continue  # how a scaler finds its scale
            self._in_a_row += 1
            self.total += 1
            if self._in_a_row <= self.max_in_a_row:
                self._report(entry)

    def _report(self, entry: StepValues) -> None:
        self.journal.add(
            {
                "event": "update_skipped",
                "number": self.total,
                "step": entry.step,
                "onset_step": entry.step - self._in_a_row + 1,
                "in_a_row": self._in_a_row,
                "loss": json_number(entry.loss),
                "grad_norm": None if entry.grad_norm is None else json_number(entry.grad_norm),
            }
        )
        # One line for the 1st, 2nd, 4th, 8th...: a bad row may come again in every epoch.
        if self._ranks.rank == 0 and self.total & (self.total - 1) == 0:
            logger.warning(
                "The update of step %d was skipped: its loss is %.6g and its gradient norm %s (skipped so far: %d).",
                entry.step,
                entry.loss,
                "unknown" if entry.grad_norm is None else f"{entry.grad_norm:.6g}",
                self.total,
            )

    def weights_are_finite(self) -> bool:
        """Return whether all weights of this rank are: else leaving out updates does not help."""
        return self._engine.weights_are_finite()
