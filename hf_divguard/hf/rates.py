"""The learning rate around a rollback: the schedule keeps its place, a lowered rate stays lowered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hf_divguard.hf.host import Host

__all__ = [
    "Rewarming",
    "follows_metrics",
    "load_schedule",
    "rates_kept",
    "replace_optimizer_state",
    "scale_rates",
    "scheduled_rates",
]

# What schedules keep in the groups of the optimizer beside the rate itself (`OneCycleLR`, `CyclicLR`).
_KEPT_IN_GROUPS = ("initial_lr", "max_lr", "min_lr")
# What they keep themselves and compute the rate from. `min_lrs` and `eta_min` are floors: left where they are,
# the next step of a schedule could lift a lowered rate up to them.
_KEPT_IN_SCHEDULES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs", "_init_lrs", "eta_min")


def scheduled_rates(host: Host) -> list[float]:
    """Return the learning rate that the schedule has for each parameter group now."""
    last = getattr(_inner(host.scheduler), "_last_lr", None)
    groups = host.optimizer.param_groups
    rates = last if last is not None and len(last) == len(groups) else [group["lr"] for group in groups]
    return [float(rate) for rate in rates]


def follows_metrics(host: Host) -> bool:
    """Return whether the schedule goes by evaluations (``ReduceLROnPlateau``, ``GreedyLR``), not by steps.

    What such a one concluded from the diverged stretch has to be taken back; any other
    keeps its place.
    """
    return hasattr(_inner(host.scheduler), "num_bad_epochs")


def load_schedule(host: Host, state: dict[str, Any], factor: float) -> None:
    """Put back a schedule that goes by evaluations.

    Args:
        host: The host; its optimizer already holds the state of the same step.
        state: State of the schedule.
        factor: By how much the rate has been lowered since ``state`` was kept.
    """
    _inner(host.scheduler).load_state_dict(state)
    scale_rates(host, factor)


def replace_optimizer_state(host: Host, state: dict[str, Any]) -> None:
    """Load ``state`` into the optimizer; with a schedule that goes by steps the rates stay those of now."""
    with rates_kept(host):
        host.optimizer.load_state_dict(state)


@contextlib.contextmanager
def rates_kept(host: Host) -> Iterator[None]:
    """Put the rates back as they were, with a schedule that goes by steps, after a state was loaded in here."""
    now = scheduled_rates(host)
    kept = [
        {name: group[name] for name in _KEPT_IN_GROUPS if name in group}
        for group in host.optimizer.param_groups
    ]
    yield
    if follows_metrics(host):
        return
    # A load may have put other groups in the place of those of before.
    groups = host.optimizer.param_groups
    for group, schedule_owned in zip(groups, kept, strict=True):
        group.update(schedule_owned)
    _set_rates(host.optimizer, now)


def _set_rates(optimizer: Any, rates: list[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def scale_rates(host: Host, factor: float) -> None:
    """Multiply the learning rate with ``factor`` for good, whatever the schedule does next.

    Schedules that compute the rate from a base get that base scaled; it is part of their
    state and so survives in checkpoints. Those that work on the rate itself keep it in the
    optimizer.
    """
    if factor == 1.0:
        return
    for schedule in _walk(_inner(host.scheduler)):
        for name in _KEPT_IN_SCHEDULES:
            rates = getattr(schedule, name, None)
            if isinstance(rates, (list, tuple)):
                setattr(schedule, name, [rate * factor for rate in rates])
            elif rates is not None:
                setattr(schedule, name, rates * factor)
    for group in host.optimizer.param_groups:
        for name in _KEPT_IN_GROUPS:
            if name in group:
                group[name] = group[name] * factor
    _set_rates(host.optimizer, [float(group["lr"]) * factor for group in host.optimizer.param_groups])


def _inner(schedule: Any) -> Any:
    """Return the scheduler inside accelerate's wrapper."""
    return getattr(schedule, "scheduler", schedule)


def _walk(schedule: Any) -> list[Any]:
    found = [schedule]
    for inner in getattr(schedule, "_schedulers", []):
        found += _walk(inner)
    return found


class Rewarming:
    """Lets the learning rate rise again after a rollback, update by update, below the schedule.

    Args:
        steps: Updates until the schedule's own rate is reached; 0 for none.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._held: list[float] | None = None
        self.since: int | None = None
        self.used: float | None = None
        """Rate of the first group in the last update; ``None`` if that was the schedule's own."""

    def begin(self, step: int) -> None:
        """Start with the update after ``step``."""
        self.since = step if self._steps else None

    def first_of(self, rate: float) -> float:
        """Return what the first update will use of the schedule's ``rate``."""
        return rate / self._steps if self._steps else rate

    def hold_back(self, host: Host, step: int) -> None:
        """Lower the rate for the update under way, after ``step`` updates."""
        self.used = None
        if self.since is None:
            return
        done = step - self.since
        if done >= self._steps:
            self.since = None
            return
        groups = host.optimizer.param_groups
        self._held = [float(group["lr"]) for group in groups]
        lowered = [rate * (done + 1) / self._steps for rate in self._held]
        self.used = lowered[0]
        _set_rates(host.optimizer, lowered)

    def release(self, host: Host) -> None:
        """Give the schedule its rates back after the update."""
        if self._held is not None:
            _set_rates(host.optimizer, self._held)
            self._held = None
