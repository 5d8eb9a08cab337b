"""What condition a run is in, what was lost, and which checkpoint to take."""

from __future__ import annotations

import math
import shlex
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_divguard.cli.folders import age_of, saved_at
from hf_divguard.cli.keeping import Survey
from hf_divguard.cli.output import duration_in_words
from hf_divguard.cli.progress import Progress, last_activity, read_progress, seconds_per_step
from hf_divguard.cli.records import Divergence, Ending, RunRecord, read_ending, read_record
from hf_divguard.core.findings import Finding
from hf_divguard.errors import HistoryError
from hf_divguard.storage.integrity import verify_checkpoint
from hf_divguard.storage.survey import Checkpoint

if TYPE_CHECKING:
    from hf_divguard.history import History

__all__ = ["Condition", "condition_of", "first_lasting"]

_LEAST_RUNNING_SECONDS = 300.0
_MOST_RUNNING_SECONDS = 6 * 3600.0
# The level of a curve is the median of so many values.
_LEVEL_VALUES = 5


@dataclass(frozen=True)
class Condition:
    """The answer of ``status``.

    Args:
        state: ``"finished"``, ``"running"``, ``"stopped"``, ``"diverged"`` or ``"failed"``.
        reason: One sentence.
        step: The last step that is known.
        progress: The furthest trainer state.
        record: The events of a guarded run.
        active_at: When something changed last.
        divergence: The fault that ended the run, or that a replay found.
        replay_note: What the replay showed, where it found no lasting fault.
        steps_lost: Steps that are lost: since the checkpoint to take.
        hours_lost: The same in hours, estimated from the times of the checkpoints.
        take: The checkpoint to take.
        take_reason: Why this one, or why there is none.
        paste: What to paste to resume or to load it.
    """

    state: str
    reason: str
    step: int | None
    progress: Progress
    record: RunRecord
    active_at: float | None
    divergence: Divergence | None = None
    replay_note: str | None = None
    steps_lost: int | None = None
    hours_lost: float | None = None
    take: Checkpoint | None = None
    take_reason: str = ""
    paste: str | None = None

    def was_saved_under_the_fault(self, each: Checkpoint) -> bool:
        """Return whether ``each`` was saved when the fault had begun, whatever its files are like."""
        # As for `CheckpointLedger.last_good`: the loss of a step shows what the update before it did.
        return self.divergence is not None and each.step > self.divergence.onset_step - 2


def condition_of(seen: Survey) -> Condition:
    """Return what condition the run is in whose checkpoints were ``seen``."""
    newest = seen.found[-1] if seen.found else None
    record = read_record(seen.run_dir, newest, saved_at(newest.path) if newest else None)
    progress = read_progress(seen.run_dir, seen.found, since=record.resumed_at)
    ending, written = read_ending(seen.run_dir)
    if ending is not None and newest is not None and _is_older(ending, written, newest):
        ending = None
    ending_step = None if ending is None else ending.step
    known = [step for step in (progress.step, record.last_step, ending_step) if step is not None]
    step = max(known, default=newest.step if newest else None)
    pace = seconds_per_step(seen.found, progress)
    start = Condition("", "", step, progress, record, last_activity(seen.run_dir, newest), record.end)
    if not record.has_events:
        start = _with_replay(start)
    state, reason = _state(start, ending, pace, seen)
    return _with_checkpoint(replace(start, state=state, reason=reason), seen, pace)


def _is_older(ending: Ending, written: float | None, newest: Checkpoint) -> bool:
    """Return whether the run has gone on since ``ending`` was written."""
    if ending.step is not None:
        return newest.step > ending.step
    saved = saved_at(newest.path)
    return saved is not None and written is not None and saved > written


# ---- state


def _state(known: Condition, ending: Ending | None, pace: float | None, seen: Survey) -> tuple[str, str]:
    where = _where(known)
    fault = known.divergence
    if ending is not None and ending.state != "running":
        return ending.state, _sentence_of(ending, where, fault)
    if fault is not None and fault.source == "events":
        done = {"stop": "Stopped", "abort": "Aborted", "rollback": "Given up after rollbacks"}
        return "diverged", f"{done.get(fault.action or '', 'Stopped')} {where} after a finding."
    is_running = _is_recent(known, pace, seen)
    if fault is not None:
        still = "It may still be running. " if is_running and not known.progress.has_ended else ""
        return "diverged", f"{still}The loss did not recover {where}."
    if known.progress.has_ended:
        early = known.progress.max_steps is not None and (known.step or 0) < known.progress.max_steps
        return "finished", f"Ended {where}{', before its last step, without a finding' if early else ''}."
    age = age_of(known.active_at)
    ago = "" if age is None else f" {duration_in_words(age)} ago"
    if is_running:
        return "running", f"It was {where} at its last checkpoint; something changed{ago}."
    return "stopped", f"Not at its end, and nothing has changed since{ago or ' its start'}: it was {where}."


def _sentence_of(ending: Ending, where: str, fault: Divergence | None) -> str:
    """Return how the run ended, from its own note; the fault has a line of its own."""
    starts = {
        "finished": "Ended",
        "ended_early": "Ended before its last step,",
        "stopped": "A detector stopped it",
        "gave_up": "Rollbacks did not help, and it gave up",
        "interrupted": f"{ending.message or 'A signal'} ended it",
    }
    start = starts.get(ending.word, f"Its outcome is `{ending.word}`")
    has_said = ending.word == "interrupted" or (
        fault is not None and ending.message is not None and fault.message in ending.message
    )
    return f"{start} {where}." + (f" {ending.message}" if ending.message and not has_said else "")


