"""The commands ``list``, ``best``, ``latest`` and ``verify``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from hf_divguard.cli.condition import Condition, condition_of
from hf_divguard.cli.exits import CANNOT_ANSWER, NO, OK, USAGE, CommandError
from hf_divguard.cli.folders import age_of, open_folder, run_folder, saved_at
from hf_divguard.cli.keeping import Plan, Survey, survey
from hf_divguard.cli.needed import needed_steps
from hf_divguard.cli.output import (
    duration_in_words,
    number_in_words,
    print_json,
    printable,
    size_in_words,
    table,
)
from hf_divguard.cli.parsers import DEFAULT_KEEP_BEST, DEFAULT_KEEP_LAST
from hf_divguard.cli.records import Divergence
from hf_divguard.errors import CheckpointError
from hf_divguard.storage.checkpoints import latest_complete_checkpoint
from hf_divguard.storage.integrity import verify_checkpoint
from hf_divguard.storage.names import checkpoint_folders, checkpoint_step
from hf_divguard.storage.survey import Checkpoint
from hf_divguard.storage.verdict import Verdict

__all__ = ["kept_rows", "run_best", "run_latest", "run_list", "run_verify"]


def run_list(options: Any) -> int:
    """List the checkpoints of a run."""
    seen = survey(run_folder(options.dir), options.metric, options.greater)
    condition = condition_of(seen)
    rows = kept_rows(seen, condition, options.keep_last, options.keep_best, options.every)
    if options.json:
        content = {"dir": options.dir, "metric": seen.metric_key, "greater_is_better": seen.greater_is_better}
        print_json("list", {**content, "checkpoints": rows})
        return OK
    if not rows:
        print(f"{printable(options.dir)} holds no checkpoints.")
        return OK
    head = ["step", seen.metric_key or "metric", "age", "size", "verdict", "why it is kept"]
    cells = [
        [
            row["step"],
            number_in_words(row["metric"]),
            "-" if row["age_seconds"] is None else duration_in_words(row["age_seconds"]),
            size_in_words(row["bytes"]),
            row["verdict"],
            row["kept"] or "not kept: `prune` would delete it",
        ]
        for row in rows
    ]
    print(table(head, cells, right=f"step {head[1]} age size"))
    for each in seen.found:
        if each.verdict.status != "complete":
            print(f"{printable(os.path.basename(each.path))}: {printable(each.verdict.reason)}")
    fault = condition.divergence
    damaged = [each for each in seen.complete if condition.was_saved_under_the_fault(each)]
    if fault is not None and damaged:
        print(f"Saved after the fault had begun (step {fault.onset_step}): {_names(damaged)}.")
    if seen.greater_is_better is None:
        print(f"Nothing is ranked: {_unknown_direction(seen.metric_key)}")
    return OK


def kept_rows(
    seen: Survey,
    condition: Condition,
    keep_last: int = DEFAULT_KEEP_LAST,
    keep_best: int = DEFAULT_KEEP_BEST,
    every: int | None = None,
) -> list[dict[str, Any]]:
    """Return what is known of each checkpoint, and why it is kept by these rules."""
    plan = Plan(keep_last, keep_best, every, needed_steps(seen, condition)).make(seen)
    return [
        _row(each, seen, plan) | {"under_fault": condition.was_saved_under_the_fault(each)}
        for each in seen.found
    ]


def _row(each: Checkpoint, seen: Survey, plan: Plan) -> dict[str, Any]:
    saved = saved_at(each.path)
    return {
        "path": each.path,
        "step": each.step,
        "metric": seen.metrics.get(each.step),
        "saved_at": saved,
        "age_seconds": age_of(saved),
        "bytes": seen.usage.size_of(each.path),
        "verdict": each.verdict.status,
        "reason": each.verdict.reason,
        "resumable": each.verdict.resumable,
        "run_id": each.run_id,
        "kept": plan.reasons.get(each.step),
    }


def _unknown_direction(metric: str) -> str:
    return (
        f"whether a greater `{metric}` is better is not known. Add --greater-is-better or --lower-is-better."
    )


def run_best(options: Any) -> int:
    """Print the paths of the best checkpoints."""
    if options.n < 1:
        raise CommandError(f"`-n` must be at least 1, got {options.n}.", USAGE)
    seen = survey(run_folder(options.dir), options.metric, options.greater)
    if seen.greater_is_better is None:
        raise CommandError(f"Nothing is ranked: {_unknown_direction(seen.metric_key)}", USAGE)
    condition = condition_of(seen)
    fault = _fault_by_replay(condition)
    sound = [each for each in seen.best if fault is None or not condition.was_saved_under_the_fault(each)]
    # The list was made by sizes alone.
    best = [each for each in sound if verify_checkpoint(each.path).status == "complete"][: options.n]
    if fault is not None and len(sound) < len(seen.best):
        _warn_of(fault, [each for each in seen.best if each not in sound])
    if not best:
        unsound = fault is not None and bool(seen.best) and not sound
        raise CommandError("No other is ranked." if unsound else _nothing_ranked(options.dir, seen), NO)
    if options.json:
        shown = [{"path": each.path, "step": each.step, "metric": each.metric} for each in best]
        print_json(
            "best",
            {"metric": seen.metric_key, "greater_is_better": seen.greater_is_better, "checkpoints": shown},
        )
    else:
        _print_paths([each.path for each in best])
    return OK


def _nothing_ranked(run_dir: str, seen: Survey) -> str:
    if not seen.found:
        return f"`{run_dir}` holds no checkpoints."
    if not seen.complete:
        return f"None of the {len(seen.found)} checkpoints in `{run_dir}` is complete. `hf-divguard list` says why."
    return (
        f"No complete checkpoint in `{run_dir}` was evaluated at its own step with `{seen.metric_key}`. "
        "Name another metric with --metric; in future runs set `eval_on_save=True`."
    )


def _print_paths(paths: list[str]) -> None:
    """Print paths as they are: they are read by programs."""
    sys.stdout.flush()
    for path in paths:
        os.write(sys.stdout.fileno(), os.fsencode(path) + b"\n")


def run_latest(options: Any) -> int:
    """Print the path of the newest complete checkpoint."""
    folder = run_folder(options.dir)
    try:
        newest = latest_complete_checkpoint(folder)
    except CheckpointError as error:
        raise CommandError(str(error), CANNOT_ANSWER) from error
    if newest is None:
        there = len(checkpoint_folders(folder))
        raise CommandError(
            f"None of the {there} checkpoints in `{options.dir}` is complete and good. `hf-divguard list` says why."
            if there
            else f"`{options.dir}` holds no checkpoints.",
            NO,
        )
    newest = _newest_sound(newest, folder)
    if options.json:
        print_json(
            "latest", {"path": newest.path, "step": newest.step, "resumable": newest.verdict.resumable}
        )
    else:
        _print_paths([newest.path])
    return OK


def _newest_sound(newest: Checkpoint, folder: str) -> Checkpoint:
    """Return ``newest``, or what ``status`` takes if a replay of the log shows that it was saved after a fault."""
    seen = survey(folder, None, None)
    condition = condition_of(seen)
    fault = _fault_by_replay(condition)
    if fault is None or not condition.was_saved_under_the_fault(newest):
        return newest
    _warn_of(fault, [each for each in seen.complete if condition.was_saved_under_the_fault(each)])
    if condition.take is None:
        raise CommandError(f"No checkpoint can be taken: {condition.take_reason}.", NO)
    return condition.take


def _fault_by_replay(condition: Condition) -> Divergence | None:
    """Return the lasting fault that a replay of the log found: no checkpoint of such a run is marked."""
    fault = condition.divergence
    return fault if fault is not None and fault.source == "replay" else None


def _names(checkpoints: Sequence[Checkpoint]) -> str:
    names = [os.path.basename(each.path) for each in checkpoints]
    return printable(", ".join(names[-3:]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""))


def _warn_of(fault: Divergence, passed: Sequence[Checkpoint]) -> None:
    print(
        f"hf-divguard: passed over {_names(passed)}: a replay of the log finds a fault from step "
        f"{fault.onset_step} on. {printable(fault.message)}",
        file=sys.stderr,
    )


def run_verify(options: Any) -> int:
    """Check whether checkpoints are complete."""
    paths = [each for path in options.paths for each in _checkpoints_in(path)]
    judged = [(path, verify_checkpoint(path, checksums=options.checksum)) for path in paths]
    if options.json:
        print_json(
            "verify", {"checksum": options.checksum, "checkpoints": [_judged(*each) for each in judged]}
        )
    else:
        cells = [[path, verdict.status, verdict.reason] for path, verdict in judged]
        print(table(["checkpoint", "verdict", "reason"], cells))
    return OK if all(verdict.status == "complete" for _, verdict in judged) else NO


def _checkpoints_in(path: str) -> list[str]:
    open_folder(path, "a checkpoint or the output folder of a run")
    if checkpoint_step(os.path.basename(os.path.abspath(path))) is None:
        folders = checkpoint_folders(path)
        if folders:
            return [os.fspath(each) for each in folders.values()]
        if not _looks_like_checkpoint(path):
            run_folder(path)
            raise CommandError(f"`{path}` holds no checkpoints.")
    return [path]


def _looks_like_checkpoint(path: str) -> bool:
    """Return whether weights stand in the folder: a checkpoint may have been renamed."""
    return any(
        name.endswith((".safetensors", ".bin", ".pt", ".pth")) or name.startswith("divguard_")
        for name in os.listdir(path)
    )


def _judged(path: str, verdict: Verdict) -> dict[str, Any]:
    return {
        "path": path,
        "verdict": verdict.status,
        "reason": verdict.reason,
        "problems": list(verdict.problems),
        "loadable": verdict.loadable,
        "resumable": verdict.resumable,
        "has_manifest": verdict.has_manifest,
    }
