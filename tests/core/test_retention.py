"""Policies against an oracle that is written the long way round."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_divguard.core.retention import AnyOf, BestN, CheckpointRecord, LatestN, is_better, rank

NAN, INF = math.nan, math.inf


def records_of(*metrics: float | None) -> list[CheckpointRecord]:
    """Return records of steps 1, 2, ... with these metrics, saved in that order."""
    return [CheckpointRecord(step, step, metric) for step, metric in enumerate(metrics, start=1)]


def steps(records: Sequence[CheckpointRecord]) -> list[int]:
    return [record.step for record in records]


metrics = st.one_of(
    st.none(),
    st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 0.5, 1.0, -1.0]),
    st.floats(allow_nan=False, allow_infinity=False),
)


@st.composite
def ledgers(draw: st.DrawFn) -> list[CheckpointRecord]:
    values = draw(st.lists(st.tuples(metrics, st.booleans()), max_size=9))
    numbers = draw(st.permutations(range(1, len(values) + 1)))
    return [
        CheckpointRecord(step, numbers[step - 1], metric, in_lineage)
        for step, (metric, in_lineage) in enumerate(values, start=1)
    ]


def beats(first: CheckpointRecord, second: CheckpointRecord, greater: bool) -> bool:
    assert first.metric is not None
    assert second.metric is not None
    if math.isfinite(first.metric) != math.isfinite(second.metric):
        return math.isfinite(first.metric)
    if math.isfinite(first.metric) and first.metric != second.metric:
        return (first.metric > second.metric) is greater
    return first.step > second.step


@given(ledgers(), st.booleans())
def test_the_ranking_is_the_one_that_pairwise_comparison_gives(
    records: list[CheckpointRecord], greater: bool
) -> None:
    ranked = rank(records, greater_is_better=greater)
    assert {r.step for r in ranked} == {r.step for r in records if r.metric is not None and r.in_lineage}
    for number, first in enumerate(ranked):
        for second in ranked[number + 1 :]:
            assert beats(first, second, greater)


@given(ledgers(), st.booleans(), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 5)))
def test_the_union_keeps_exactly_the_last_and_the_best(
    records: list[CheckpointRecord], greater: bool, n: int, limit: int | None
) -> None:
    kept = AnyOf((LatestN(limit), BestN(n, greater))).keep(records)
    expected = set()
    for record in records:
        newer = sum(other.sequence > record.sequence for other in records)
        if limit is None or newer < limit:
            expected.add(record.step)
        if record.metric is not None and record.in_lineage:
            rivals = [r for r in records if r.metric is not None and r.in_lineage and r is not record]
            if sum(beats(rival, record, greater) for rival in rivals) < n:
                expected.add(record.step)
    assert kept == expected
    assert limit is None or len(kept) <= limit + n


@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_score_that_is_not_finite_ranks_last_in_both_directions(bad: float, greater: bool) -> None:
    ranked = rank(records_of(bad, 0.5, 1e300, -1e300), greater_is_better=greater)
    assert steps(ranked)[-1] == 1


@pytest.mark.parametrize("greater", [True, False])
def test_on_a_tie_the_later_step_wins(greater: bool) -> None:
    assert steps(rank(records_of(0.5, 0.5, 0.5), greater_is_better=greater)) == [3, 2, 1]
    assert steps(rank(records_of(NAN, INF, -INF), greater_is_better=greater)) == [3, 2, 1]


def test_a_checkpoint_without_a_metric_of_its_own_step_is_never_best() -> None:
    assert BestN(5, greater_is_better=False).keep(records_of(None, 0.9, None)) == {2}


def test_a_checkpoint_of_another_run_is_never_best() -> None:
    stranger = CheckpointRecord(700, 1, 0.0, in_lineage=False)
    assert BestN(5, greater_is_better=False).keep([stranger, *records_of(0.9)]) == {1}


def test_age_is_the_order_of_saving_and_not_the_step() -> None:
    old_run = [CheckpointRecord(700, 1), CheckpointRecord(800, 2)]
    assert LatestN(1).keep([*old_run, CheckpointRecord(100, 3)]) == {100}
    assert LatestN(2).keep([*old_run, CheckpointRecord(100, 3)]) == {100, 800}


def test_without_a_limit_everything_stays() -> None:
    assert LatestN(None).keep(records_of(None, None, None)) == {1, 2, 3}
    assert LatestN(1).keep([]) == set()


@pytest.mark.parametrize(
    ("metric", "best", "greater", "expected"),
    [
        (0.4, 0.5, False, True),
        (0.4, 0.5, True, False),
        (0.5, 0.5, True, False),
        (0.5, 0.5, False, False),
        (0.5, None, True, True),
        (0.5, NAN, True, True),
        (NAN, 0.5, True, False),
        (NAN, None, False, False),
        (INF, 0.5, True, False),
        (-INF, 0.5, False, False),
        (-INF, None, False, False),
    ],
)
def test_only_a_finite_and_strictly_better_score_is_better(
    metric: float, best: float | None, greater: bool, expected: bool
) -> None:
    assert is_better(metric, best, greater_is_better=greater) is expected
