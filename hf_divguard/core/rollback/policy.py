"""When to roll back, to which state, how often, and when to stop instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hf_divguard.core.findings import Finding
from hf_divguard.core.state import Stateful, memory

__all__ = ["Decision", "RollbackPolicy", "Target"]

# An incident is over when no error was found for this many cool-downs after the last one ended. A fault that
# is still there is detected within a few tens of steps; ten times the default cool-down of 20 steps leaves room
# for slow ones.
_COOLDOWNS_TO_CLOSE = 10

# A run that was healthy for this many cool-downs after the last one has passed the place where it failed: the
# states it made since are as good as any, and an older one would only lose more.
_COOLDOWNS_TO_LEAVE = 2

# A state with good weights from which the run fails so often may have an optimizer that is damaged.
_SAME_STATE = 5

# The rate that a last attempt gets where the user named no factor below 1.
_LAST_ATTEMPT_FACTOR = 0.5


@dataclass(frozen=True, slots=True)
class Target:
    """A state that can be restored.

    Args:
        step: Step under which it was kept.
        origin: Step whose weights it holds: lower than ``step`` for a checkpoint that was
            saved right after a rollback.
        is_snapshot: Whether it is in memory instead of on disk.
    """

    step: int
    origin: int
    is_snapshot: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about a finding.

    Args:
        target: The state to restore; ``None`` to stop the run.
        attempt: Number of this rollback within its incident, from 1.
        incident: Number of the incident, from 1.
        lr_factor: What the learning rate is multiplied with.
        cooldown_steps: Steps for which findings are ignored afterwards.
        onset_step: First bad step at this place; everything before it is good.
        reason: Why the run stops; empty for a rollback.
    """

    target: Target | None
    attempt: int
    incident: int
    onset_step: int
    lr_factor: float = 1.0
    cooldown_steps: int = 0
    reason: str = ""


