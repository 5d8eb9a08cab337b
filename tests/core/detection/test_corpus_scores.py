"""The adaptive rule keeps its scores on the labelled runs."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from statistics import fmean

import pytest

from benchmarks.detection.evaluate import errors_of
from benchmarks.detection.peers import PEERS, KillLossSpike, PageHinkley, StabilityMonitor
from benchmarks.detection.runs import Run, Score, observations, read_runs, score
from hf_divguard.core.detection.registry import make_rule

pytestmark = pytest.mark.slow


@cache
def runs(generated: bool) -> list[Run]:
    return [run for run in read_runs() if run.is_generated is generated]


@cache
def adaptive(generated: bool, every: int) -> Score:
    return score(errors_of("adaptive"), runs(generated), every)


def test_at_every_step_it_finds_nearly_all_that_fail_and_soon() -> None:
    reached = adaptive(True, 1)
    assert reached.recall >= 0.97
    assert reached.false <= 0.02
    assert reached.premature <= 0.01
    assert reached.delay <= 10


def test_on_logs_of_every_tenth_step_it_finds_nearly_all_that_fail() -> None:
    reached = adaptive(True, 10)
    assert reached.recall >= 0.93
    assert reached.false <= 0.02
    assert reached.premature <= 0.01


def test_on_very_coarse_logs_it_is_silent_rather_than_wrong() -> None:
    assert adaptive(True, 50).false <= 0.02


def test_on_histories_of_others_it_accuses_no_healthy_run() -> None:
    reached = adaptive(False, 1)
    assert reached.recall >= 0.85
    assert reached.false == 0.0
    assert reached.premature == 0.0


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("name", [name for name in PEERS if name != "river ADWIN"])
def test_no_other_rule_finds_more_with_fewer_false_alarms(name: str, every: int) -> None:
    peer = score(PEERS[name], runs(True), every)
    assert peer.recall < adaptive(True, every).recall
    assert peer.false > adaptive(True, every).false or peer.recall < 0.3


def test_the_re_stated_rules_score_as_their_authors_formulas_say() -> None:
    """Scores of three of them, worked out independently of this bench."""
    for rule, false, recall in ((KillLossSpike, 0.206, 0.464), (PageHinkley, 0.194, 0.732)):
        reached = score(rule, runs(True))
        assert (round(reached.false, 3), round(reached.recall, 3)) == (false, recall)
    assert round(score(StabilityMonitor, runs(True)).false, 3) == 0.367


def test_overfitting_is_warned_about_from_the_evaluations_and_never_an_error() -> None:
    warned = defaultdict(list)
    for run in (run for generated in (True, False) for run in runs(generated)):
        if run.label != "overfit_eval":
            continue
        rule = make_rule("adaptive")
        found = []
        for step, loss, norm in observations(run):
            found.append(rule.observe(step, loss, norm))  # type: ignore[call-arg]
            if step in run.evaluations:
                found.append(rule.observe_eval(step, run.evaluations[step]))  # type: ignore[attr-defined]
        assert not [finding for finding in found if finding and finding.severity == "error"], run.name
        warned[run.family].append(any(finding and finding.kind == "eval_climb" for finding in found))
    assert fmean(fmean(values) for values in warned.values()) >= 0.6


def test_the_memory_stays_strict_json_on_every_run() -> None:
    for run in runs(True)[::7]:
        rule = make_rule("adaptive")
        for step, loss, norm in observations(run):
            rule.observe(step, loss, norm)  # type: ignore[call-arg]
        assert len(json.dumps(rule.state_dict(), allow_nan=False)) < 40_000
