"""The callbacks of a run: their order, their names, and their states in the sidecar of a checkpoint."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hf_divguard.core.outcome import RunOutcome
from hf_divguard.hf.control import outcome_of
from hf_divguard.hf.host import Host
from hf_divguard.hf.losses import LossListener, StepLosses
from hf_divguard.hf.skipping import NonFiniteUpdates
from hf_divguard.storage.jsonio import to_strict
from hf_divguard.storage.names import SIDECAR_NAME, checkpoint_name
from hf_divguard.storage.quarantine import quarantine_note
from hf_divguard.storage.sidecar import Sidecar, SidecarError, read_sidecar, write_sidecar

__all__ = [
    "RunCallbacks",
    "StandaloneStateKeeper",
    "collect_states",
    "has_foreign",
    "is_stateful",
    "named_callbacks",
    "read_callback_states",
    "restore_states",
]

logger = logging.getLogger(__name__)


def is_stateful(callback: Any) -> bool:
    """Return whether ``callback`` follows PyTorch's ``Stateful`` protocol."""
    return callable(getattr(callback, "state_dict", None)) and callable(
        getattr(callback, "load_state_dict", None)
    )


def has_foreign(callbacks: Iterable[Any]) -> bool:
    """Return whether a callback is neither the host's nor ours: it may ask for a save on one rank alone."""
    return any(
        type(each).__module__.partition(".")[0] not in ("transformers", "hf_divguard") for each in callbacks
    )


def _given_name(callback: Any) -> str | None:
    name = getattr(callback, "name", None)
    return name if isinstance(name, str) and name else None


def named_callbacks(callbacks: Iterable[Any]) -> dict[str, Any]:
    """Return the stateful ones of ``callbacks`` under the names their states are kept by.

    A callback's own ``name`` counts, else its class name. Further callbacks of a class
    without a name get ``#2``, ``#3``... in their order.

    Raises:
        ValueError: If two callbacks were given the same name.
    """
    named: dict[str, Any] = {}
    for callback in callbacks:
        if not is_stateful(callback):
            continue
        given = _given_name(callback)
        if given is not None:
            if given in named:
                raise ValueError(
                    f"Two callbacks are named {given!r} ({type(named[given]).__name__} and "
                    f"{type(callback).__name__}), so one would overwrite the state of the other. Give each its own "
                    "`name`."
                )
            named[given] = callback
            continue
        base = name = type(callback).__name__
        number = 1
        while name in named:
            number += 1
            name = f"{base}#{number}"
        named[name] = callback
    return named


def collect_states(named: dict[str, Any]) -> dict[str, Any]:
    """Return the states of the callbacks; one that cannot be kept loses only its own."""
    states = {}
    for name, callback in named.items():
        try:
            state = callback.state_dict()
            to_strict(state)
            states[name] = state
        except Exception as error:
            logger.warning(
                "The state of callback %s could not be saved (%s: %s); the checkpoint holds the others.",
                name,
                type(error).__name__,
                error,
            )
    return states


def restore_states(named: dict[str, Any], states: dict[str, Any]) -> list[str]:
    """Load ``states`` into the live callbacks; one that fails loses only its own.

    Returns:
        The names that were restored.
    """
    restored = []
    for name, callback in named.items():
        if name not in states:
            logger.warning(
                "The checkpoint holds no state of callback %s (it holds %s); it starts from scratch.",
                name,
                sorted(states),
            )
            continue
        try:
            callback.load_state_dict(copy.deepcopy(states[name]))
        except Exception as error:
            logger.warning(
                "The state of callback %s could not be restored (%s: %s); it starts from scratch.",
                name,
                type(error).__name__,
                error,
            )
            continue
        restored.append(name)
    return restored