@dataclass
class RollbackPolicy(Stateful):
    """Decides on rollbacks; remembers incidents.

    The first rollback of an incident goes to the newest state older than the onset. If
    the run fails again at the same place, the next goes to an older one, or to the same
    one if only the fault had not passed yet; the last one allowed also lowers the learning
    rate. After that the run stops. Each attempt doubles the cool-down, so that a fault
    which lasts a while can pass. The incident is over when no
    error was found for ten cool-downs.

    A state of step ``s`` is old enough when ``s <= onset_step - 2 - margin_steps``: the
    loss of the onset comes from the weights after ``onset_step - 1``, and the update
    before it may be the one that broke them.

    Args:
        max_rollbacks: Rollbacks allowed per incident, at least 1.
        cooldown_steps: Steps after the first rollback of an incident in which findings are
            ignored, at least 0.
        margin_steps: Further steps to stay before the onset, at least 0.
        lr_factor: Factor on the learning rate at each rollback, in (0, 1].

    Example:
        >>> policy = RollbackPolicy(max_rollbacks=2, cooldown_steps=20)
        >>> finding = Finding(step=160, onset_step=151, kind="jump", severity="error", metric="loss",
        ...                   value=9.0, limit=2.4, message="`loss` = 9 at step 160.")
        >>> targets = [Target(100, 100), Target(140, 140), Target(150, 150)]
        >>> policy.decide(finding, 160, targets).target.step
        140
    """

    max_rollbacks: int = 3
    cooldown_steps: int = 20
    margin_steps: int = 0
    lr_factor: float = 1.0
    incident: int = memory(0)
    attempt: int = memory(0)
    rollbacks: int = memory(0)
    muted_until: int = memory(0)
    open_until: int = memory(0)
    place_onset: int = memory(0)
    rolled_back_at: int = memory(-1)
    origins_tried: list[int] = memory(list)
    rate_cuts: list[tuple[int, float]] = memory(list)

    def is_muted(self, step: int) -> bool:
        """Return whether findings at ``step`` are ignored."""
        return step <= self.muted_until

    def decide(self, finding: Finding, step: int, targets: Sequence[Target]) -> Decision:
        """Return what to do about an error finding that came up at ``step``.

        Args:
            finding: What was found.
            step: Present optimizer step.
            targets: States that can be restored, whatever their age.
        """
        finding = self.place(finding)
        again = self.is_open(step)
        # What a comparison finds within the cool-down is the same attempt: the fault has not passed yet.
        in_cooldown = again and finding.cause is not None and self.is_muted(step)
        incident, attempt = (
            (self.incident, self.attempt + (not in_cooldown)) if again else (self.incident + 1, 1)
        )
        left_at = self.muted_until + _COOLDOWNS_TO_LEAVE * self.cooldown_steps
        same_place = again and finding.onset_step <= left_at
        onset = min(finding.onset_step, self.place_onset) if same_place else finding.onset_step
        if attempt > self.max_rollbacks:
            reason = f"the run failed again after {self.max_rollbacks} rollback(s) (`divguard_max_rollbacks`)"
            return Decision(None, attempt, incident, onset, reason=reason)
        newest_allowed = finding.onset_step - 2 - self.margin_steps
        old_enough = [target for target in targets if target.step <= newest_allowed]
        if not old_enough:
            held = ", ".join(str(target.step) for target in targets) or "none"
            reason = (
                f"no checkpoint is old enough: the onset is step {finding.onset_step}, so one of step {newest_allowed} "
                f"or earlier is needed, and those there are of step {held}. Save more often than faults take to show, "
                "keep more checkpoints, or set `divguard_snapshot_steps`"
            )
            return Decision(None, attempt, incident, onset, reason=reason)
        if not same_place:
            better = old_enough
        elif finding.cause is not None:  # compared: it is known whose weights are good
            better = [each for each in old_enough if self.origins_tried.count(each.origin) < _SAME_STATE]
        elif finding.kind == "rollback_repeated":
            better = [target for target in old_enough if target.origin <= min(self.origins_tried)]
        else:
            better = [target for target in old_enough if target.origin < min(self.origins_tried)]
        if better:
            chosen = max(better, key=lambda target: target.step)
        else:
            chosen = min(old_enough, key=lambda target: (target.origin, -target.step))
        is_last = attempt == self.max_rollbacks and attempt > 1 and finding.kind != "rollback_repeated"
        is_last = is_last and not in_cooldown
        lower_rate = is_last or not better
        return Decision(
            chosen,
            attempt,
            incident,
            onset,
            lr_factor=min(self.lr_factor, _LAST_ATTEMPT_FACTOR) if lower_rate else self.lr_factor,
            cooldown_steps=self.muted_until - step
            if in_cooldown
            else self.cooldown_steps * 2 ** (attempt - 1),
        )

    def place(self, finding: Finding) -> Finding:
        """Return ``finding`` with an onset after the last rollback.

        A rule that derives the onset from the last good value it saw would place it among the
        steps that were undone already.
        """
        return replace(finding, onset_step=max(finding.onset_step, self.rolled_back_at + 1))

    def may_try_again(self) -> bool:
        """Return whether the present incident has a rollback left."""
        return self.attempt < self.max_rollbacks

    def record(self, decision: Decision, step: int) -> None:
        """Remember a rollback that was carried out at ``step``."""
        assert decision.target is not None
        if decision.incident != self.incident:
            self.origins_tried = []
        self.place_onset, self.rolled_back_at = decision.onset_step, step
        self.incident, self.attempt = decision.incident, decision.attempt
        self.rollbacks += 1
        self.origins_tried.append(decision.target.origin)
        self.muted_until = step + decision.cooldown_steps
        self.open_until = self.muted_until + _COOLDOWNS_TO_CLOSE * max(self.cooldown_steps, 1)
        if decision.lr_factor != 1.0:
            self.rate_cuts.append((step, decision.lr_factor))

    def rate_factor_since(self, step: int) -> float:
        """Return by how much rollbacks have lowered the learning rate after ``step``."""
        return math.prod(factor for cut_step, factor in self.rate_cuts if cut_step > step)

    def is_open(self, step: int) -> bool:
        """Return whether an error at ``step`` belongs to the last incident."""
        return self.incident > 0 and step <= self.open_until
