"""What decides on data that were bad or new for a while, or stay so: the losses of training alone cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.incident import Incident
from hf_divguard.core.rollback.ruling import Ruling
from hf_divguard.core.rollback.soundness import is_sound
from hf_divguard.hf.host import Host
from hf_divguard.hf.snapshots import Snapshots

__all__ = ["Arbiter"]


class Arbiter(ABC):
    """Keeps a state from before bad data, and says whether to go back to it.

    Data that stay bad and data that are new look alike to the loss of training: present weights
    follow both. All ranks call each method at the same step.

    Args:
        host: The host.
        snapshots: The kept states.
        incident: What the looks so far add up to.
    """

    def __init__(self, host: Host, snapshots: Snapshots, incident: Incident) -> None:
        self._host, self._snapshots, self._incident = host, snapshots, incident
        self._looked_at: int | None = None
        self._asked_for: int | None = None
        self._followed: int | None = None
        self.since: int | None = None
        """Step since which the data are bad; ``None`` if they are not."""

    def follow(self) -> None:
        """After a look: keep the newest state from before data that are bad, until they have passed."""
        incident = self._incident
        if incident.is_open and incident.cause == "data" and incident.since != self._followed:
            self._followed = incident.since
            sound = [kept.step for kept in self._snapshots.all() if is_sound(kept.step, incident.since)]
            newest = max(sound, default=None)
            is_first = self.since is None
            if newest is not None and (is_first or (newest != self._kept_step and self._knows_more(newest))):
                self.since, self._snapshots.pinned = incident.since, newest
        elif self.since is not None and not incident.is_open and incident.new_data_until < self.since:
            self.forget()

    @abstractmethod
    def _knows_more(self, kept_step: int) -> bool:
        """Return whether to keep this state instead of the one that is kept since earlier data."""

    def forget(self) -> None:
        """Keep nothing: the data are as before, or the weights are."""
        self.since, self._snapshots.pinned = None, None

    def is_due(self, *, is_last: bool, stops: bool) -> bool:
        """Return whether to ask.

        That is when the data have changed again, when those of before have come back, and at the end.

        Args:
            is_last: Whether training ends here.
            stops: Whether the action ends training: a rollback within bad data would be undone by them.
        """
        step = self._host.state.global_step
        if self.since is None or self._kept_step is None:
            return False
        return is_last or (self._looked_at != step and self._is_now(step, self.since, stops=stops))

    def _is_now(self, step: int, since: int, *, stops: bool) -> bool:
        incident = self._incident
        # The data may have changed back from what counts as usual by now.
        has_changed_again = incident.is_open and incident.cause == "data" and incident.since > since
        is_now = incident.open_question_at == step or (stops and incident.has_bad_data)
        return is_now or (has_changed_again and self._asked_for != incident.since)

    @property
    def _kept_step(self) -> int | None:
        """Step of the state from before bad data, ``None`` where there is none any more."""
        pinned = self._snapshots.pinned
        return pinned if any(kept.step == pinned for kept in self._snapshots.all()) else None

    def ask(self, *, is_last: bool) -> Ruling:
        """Return whether to go back to the kept state.

        Args:
            is_last: Whether training ends here.
        """
        self._looked_at, self._asked_for = self._host.state.global_step, self._incident.since
        assert self._kept_step is not None
        return self._decide(self._kept_step, is_last=is_last)

    @abstractmethod
    def _decide(self, good: int, *, is_last: bool) -> Ruling:
        """Return whether to go back to the state of step ``good``."""

    @abstractmethod
    def finding(self, ruling: Ruling) -> Finding:
        """Return what has been found, in numbers and words."""