def read_callback_states(checkpoint: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the callback states kept with ``checkpoint``; ``None``, with a warning, where they cannot be read."""
    try:
        return dict(read_sidecar(checkpoint).callbacks)
    except FileNotFoundError:
        return None
    except (SidecarError, OSError) as error:
        logger.warning(
            "The callback states in %s cannot be read (%s); callbacks start from scratch.",
            os.path.join(checkpoint, SIDECAR_NAME),
            error,
        )
        return None


_holders: weakref.WeakKeyDictionary[RunOutcome, dict[str, weakref.ref[Any]]] = weakref.WeakKeyDictionary()


def _claim(state: Any, callback: Any) -> str:
    """Return the name that ``callback`` has in the run of ``state``, as ``named_callbacks`` would give it.

    Where no trainer of ours keeps the list, the run's outcome does: the callbacks of one run
    share it, and come in their order.
    """
    holders = _holders.setdefault(outcome_of(state), {})
    base = name = _given_name(callback) or type(callback).__name__
    number = 1
    while name in holders and holders[name]() is not callback:
        number += 1
        name = f"{base}#{number}"
    holders[name] = weakref.ref(callback)
    return name


class StandaloneStateKeeper:
    """Keeps the state of one callback in checkpoints of a Trainer that does not do it itself.

    Args:
        callback: The callback whose state is kept.
    """

    def __init__(self, callback: Any) -> None:
        self._callback = callback
        self.kept_by_trainer = False

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[None]:
        """While a trainer of ours keeps the state itself."""
        self.kept_by_trainer = True
        try:
            yield
        finally:
            self.kept_by_trainer = False

    def save(self, args: Any, state: Any) -> None:
        """Merge the state of the callback into the sidecar of the checkpoint that was just saved."""
        if self.kept_by_trainer or args is None or state is None or not getattr(args, "should_save", False):
            return
        folder = Path(args.output_dir, checkpoint_name(state.global_step))
        if not folder.is_dir():
            return
        callback = self._callback
        name = _claim(state, callback)
        states = collect_states({name: callback})
        damaged = outcome_of(state).damaged_by
        try:
            sidecar = Sidecar(
                step=state.global_step,
                run_id="",
                sequence=state.global_step,
                callbacks={**(read_callback_states(folder) or {}), **states},
                quarantine=None if damaged is None else quarantine_note(damaged.message, damaged.onset_step),
            )
            write_sidecar(folder, sidecar)
        except (OSError, ValueError, TypeError) as error:
            logger.warning("The state of callback %s could not be written into %s (%s).", name, folder, error)

    def restore(self, args: Any, state: Any) -> None:
        """Load the state that the checkpoint training resumes from holds."""
        if self.kept_by_trainer or args is None or not getattr(state, "global_step", 0):
            return
        given = getattr(args, "resume_from_checkpoint", None)
        name = checkpoint_name(state.global_step)
        candidates = [Path(given)] if isinstance(given, str) and Path(given).name == name else []
        for folder in [*candidates, Path(args.output_dir, name)]:
            states = read_callback_states(folder)
            if states is not None:
                callback = self._callback
                key = _claim(state, callback)
                restore_states({key: callback}, states)
                return


@runtime_checkable
class TakesRawLosses(LossListener, Protocol):
    """A callback that a run can feed with raw losses instead of logs."""

    takes_raw_losses: bool

    def use_raw_losses(self, *, has_loss_scaler: bool, skipping: NonFiniteUpdates | None) -> None:
        """Take losses from the run."""

    def use_logs(self) -> None:
        """Take losses from logs again."""


class RunCallbacks:
    """Takes the callbacks over for one ``train()`` call and gives them back at its end.

    Args:
        host: The host.
        stack: What is switched for the run is switched back when this stack is closed.
        losses: The raw losses; detectors that take them subscribe.
        skipping: Leaves out updates that are not finite.
        initial_states: State of each stateful callback before its first training; a callback
            that is not in here trains for the first time.
    """

    def __init__(
        self,
        host: Host,
        stack: contextlib.ExitStack,
        losses: StepLosses,
        skipping: NonFiniteUpdates,
        initial_states: dict[str, Any],
    ) -> None:
        self._host = host
        self._stack = stack
        self._losses = losses
        self._skipping = skipping if skipping.is_on else None
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
        if isinstance(callback, TakesRawLosses):
            callback.use_raw_losses(has_loss_scaler=self._host.scales_losses, skipping=self._skipping)
            self._stack.callback(callback.use_logs)
            if callback.takes_raw_losses:
                self._losses.subscribe(callback)

    def restore(self, resumed: dict[str, Any] | None) -> None:
        """Give the callbacks their states: from the resumed checkpoint, or as before their first training."""
        restore_states({name: self.stateful[name] for name in self._before}, self._before)
        self._resumed = resumed
        if resumed is not None:
            restore_states(self.stateful, resumed)

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
