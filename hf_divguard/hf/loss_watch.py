"""Brings the raw losses of a run to the detectors that take them."""

from __future__ import annotations

from typing import Any

import torch

from hf_divguard.hf.adaptive_detectors import RawLossDetector
from hf_divguard.hf.loss_tap import LossTap, StepValues

__all__ = ["LossWatch"]


class LossWatch:
    """Taps the loss of every step while somebody takes it; does nothing otherwise.

    The losses are looked at every ``check_steps`` steps, and before the host logs,
    evaluates, saves or stops, so that what it does then can still be decided.

    Args:
        trainer: The trainer.
        check_steps: Optimizer steps between two looks.
        always: Tap the losses even if no detector takes them; :meth:`end_step` returns them.
    """

    def __init__(self, trainer: Any, check_steps: int, *, always: bool = False) -> None:
        self._trainer = trainer
        self._detectors: list[RawLossDetector] = []
        has_scaler = _scales_losses(trainer.accelerator)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, RawLossDetector):
                callback.use_raw_losses(has_loss_scaler=has_scaler)
                if callback.takes_raw_losses:
                    self._detectors.append(callback)
        is_needed = always or bool(self._detectors)
        self._tap = LossTap(check_steps, trainer.args.world_size) if is_needed else None
        self._last_step = 0

    def start(self, step: int) -> None:
        """Begin at ``step``, with nothing collected."""
        self._last_step = step
        if self._tap is not None:
            self._tap.start(step)

    def release(self) -> None:
        """Give the detectors back: with a stock Trainer they work on logs again."""
        for detector in self._detectors:
            detector.use_logs()

    def begin_epoch(self) -> None:
        """Note that an epoch begins."""
        if self._tap is not None:
            self._tap.begin_epoch()

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
        step = self._trainer.state.global_step
        if step > self._last_step:  # at the end of an epoch the host comes here twice in one step
            self._tap.end_step(step, grad_norm)
            self._last_step = step
        control = self._trainer.control
        if (
            control.should_log
            or control.should_evaluate
            or control.should_save
            or control.should_training_stop
            or self._tap.is_due(step)
        ):
            return self.look()
        return None

    def look(self) -> list[StepValues]:
        """Show the losses collected so far to the detectors. All ranks call it at the same step."""
        if self._tap is None:
            return []
        trainer = self._trainer
        values = self._tap.drain(trainer.state.global_step)
        if values:
            for detector in self._detectors:
                detector.on_raw_losses(values, trainer.args, trainer.state, trainer.control)
        return values


def _scales_losses(accelerator: Any) -> bool:
    """Return whether a loss scaler is at work: accelerate's own, or in fp16 that of an engine like DeepSpeed."""
    return (
        getattr(accelerator, "scaler", None) is not None
        or getattr(accelerator, "mixed_precision", "no") == "fp16"
    )
