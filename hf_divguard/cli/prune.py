"""The command ``prune``: deletes checkpoints that no rule keeps."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_divguard.cli.condition import condition_of
from hf_divguard.cli.exits import NO, OK, USAGE, CommandError
from hf_divguard.cli.folders import run_folder
from hf_divguard.cli.keeping import Plan, Survey, survey
from hf_divguard.cli.needed import needed_steps
from hf_divguard.cli.output import print_json, printable, size_in_words, table
from hf_divguard.cli.reducing import Reduction, seconds_of
from hf_divguard.storage.deletion import delete_checkpoint
from hf_divguard.storage.survey import Checkpoint, look_at
from hf_divguard.storage.weights_only import reduce_to_weights

__all__ = ["run_prune"]


def run_prune(options: Any) -> int:
    """Delete what neither the last nor the best keep, or list it."""
    age = options.weights_only_older_than
    older_than = None if age is None else seconds_of(age)
    seen = survey(run_folder(options.dir), options.metric, options.greater)
    if seen.greater_is_better is None and options.keep_best > 0:
        raise CommandError(
            f"Whether a greater `{seen.metric_key}` is better is not known, so the best cannot be kept. Add "
            "--greater-is-better or --lower-is-better, or keep none with --keep-best 0.",
            USAGE,
        )
    condition = condition_of(seen)
    needed = needed_steps(seen, condition)
    plan = Plan(options.keep_last, options.keep_best, options.every, needed).make(seen)
    in_full = {*needed, *plan.last, *([seen.complete[-1].step] if seen.complete else [])}
    reduction = Reduction(older_than).make(seen, set(plan.reasons), in_full)
    errors: dict[int, str] = {}
    if options.yes:
        errors = _change(plan.delete, lambda path: delete_checkpoint(path, seen.run_dir))
        errors |= _change(reduction.reduce, reduce_to_weights)
    freed = seen.usage.freed_by(each.path for each in plan.delete if each.step not in errors)
    freed += sum(size for step, size in reduction.freed.items() if step not in errors)
    done = _Done(options, seen, plan, reduction, freed, errors)
    if options.json:
        print_json("prune", _content(done))
    else:
        print("\n".join(_lines(done)))
    return NO if errors else OK


@dataclass(frozen=True)
class _Done:
    """What was decided, and what was done if that was asked for."""

    options: Any
    seen: Survey
    plan: Plan
    reduction: Reduction
    freed: int
    errors: dict[int, str]


def _change(checkpoints: list[Checkpoint], change: Callable[[str], object]) -> dict[int, str]:
    """Delete or reduce ``checkpoints``, worst first; return why some could not be, by step."""
    errors: dict[int, str] = {}
    for each in checkpoints:
        # A run may be saving into this folder: it must be what was judged.
        now = look_at(each.path, each.step)
        if now.sequence != each.sequence or now.verdict.status != each.verdict.status:
            errors[each.step] = "it has changed since it was looked at; it was left alone"
            continue
        try:
            change(each.path)
        except (OSError, ValueError) as error:
            errors[each.step] = str(error)
    return errors


def _notes(done: _Done) -> list[str]:
    notes, seen = [], done.seen
    if done.options.keep_best and seen.complete and not seen.best:
        notes.append(
            f"No checkpoint was evaluated at its own step with `{seen.metric_key}`, so none is kept as the best."
        )
    if seen.found and not seen.complete:
        notes.append("No checkpoint is complete, so none is deleted.")
    for step, reason in done.reduction.refused.items():
        notes.append(f"checkpoint-{step} is not reduced to its weights: {reason}.")
    return notes


def _content(done: _Done) -> dict[str, Any]:
    options, seen, plan, errors = done.options, done.seen, done.plan, done.errors

    def entry(each: Checkpoint, word: str) -> dict[str, Any]:
        return {
            "path": each.path,
            "step": each.step,
            "verdict": each.verdict.status,
            "metric": seen.metrics.get(each.step),
            word: options.yes and each.step not in errors,
            "error": errors.get(each.step),
        }

    return {
        "dir": options.dir,
        "dry_run": not options.yes,
        "bytes": done.freed,
        "delete": [entry(each, "deleted") for each in plan.delete],
        "weights_only": [entry(each, "reduced") for each in done.reduction.reduce],
        "keep": [
            {"path": each.path, "step": each.step, "why": plan.reasons[each.step]}
            for each in seen.found
            if each.step in plan.reasons
        ],
        "notes": _notes(done),
    }


def _rows(done: _Done) -> list[list[str]]:
    reduced = {each.step for each in done.reduction.reduce}
    deleted = "deleted" if done.options.yes else "delete"
    rows = []
    for each in done.seen.found:
        kept, error = done.plan.reasons.get(each.step), done.errors.get(each.step)
        what = "keep weights" if each.step in reduced else "keep" if kept else deleted
        why = error or kept or f"{each.verdict.status}, and no rule keeps it"
        rows.append([os.path.basename(each.path), "failed" if error else what, why])
    return rows


def _lines(done: _Done) -> list[str]:
    options, rows = done.options, _rows(done)
    lines = [table(["checkpoint", "what", "why"], rows)] if rows else []
    lines += [printable(note) for note in _notes(done)]
    deleted = sum(each.step not in done.errors for each in done.plan.delete)
    reduced = sum(each.step not in done.errors for each in done.reduction.reduce)
    also = f", reduced {reduced} to their weights" if reduced else ""
    if options.yes:
        return [*lines, f"Deleted {_count(deleted)}{also}, {size_in_words(done.freed)}."]
    if not deleted and not reduced:
        return [*lines, "There is nothing to delete."]
    also = also.replace("reduced", "reduce")
    return [
        *lines,
        f"Nothing was deleted. To delete {_count(deleted)}{also} and free {size_in_words(done.freed)}:",
        f"  hf-divguard prune {printable(shlex.quote(options.dir))} {_rules(options)} --yes",
    ]


def _count(checkpoints: int) -> str:
    return f"{checkpoints} checkpoint{'' if checkpoints == 1 else 's'}"


def _rules(options: Any) -> str:
    rules = f"--keep-last {options.keep_last} --keep-best {options.keep_best}"
    rules += f" --every {options.every}" if options.every else ""
    if options.weights_only_older_than is not None:
        rules += f" --weights-only-older-than {shlex.quote(options.weights_only_older_than)}"
    if options.metric:
        rules += f" --metric {shlex.quote(options.metric)}"
    if options.greater is not None:
        rules += " --greater-is-better" if options.greater else " --lower-is-better"
    return rules
