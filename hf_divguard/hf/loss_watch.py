"""Brings the raw losses of a run to the detectors that take them."""

from __future__ import annotations

from typing import Any

import torch

from hf_divguard.hf.adaptive_detectors import RawLossDetector
from hf_divguard.hf.loss_tap import LossTap, StepValues

__all__ = ["LossWatch"]


class LossWatch:
    """Taps the loss of every step while a detector takes it; does nothing otherwise.

    The losses are looked at every ``check_steps`` steps, and before the host logs,
    evaluates, saves or stops, so that what it does then can still be decided.

    Args:
        trainer: The trainer.
        check_steps: Optimizer steps between two looks.
    """

    def __init__(self, trainer: Any, check_steps: int) -> None:
        self._trainer = trainer
        self._detectors: list[RawLossDetector] = []
        has_scaler = getattr(trainer.accelerator, "scaler", None) is not None
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, RawLossDetector):
                callback.use_raw_losses(has_loss_scaler=has_scaler)
                if callback.takes_raw_losses:
                    self._detectors.append(callback)
        self._tap = LossTap(check_steps, trainer.args.world_size) if self._detectors else None
        self._last_step = 0

    def start(self, step: int) -> None:
        """Begin at ``step``, with nothing collected."""
        self._last_step = step
        if self._tap is not None:
            self._tap.start(step)

    def add_micro_batch(self, loss: torch.Tensor) -> None:
        """Take the loss of one micro-batch."""
        if self._tap is not None:
            self._tap.add_micro_batch(loss)

    def end_step(self, grad_norm: Any) -> list[StepValues] | None:
        """Close the step under way and, where a look is due, show the losses to the detectors.

        Returns:
            What was looked at; ``None`` if no look was due. The same on every rank.
        """
        if self._tap is None:
            return None
        trainer, step = self._trainer, self._trainer.state.global_step
        if step > self._last_step:
            self._tap.end_step(step, grad_norm)
            self._last_step = step
        control = trainer.control
        host_acts = (
            control.should_log
            or control.should_evaluate
            or control.should_save
            or control.should_training_stop
        )
        if not (host_acts or self._tap.is_due(step)):
            return None
        values = self._tap.drain(step)
        if values:
            for detector in self._detectors:
                detector.on_raw_losses(values, trainer.args, trainer.state, control)
        return values
