"""The callbacks of one run: which keep a state, which take raw losses, and in which order they are called."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from hf_divguard.hf.callback_state import (
    StandaloneStateKeeper,
    collect_states,
    named_callbacks,
    restore_states,
)
from hf_divguard.hf.detectors import DivergenceDetector, RawLossDetector
from hf_divguard.hf.host import Host
from hf_divguard.hf.losses import StepLosses

__all__ = ["RunCallbacks"]


class RunCallbacks:
    """Takes the callbacks over for one ``train()`` call and gives them back at its end.

    Args:
        host: The host.
        stack: What is switched for the run is switched back when this stack is closed.
        losses: The raw losses; detectors that take them subscribe.
        initial_states: State of each stateful callback before its first training; a callback
            that is not in here trains for the first time.
    """

    def __init__(
        self, host: Host, stack: contextlib.ExitStack, losses: StepLosses, initial_states: dict[str, Any]
    ) -> None:
        self._host = host
        self._stack = stack
        self._losses = losses
        self._known: list[Any] = []
        self._resumed: dict[str, Any] | None = None
        for callback in host.callbacks:
            self._take_over(callback)
        self.stateful = named_callbacks(host.callbacks)
        new = {name: each for name, each in self.stateful.items() if name not in initial_states}
        self._before = {name: initial_states[name] for name in self.stateful if name in initial_states}
        # A copy: many a callback returns the very lists that it goes on filling.
        self.initial_states = {**copy.deepcopy(collect_states(new)), **initial_states}

    def _take_over(self, callback: Any) -> None:
        self._known.append(callback)
        keeper = getattr(callback, "state_keeper", None)
        if isinstance(keeper, StandaloneStateKeeper):
            self._stack.enter_context(keeper.handed_over())
        if isinstance(callback, RawLossDetector):
            callback.use_raw_losses(has_loss_scaler=self._host.scales_losses)
            self._stack.callback(callback.use_logs)
            if callback.takes_raw_losses:
                self._losses.subscribe(callback)

    @property
    def detectors(self) -> dict[str, DivergenceDetector]:
        """The detectors by the names under which their states are kept."""
        return {name: each for name, each in self.stateful.items() if isinstance(each, DivergenceDetector)}

    def restore(self, resumed: dict[str, Any] | None) -> None:
        """Give the callbacks their states: from the resumed checkpoint, or as before their first training."""
        restore_states({name: self.stateful[name] for name in self._before}, self._before)
        self._resumed = resumed
        if resumed is not None:
            restore_states(self.stateful, resumed)

    def collect(self) -> dict[str, Any]:
        """Return the states of the callbacks."""
        return collect_states(self.stateful)

    def put_last(self, own: Any) -> None:
        """Put ``own`` behind callbacks that were added after it, and take those over.

        ``own`` sees each event after the others have dealt with it. Not to be called while an
        event is being handled: the host goes through the list by position.
        """
        callbacks = self._host.callbacks
        callbacks.remove(own)
        callbacks.append(own)
        known = {id(callback) for callback in self._known}
        new = [callback for callback in callbacks[:-1] if id(callback) not in known]
        for callback in new:
            self._take_over(callback)
        named = named_callbacks(callbacks[:-1])
        added = {name: each for name, each in named.items() if any(each is one for one in new)}
        self.stateful = named
        if self._resumed is not None:
            restore_states(added, self._resumed)
