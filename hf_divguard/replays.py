"""Run a detection rule over a history that is already there, and see what it would have said."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from hf_divguard.core.detection.registry import make_rule
from hf_divguard.core.findings import Finding
from hf_divguard.errors import HistoryError
from hf_divguard.history import Entry, History, HistorySource, read_history

__all__ = ["ReplayedFindings", "replay"]


class ReplayedFindings(list[Finding]):
    """The findings of a replay, in the order of their steps.

    Args:
        findings: What the rule found.
        notes: Sentences about what the history cannot show.
        n_values: Number of training values the rule was fed.
    """

    def __init__(
        self, findings: Iterable[Finding] = (), *, notes: Iterable[str] = (), n_values: int = 0
    ) -> None:
        super().__init__(findings)
        self.notes = list(notes)
        self.n_values = n_values

    @property
    def errors(self) -> list[Finding]:
        """The findings on which a run would have been stopped, aborted or rolled back."""
        return [finding for finding in self if finding.severity == "error"]


def replay(
    history: HistorySource, detector: str = "adaptive", *, metric: str = "loss", **params: Any
) -> ReplayedFindings:
    """Return what a detector finds in a training history. Needs neither torch nor transformers.

    Args:
        history: Path of a ``trainer_state.json``, of a checkpoint or of an output folder (its
            furthest ``trainer_state.json`` is taken); a ``log_history`` list; or a mapping of
            plain sequences: ``loss``, and where known ``steps``, ``grad_norm``, and
            ``eval_loss`` with ``eval_steps``.
        detector: ``"adaptive"``, ``"ema"``, ``"window"``, ``"nonfinite"``, or the name of a
            detector class.
        metric: Log key to watch. ``adaptive`` and ``nonfinite`` see evaluation losses besides.
        params: Parameters of the rule; those not given keep their defaults.

    Returns:
        A list of findings, whose ``notes`` tell what the history cannot show.

    Raises:
        HistoryError: If the history cannot be read, or holds no value of ``metric``.
        ValueError: If there is no such detector, or it refuses a parameter's value.
        TypeError: If the detector has no such parameter.

    Example:
        >>> loss = [2.0 + 2.0 / (1 + step) for step in range(60)] + [6.0] * 20
        >>> found = replay({"steps": range(80), "loss": loss, "grad_norm": [1.0] * 80})
        >>> for finding in found.errors:
        ...     print(finding.kind, finding.onset_step, finding.step)
        jump 60 68
        >>> replay({"steps": range(80), "loss": loss}, detector="ema", threshold=1.0).errors[0].step
        68
    """
    rule = make_rule(detector, metric=metric, **params)
    read = read_history(history)
    observe_eval = getattr(rule, "observe_eval", None)
    takes_gradients = "grad_norm" in inspect.signature(rule.observe).parameters and metric == "loss"
    findings: list[Finding] = []
    steps: list[int] = []
    went_back = False
    for entry in read.entries:
        if steps and entry.step < steps[-1] and metric in entry.values:
            went_back = True
            getattr(rule, "start_grace", lambda n_values: None)(0)
        if metric in entry.values:
            steps.append(entry.step)
            value = entry.values[metric]
            if takes_gradients:
                observe: Any = rule.observe
                found = observe(entry.step, value, entry.values.get("grad_norm"))
            else:
                found = rule.observe(entry.step, value)
            findings += [found] if found else []
        if observe_eval is not None:
            for key in _evaluation_losses(entry):
                if key != metric:
                    found = observe_eval(entry.step, entry.values[key], metric=key)
                    findings += [found] if found else []
    has_evaluations = observe_eval is not None and any(_evaluation_losses(entry) for entry in read.entries)
    if not steps and not (has_evaluations and metric == "loss"):
        keys = sorted({key for entry in read.entries for key in entry.values})
        raise HistoryError(f"The history holds no `{metric}`. Its keys are: {', '.join(keys)}.")
    notes = _notes(read, steps, metric=metric, takes_gradients=takes_gradients, went_back=went_back)
    return ReplayedFindings(findings, notes=notes, n_values=len(steps))


def _evaluation_losses(entry: Entry) -> list[str]:
    """Return the keys of evaluation losses: ``eval_loss``, and ``eval_<set>_loss`` of each set."""
    sets = [f"{key.removesuffix('_runtime')}_loss" for key in entry.values if key.endswith("_runtime")]
    return [key for key in entry.values if key == "eval_loss" or (key.startswith("eval_") and key in sets)]


def _notes(
    read: History, steps: list[int], *, metric: str, takes_gradients: bool, went_back: bool
) -> list[str]:
    notes = list(read.notes)
    gaps = [after - before for before, after in pairwise(steps) if after > before]
    gap = statistics.median(gaps) if gaps else 1
    if read.has_steps and gap > 1 and metric == "loss":
        notes.append(
            f"Entries are {gap:g} steps apart, and a logged loss is the mean since the one before: spikes are flattened, "
            "and single NaN losses may have been filtered out."
        )
    if takes_gradients and not any("grad_norm" in entry.values for entry in read.series(metric)):
        notes.append(
            "There is no `grad_norm`: a loss of 0.0 that stands in for NaN is known only after five in a row, and a "
            "high loss that is being learnt down cannot be told from one that is stuck as early."
        )
    if went_back:
        notes.append("The steps go back at least once: what was suspected up to there was dropped.")
    if steps and len(steps) < 12:
        notes.append(
            f"There are only {len(steps)} values: the level of a run is judged from the sixth on, and a rise needs three "
            "more to be one."
        )
    return notes