def _where(known: Condition) -> str:
    if known.step is None:
        return "at a step that is not known"
    limit = f" of {known.progress.max_steps}" if known.progress.max_steps else ""
    return f"at step {known.step}{limit}"


def _is_recent(known: Condition, pace: float | None, seen: Survey) -> bool:
    """Return whether the last change is so young that the run may be running."""
    age = age_of(known.active_at)
    steps = [each.step for each in seen.found[-2:]]
    usual = pace * abs(steps[-1] - steps[0]) if pace and len(steps) == 2 else 0.0
    limit = min(max(_LEAST_RUNNING_SECONDS, 3 * usual), _MOST_RUNNING_SECONDS)
    return age is not None and age < limit


# ---- replay


def _with_replay(known: Condition) -> Condition:
    """Add what the default detector finds in the log of a run that has no events."""
    if known.progress.path is None:
        return replace(known, replay_note="there is no log to replay")
    if known.progress.content is None:
        return replace(
            known, replay_note=f"the log is long; `hf-divguard replay {known.progress.path}` reads it"
        )
    from hf_divguard.history import read_history
    from hf_divguard.replays import replay

    try:
        errors = replay(known.progress.content).errors
    except (HistoryError, ValueError, TypeError) as error:
        return replace(known, replay_note=f"no replay: {error}")
    if not errors:
        return replace(known, replay_note="the detector `adaptive` finds nothing in the log")
    lasting = first_lasting(read_history(known.progress.content), errors)
    if lasting is None:
        return replace(known, replay_note=f"{errors[0].message} The loss has recovered since.")
    fault = Divergence(
        "replay",
        lasting.step,
        lasting.onset_step,
        lasting.kind,
        lasting.message,
        value=lasting.value,
        limit=lasting.limit,
    )
    return replace(known, divergence=fault)


def first_lasting(history: History, errors: list[Finding], metric: str = "loss") -> Finding | None:
    """Return the first fault from which the loss has not come back, neither before the next one nor at the end."""
    losses = [(each.step, each.values[metric]) for each in history.series(metric)]
    ends = [*(float(each.onset_step) for each in errors[1:]), math.inf]
    for found, end in zip(errors, ends, strict=False):
        if not _has_recovered(losses, found.onset_step, end):
            return found
    return None


def _has_recovered(losses: list[tuple[int, float]], onset: int, end: float) -> bool:
    """Return whether the last losses before step ``end`` are as low as those before the onset."""
    before = [loss for step, loss in losses if step < onset][-_LEVEL_VALUES:]
    after = [loss for step, loss in losses if onset <= step < end][-_LEVEL_VALUES:]
    if not before or len(after) < _LEVEL_VALUES or 0.0 in after:
        return False
    return statistics.median(after) <= statistics.median(before)


# ---- the checkpoint to take


def _with_checkpoint(known: Condition, seen: Survey, pace: float | None) -> Condition:
    take, reason = _choose(known, seen)
    if take is None:
        return replace(known, take_reason=reason)
    lost = None
    if known.state in ("diverged", "stopped", "failed") and known.step is not None:
        lost = max(0, known.step - take.step)
    hours = None if not lost or pace is None else lost * pace / 3600
    paste = None
    path = shlex.quote(take.path)
    if known.state in ("diverged", "stopped", "failed") and take.verdict.resumable:
        paste = f"--resume_from_checkpoint {path}"
    elif known.state != "running":
        paste = f"from_pretrained({take.path!r})"
    return replace(known, take=take, take_reason=reason, paste=paste, steps_lost=lost, hours_lost=hours)


def _choose(known: Condition, seen: Survey) -> tuple[Checkpoint | None, str]:
    """Return the checkpoint to take and why, or ``None`` and why there is none."""
    complete = seen.complete
    if not complete:
        if not seen.found:
            return None, "there is no checkpoint"
        unreadable = sum(each.verdict.status == "unreadable" for each in seen.found)
        more = f"; {unreadable} cannot be read, `hf-divguard list` says why" if unreadable else ""
        return None, f"none of the {len(seen.found)} checkpoints is complete{more}"
    if known.divergence is not None:
        return _before(known.divergence, seen)
    if known.state == "finished" and seen.best:
        return seen.best[0], f"the best: {seen.metric_key} {seen.best[0].metric:.6g}"
    for each in reversed(complete):
        verdict = verify_checkpoint(each.path)
        if verdict.status == "complete" and (verdict.resumable or known.state == "finished"):
            return replace(each, verdict=verdict), "the newest complete one"
    return complete[-1], "the newest complete one; it holds no optimizer state"


def _before(fault: Divergence, seen: Survey) -> tuple[Checkpoint | None, str]:
    """Return the newest good checkpoint from before the onset of ``fault``."""
    good = seen.ledger.last_good(fault.onset_step)
    each = next((each for each in seen.complete if good is not None and each.step == good.step), None)
    if each is None:
        return None, f"no good checkpoint is from before the onset (step {fault.onset_step}): start again"
    verdict = verify_checkpoint(each.path)
    if verdict.status != "complete":
        return None, f"the last good checkpoint, {each.path}, is {verdict.status}: {verdict.reason}"
    return replace(each, verdict=verdict), f"the last good one before the onset at step {fault.onset_step}"
