"""The host's events, brought to the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from hf_divguard.hf.engines import engine_of

if TYPE_CHECKING:
    from hf_divguard.hf.run import GuardedRun

__all__ = ["RunEvents"]


class RunEvents(TrainerCallback):
    """Brings the host's events to a run. It stands last, so that it sees them after the other callbacks."""

    def __init__(self, run: GuardedRun) -> None:
        self._run = run
        self._host_measures_gradients = True
        self._own_gradient_norm: Any = None

    def gradient_norm_of_step(self, host_norm: Any) -> Any:
        """Return the gradient norm of the step that ends: the host's, or our own where the host has none."""
        self._host_measures_gradients = host_norm is not None
        own = self._own_gradient_norm
        return (self._run.skipping.gradient_norm if own is None else own) if host_norm is None else host_norm

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the run."""
        self._run.begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that an epoch begins; a run that had ended before ends here again."""
        self._run.losses.begin_epoch()
        self._run.interruption.is_at_epoch_end = False
        self._run.ending.end_at_once()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that an epoch has ended."""
        self._run.interruption.is_at_epoch_end = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what is not finite; lower a rate that rises again after a rollback; measure gradients if need be."""
        self._run.skipping.drop_gradients()
        rollback = self._run.rollback
        if rollback is not None:
            if not self._run.updates_in_backward:
                rollback.rewarming.hold_back(self._run.host, state.global_step)
            if not self._host_measures_gradients and rollback.watches_gradients:
                self._own_gradient_norm = engine_of(self._run.host).gradient_norm()
        self._run.reporting.recent.note_rate(state.global_step + 1, self._run.host.first_rate)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the schedule its learning rate back."""
        if self._run.rollback is not None:
            self._run.rollback.rewarming.release(self._run.host)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the end of the run."""
        self._run.finish()
