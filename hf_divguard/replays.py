"""Run a detection rule over an existing training history, and list what it would have reported."""

from __future__ import annotations

import copy
import inspect
import statistics
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from hf_divguard.core.detection.detector import Rule
from hf_divguard.core.detection.registry import make_rule
from hf_divguard.core.findings import Finding
from hf_divguard.errors import HistoryError
from hf_divguard.history import History, HistorySource, read_history

__all__ = ["ReplayedFindings", "replay"]

_RULE_OF_DETECTOR = {
    "AdaptiveDivergenceDetector": "adaptive",
    "DualTimeScaleDivergenceDetector": "ema",
    "DualWindowDivergenceDetector": "window",
    "NonFiniteDetector": "nonfinite",
}


_MOST_KINDS_OF_ENTRIES = 1000


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
    history: HistorySource, detector: Any = "adaptive", *, metric_key: str = "loss", **params: Any
) -> ReplayedFindings:
    """Return what a detector finds in a training history. Needs neither torch nor transformers.

    Args:
        history: Path of a ``trainer_state.json``, of a checkpoint or of an output folder (its
            furthest ``trainer_state.json`` is taken); a ``log_history`` list; or a mapping of
            plain sequences: ``loss``, and where known ``steps``, ``grad_norm``, and
            ``eval_loss`` with ``eval_steps``.
        detector: ``"adaptive"``, ``"ema"``, ``"window"``, ``"nonfinite"``, a detector class or
            its name, or a detector whose settings are taken (its memory is not used).
        metric_key: Log key to watch. ``adaptive`` and ``nonfinite`` see evaluation losses too.
        params: Parameters of the rule; those not given keep their defaults.

    Returns:
        A list of findings, whose ``notes`` say what the history cannot show.

    Raises:
        HistoryError: If the history cannot be read, or holds no value of ``metric_key``.
        ValueError: If there is no such detector, or it refuses a parameter's value.
        TypeError: If the detector has no such parameter.

    Example:
        >>> loss = [2.0 + 2.0 / (1 + step) for step in range(60)] + [6.0] * 20
        >>> found = replay({"steps": range(80), "loss": loss, "grad_norm": [1.0] * 80})
        >>> for finding in found.errors:
        ...     print(finding.kind, finding.onset_step, finding.step)
        jump 60 64
        >>> replay({"steps": range(80), "loss": loss}, detector="ema", threshold=1.0).errors[0].step
        68
    """
    rule = _rule_of(detector, metric_key, params)
    metric = rule.metric_key
    read = read_history(history)
    observe_eval = getattr(rule, "observe_eval", None)
    takes_gradients = "grad_norm" in inspect.signature(rule.observe).parameters and metric == "loss"
    findings: list[Finding] = []
    steps: list[int] = []
    steps_decrease = has_evaluations = False
    observe: Any = rule.observe
    evaluation_losses = _EvaluationLosses()
    for step, values in read.entries:
        if metric in values:
            if steps and step < steps[-1]:
                steps_decrease = True
                getattr(rule, "start_grace", lambda values: None)(0)
            steps.append(step)
            if takes_gradients:
                found = observe(step, values[metric], values.get("grad_norm"))
            else:
                found = observe(step, values[metric])
            if found:
                findings.append(found)
        if observe_eval is not None:
            for key in evaluation_losses[tuple(values)]:
                has_evaluations = True
                if key != metric:
                    found = observe_eval(step, values[key], metric_key=key)
                    findings += [found] if found else []
    if not steps and not (has_evaluations and metric == "loss"):
        keys = sorted({key for entry in read.entries for key in entry.values})
        raise HistoryError(f"The history holds no `{metric}`. Its keys are: {', '.join(keys)}.")
    notes = _notes(read, steps, metric=metric, takes_gradients=takes_gradients, steps_decrease=steps_decrease)
    return ReplayedFindings(findings, notes=notes, n_values=len(steps))


def _rule_of(detector: Any, metric_key: str, params: dict[str, Any]) -> Rule:
    """Return a rule without memory for a name, a detector class, a detector or a rule."""
    name = getattr(detector, "__name__", detector)
    if isinstance(name, str):
        return make_rule(_RULE_OF_DETECTOR.get(name, name), metric_key=metric_key, **params)
    rule = copy.deepcopy(getattr(detector, "rule", detector))
    if not isinstance(rule, Rule):
        raise TypeError(
            f"`detector` must be a name, a detector class, a detector or a rule, got {detector!r}."
        )
    if params:
        raise TypeError(
            f"Settings are given with a name only; {type(detector).__name__} has its own, got also {sorted(params)}."
        )
    rule.reset()
    return rule


class _EvaluationLosses(dict[tuple[str, ...], list[str]]):
    """The keys of evaluation losses among the keys of an entry: ``eval_loss``, and ``eval_<set>_loss`` of each set."""

    def __missing__(self, keys: tuple[str, ...]) -> list[str]:
        sets = [f"{key.removesuffix('_runtime')}_loss" for key in keys if key.endswith("_runtime")]
        losses = [key for key in keys if key == "eval_loss" or (key.startswith("eval_") and key in sets)]
        if len(self) < _MOST_KINDS_OF_ENTRIES:
            self[keys] = losses
        return losses


def _notes(
    read: History, steps: list[int], *, metric: str, takes_gradients: bool, steps_decrease: bool
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
            "There is no `grad_norm`: a loss of 0.0 that stands in for NaN is known only after five in a row, and it "
            "takes longer to separate a high loss that recovers from one that is stuck."
        )
    if steps_decrease:
        notes.append("The steps decrease at least once: what was suspected up to there was dropped.")
    if steps and len(steps) < 12:
        notes.append(
            f"There are only {len(steps)} values: the level of a run is judged from the sixth on, and a rise needs three "
            "more values."
        )
    return notes
