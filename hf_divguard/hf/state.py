"""The run's outcome on the ``TrainerState``, with read-only names for its parts."""

from __future__ import annotations

from typing import Any

from transformers import TrainerState

from hf_divguard.core.findings import Finding
from hf_divguard.core.outcome import RunOutcome

__all__ = ["GuardedState", "outcome_of"]


class GuardedState:
    """What ``trainer.state`` says of divergence. All of it is read-only, and set on a healthy run too.

    It is mixed into the class of the host's state when a guard first sees it. Nothing of it
    is a field: ``trainer_state.json`` stays as the host writes it.
    """

    _divguard_outcome: RunOutcome

    @property
    def divguard_finding(self) -> Finding | None:
        """The finding that ended the run; ``None`` if none did."""
        return self._divguard_outcome.finding

    @property
    def divguard_stop_reason(self) -> str | None:
        """The action and the sentence of that finding, ``"stop: ..."``; ``None`` if the run was not ended."""
        return self._divguard_outcome.stop_reason

    @property
    def divguard_aborted(self) -> bool:
        """Whether the run was ended without a further save."""
        return self._divguard_outcome.is_aborted

    @property
    def divguard_muted_until(self) -> int:
        """Last step in which findings are ignored after a rollback; -1 if there was none."""
        return self._divguard_outcome.muted_until


class _GuardedTrainerState(GuardedState, TrainerState):
    pass


_guarded_classes: dict[type, type] = {TrainerState: _GuardedTrainerState}


def _guarded(kind: Any) -> Any:
    if kind not in _guarded_classes:
        _guarded_classes[kind] = type(
            f"Guarded{kind.__name__}", (GuardedState, kind), {"__module__": __name__}
        )
    return _guarded_classes[kind]


def outcome_of(state: Any) -> RunOutcome:
    """Return the outcome of the run that ``state`` belongs to; the same object for the same state.

    Args:
        state: The ``TrainerState``. Without one (a detector that is used by hand) each call
            returns a new outcome.

    Example:
        >>> state = TrainerState()
        >>> outcome_of(state) is outcome_of(state), state.divguard_finding
        (True, None)
    """
    if state is None:
        return RunOutcome()
    held: RunOutcome | None = getattr(state, "_divguard_outcome", None)
    if not isinstance(held, RunOutcome):
        held = RunOutcome()
        state._divguard_outcome = held
        if isinstance(state, TrainerState):
            state.__class__ = _guarded(type(state))
    return held
