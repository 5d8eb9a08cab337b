"""The command ``status``: how a run ended, and which checkpoint to take."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from typing import Any

from hf_divguard.cli.condition import Condition, condition_of
from hf_divguard.cli.exits import DIVERGED, FAILED, OK, STOPPED
from hf_divguard.cli.folders import age_of, run_folder, saved_at
from hf_divguard.cli.keeping import Plan, Survey, survey
from hf_divguard.cli.needed import needed_steps
from hf_divguard.cli.output import coloured, duration_in_words, print_json, printable, size_in_words
from hf_divguard.cli.parsers import DEFAULT_KEEP_BEST, DEFAULT_KEEP_LAST
from hf_divguard.storage.survey import Checkpoint

__all__ = ["facts_of", "run_status"]

_CODES = {"finished": OK, "running": OK, "stopped": STOPPED, "diverged": DIVERGED, "failed": FAILED}


def run_status(options: Any) -> int:
    """Say how a run ended, or that it is running."""
    seen = survey(run_folder(options.dir), options.metric, options.greater)
    condition = condition_of(seen)
    if options.json:
        newest = seen.found[-1] if seen.found else None
        print_json("status", _content(options.dir, seen, condition, newest, _disk(seen, condition)))
    else:
        print("\n".join(_lines(options.dir, condition, facts_of(seen, condition))))
    return _CODES[condition.state] if options.exit_code else OK


def _disk(seen: Survey, condition: Condition) -> dict[str, Any]:
    everything = seen.usage
    content: dict[str, Any] = {
        "checkpoints": len(seen.found),
        "bytes": everything.size,
        "all_readable": everything.is_complete,
    }
    needed = needed_steps(seen, condition)
    keep_best = 0 if seen.greater_is_better is None else DEFAULT_KEEP_BEST
    plan = Plan(DEFAULT_KEEP_LAST, keep_best, needed=needed).make(seen)
    freed = everything.freed_by(each.path for each in plan.delete)
    command = f"hf-divguard prune {shlex.quote(seen.run_dir)} --keep-last {DEFAULT_KEEP_LAST} --keep-best {keep_best}"
    return content | {
        "prune": {"command": command, "checkpoints": len(plan.delete), "bytes": freed},
    }


def _content(
    shown: str, seen: Survey, condition: Condition, newest: Checkpoint | None, disk: dict[str, Any]
) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for each in seen.found:
        counts[each.verdict.status] = counts.get(each.verdict.status, 0) + 1
    take = condition.take
    return {
        "dir": shown,
        "state": condition.state,
        "reason": condition.reason,
        "step": condition.step,
        "max_steps": condition.progress.max_steps,
        "last_activity": condition.active_at,
        "seconds_since_activity": age_of(condition.active_at),
        "divergence": None if condition.divergence is None else asdict(condition.divergence),
        "replay": condition.replay_note,
        "warnings": [asdict(each) for each in condition.record.warnings[-20:]],
        "rollbacks": condition.record.rollbacks,
        "steps_undone": condition.record.steps_undone,
        "steps_lost": condition.steps_lost,
        "hours_lost": condition.hours_lost,
        "newest": None
        if newest is None
        else _checkpoint(newest) | {"under_fault": condition.was_saved_under_the_fault(newest)},
        "take": None if take is None else _checkpoint(take) | {"why": condition.take_reason},
        "paste": condition.paste,
        "checkpoints": counts,
        "disk": disk,
    }


def _checkpoint(each: Checkpoint) -> dict[str, Any]:
    saved = saved_at(each.path)
    return {
        "path": each.path,
        "step": each.step,
        "verdict": each.verdict.status,
        "reason": each.verdict.reason,
        "resumable": each.verdict.resumable,
        "metric": each.metric,
        "metric_name": each.metric_name,
        "saved_at": saved,
        "age_seconds": age_of(saved),
    }


def facts_of(seen: Survey, condition: Condition) -> list[tuple[str, str]]:
    """Return the answer as names and texts."""
    newest = seen.found[-1] if seen.found else None
    return [*_fault_facts(condition), *_checkpoint_facts(condition, newest, _disk(seen, condition))]


def _lines(shown: str, condition: Condition, facts: list[tuple[str, str]]) -> list[str]:
    head = f"{printable(shown)}: {coloured(condition.state)}. {printable(condition.reason)}"
    return [head, *(f"  {name:<10} {printable(text)}" for name, text in facts)]


def _fault_facts(condition: Condition) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    fault = condition.divergence
    if fault is not None:
        facts.append(("finding", f"{fault.kind}: {fault.message}"))
        if fault.cause is not None:
            facts.append(("cause", fault.cause))
        found = f"found at step {fault.step}"
        if fault.source == "replay":
            found = (
                f"the detector `adaptive` would have found it at step {fault.step} (by a replay of the log)"
            )
        facts.append(("onset", f"step {fault.onset_step}, {found}"))
    elif condition.replay_note is not None:
        facts.append(("replay", condition.replay_note))
    if condition.steps_lost:
        hours = condition.hours_lost
        time = "" if hours is None or hours < 1 / 60 else f", about {duration_in_words(hours * 3600)}"
        facts.append(("lost", f"{condition.steps_lost} steps{time}"))
    if condition.record.rollbacks:
        undone = condition.record.steps_undone
        facts.append(("rollbacks", f"{condition.record.rollbacks}; they undid {undone} steps"))
    return facts + [("warning", each.message) for each in condition.record.warnings[-3:]]


def _verdict_on(newest: Checkpoint, condition: Condition) -> str:
    status, reason, fault = newest.verdict.status, newest.verdict.reason, condition.divergence
    if fault is None:
        return f"{status}. {reason}"
    if status == "complete" and condition.was_saved_under_the_fault(newest):
        return f"its files are complete, but it was saved after the fault had begun (step {fault.onset_step})"
    if fault.message in reason:  # it has a line of its own
        return f"{status}. {reason.partition('. ')[0]}."
    return f"{status}. {reason}"


def _checkpoint_facts(
    condition: Condition, newest: Checkpoint | None, disk: dict[str, Any]
) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    if newest is None:
        facts.append(("newest", "there is no checkpoint"))
    else:
        age = age_of(saved_at(newest.path))
        saved = "" if age is None else f", saved {duration_in_words(age)} ago"
        facts.append(("newest", f"{os.path.basename(newest.path)}{saved}: {_verdict_on(newest, condition)}"))
    take = condition.take
    reason = condition.take_reason
    facts.append(("take", reason if take is None else f"{take.path} ({reason})"))
    if condition.paste is not None:
        facts.append(("paste", condition.paste))
    prune = disk["prune"]
    free = (
        f"; `{prune['command']}` would free {size_in_words(prune['bytes'])}" if prune["checkpoints"] else ""
    )
    facts.append(("disk", f"{disk['checkpoints']} checkpoints, {size_in_words(disk['bytes'])}{free}"))
    return facts
