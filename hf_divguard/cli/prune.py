"""The command ``prune``: deletes checkpoints that no rule keeps."""

from __future__ import annotations

import os
import shlex
from typing import Any

from hf_divguard.cli.condition import condition_of
from hf_divguard.cli.exits import NO, OK, USAGE, CommandError
from hf_divguard.cli.folders import disk_usage, run_folder
from hf_divguard.cli.keeping import Plan, Survey, survey
from hf_divguard.cli.needed import needed_steps
from hf_divguard.cli.output import print_json, printable, size_in_words, table
from hf_divguard.storage.deletion import delete_checkpoint
from hf_divguard.storage.survey import Checkpoint, look_at

__all__ = ["run_prune"]


def run_prune(options: Any) -> int:
    """Delete what neither the last nor the best keep, or list it."""
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
    usage = disk_usage(each.path for each in plan.delete)
    errors = _delete(plan.delete, seen) if options.yes else {}
    freed = usage.freed_by(each.path for each in plan.delete if each.step not in errors)
    notes = _notes(options, seen)
    if options.json:
        print_json("prune", _content(options, plan, seen, freed, errors, notes))
    else:
        print("\n".join(_lines(options, plan, seen, freed, errors, notes)))
    return NO if errors else OK


def _delete(surplus: list[Checkpoint], seen: Survey) -> dict[int, str]:
    """Delete ``surplus``, worst first; return why some could not be, by step."""
    errors: dict[int, str] = {}
    for each in surplus:
        # A run may be saving into this folder: it must be what was judged.
        now = look_at(each.path, each.step)
        if now.sequence != each.sequence or now.verdict.status != each.verdict.status:
            errors[each.step] = "it has changed since it was looked at; it was left alone"
            continue
        try:
            delete_checkpoint(each.path, seen.run_dir)
        except (OSError, ValueError) as error:
            errors[each.step] = str(error)
    return errors


def _notes(options: Any, seen: Survey) -> list[str]:
    notes = []
    if options.keep_best and seen.complete and not seen.best:
        notes.append(f"No checkpoint has a `{seen.metric_key}` of its own step, so none is kept as the best.")
    if seen.found and not seen.complete:
        notes.append("No checkpoint is complete, so none is deleted.")
    return notes


def _content(
    options: Any, plan: Plan, seen: Survey, freed: int, errors: dict[int, str], notes: list[str]
) -> dict[str, Any]:
    return {
        "dir": options.dir,
        "dry_run": not options.yes,
        "bytes": freed,
        "delete": [
            {
                "path": each.path,
                "step": each.step,
                "verdict": each.verdict.status,
                "metric": seen.metrics.get(each.step),
                "deleted": options.yes and each.step not in errors,
                "error": errors.get(each.step),
            }
            for each in plan.delete
        ],
        "keep": [
            {"path": each.path, "step": each.step, "why": plan.reasons[each.step]}
            for each in seen.found
            if each.step in plan.reasons
        ],
        "notes": notes,
    }


def _lines(
    options: Any, plan: Plan, seen: Survey, freed: int, errors: dict[int, str], notes: list[str]
) -> list[str]:
    done = "delete" if not options.yes else "deleted"
    rows = [
        [
            os.path.basename(each.path),
            "keep" if each.step in plan.reasons else ("failed" if each.step in errors else done),
            plan.reasons.get(each.step) or errors.get(each.step) or each.verdict.status,
        ]
        for each in seen.found
    ]
    lines = [table(["checkpoint", "what", "why"], rows)] if rows else []
    lines += [printable(note) for note in notes]
    count = len(plan.delete) - len(errors)
    if options.yes:
        return [*lines, f"Deleted {count} checkpoints, {size_in_words(freed)}."]
    if not plan.delete:
        return [*lines, "There is nothing to delete."]
    rules = f"--keep-last {options.keep_last} --keep-best {options.keep_best}"
    rules += f" --every {options.every}" if options.every else ""
    if options.metric:
        rules += f" --metric {shlex.quote(options.metric)}"
    if options.greater is not None:
        rules += " --greater-is-better" if options.greater else " --lower-is-better"
    return [
        *lines,
        f"Nothing was deleted. To delete {count} checkpoints and free {size_in_words(freed)}:",
        f"  hf-divguard prune {printable(shlex.quote(options.dir))} {rules} --yes",
    ]
