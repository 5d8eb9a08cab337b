"""Signals that ask a run to save and end, as a scheduler sends them before it kills a job."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from hf_divguard.errors import INTERRUPTED_EXIT_CODE
from hf_divguard.hf import control as switches
from hf_divguard.hf.host import Host
from hf_divguard.hf.ranks import Ranks

__all__ = ["Interruption"]

logger = logging.getLogger(__name__)


class Interruption:
    """Saves at the end of a step and ends training if a signal has asked for it, on all ranks alike.

    Args:
        host: The host.
        ranks: The processes of the run.
        names: Names of the signals, the same on all ranks.
    """

    def __init__(self, host: Host, ranks: Ranks, names: tuple[str, ...]) -> None:
        self._host = host
        self._ranks = ranks
        self._names = names
        self._received = 0
        self._saved: str | None = None
        self.by: str | None = None
        """Name of the signal that ends the run; ``None`` as long as none does."""
        self.adds_save = False
        """Whether the save is there for the signal alone: a run that is not cut does not evaluate at this step."""
        self.is_done = False
        """Whether the step that was saved for a signal has ended."""
        self.is_at_epoch_end = False
        """Whether the host is between the last step of an epoch and the next one."""

    def listen(self, stack: contextlib.ExitStack) -> None:
        """Install the handlers; those from before are put back when ``stack`` is closed."""
        if not self._names:
            return
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "`divguard_save_on_signal` needs training to run in the main thread, where Python handles signals; "
                "here it runs in %s, and the signals do what they did before.",
                threading.current_thread().name,
            )
            return
        for number, name in enumerate(self._names, start=1):
            which = getattr(signal, name)
            before = signal.signal(which, self._handler(number))
            # A handler that was not installed from Python is `None`, and cannot be put back.
            stack.callback(signal.signal, which, signal.SIG_DFL if before is None else before)

    def _handler(self, number: int) -> Callable[[int, FrameType | None], None]:
        process = os.getpid()

        def handle(signum: int, frame: FrameType | None) -> None:
            # Only noted: the step that is under way is finished first. A fork, as of a data loader, takes no part.
            if os.getpid() == process:
                self._received = self._received or number

        return handle

    def check(self) -> None:
        """At the end of a step: if any rank has got a signal, have this step saved and end training. On all ranks.

        The last step of an epoch is saved after the end of the epoch, whose evaluation and log
        would be missing in the resumed run otherwise.
        """
        state, control = self._host.state, self._host.control
        if not self._names or self.by is not None or self._waits_for_epoch_end(state):
            return
        number = self._ranks.largest(self._received)
        if not number or state.global_step >= state.max_steps:
            return
        self.by = self._names[number - 1]
        self.adds_save = not control.should_save
        switches.save_and_end(control)

    def _waits_for_epoch_end(self, state: Any) -> bool:
        return not self.is_at_epoch_end and float(state.epoch or 0.5).is_integer()

    def note_host_save(self) -> None:
        """Note that the host saves on SIGTERM by itself (``enable_jit_checkpoint``)."""
        if self._host.state.global_step < self._host.state.max_steps:
            self.by = self.by or "SIGTERM"

    def note_saved(self, path: str | None) -> None:
        """Note where the step was saved; ``None`` if it was not."""
        if self.by is None:
            return
        self._saved = path or self._saved
        if self._ranks.rank != 0:
            return
        step = self._host.state.global_step
        if path is None:
            what = f"but step {step} could not be saved: the newest checkpoint from before counts"
        else:
            what = f"and step {step} was saved to {path}"
        logger.warning(
            "%s was received, %s. Training ends with exit code %d; continue with resume_from_checkpoint='latest'.",
            self.by,
            what,
            INTERRUPTED_EXIT_CODE,
        )

    def end_step(self) -> None:
        """After the host has acted on a step."""
        self.is_done = self.by is not None and bool(self._names)

    def end_process(self) -> None:
        """End the process with an exit code of its own if a signal has ended the run.

        Raises:
            SystemExit: With :data:`INTERRUPTED_EXIT_CODE`, when all ranks are ready to end.
        """
        if self.by is None:
            return
        # A launcher kills the other ranks as soon as one has ended.
        self._ranks.gather(None)
        raise SystemExit(INTERRUPTED_EXIT_CODE)
