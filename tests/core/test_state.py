"""State goes to strict JSON and back, and a state that does not fit is refused in one sentence."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest

from hf_divguard.core.state import StateError, Stateful, decode, encode, memory


@dataclass(frozen=True)
class Point:
    x: int
    y: float | None


@dataclass
class Inner(Stateful):
    label: str = "none"
    count: int = memory(0)


@dataclass
class Outer(Stateful):
    limit: float = 1.0
    inner: Inner = memory(Inner)
    by_name: dict[str, Inner] = memory(dict)
    points: list[Point] = memory(list)
    _recent: deque[tuple[int, float | None]] = memory(lambda: deque(maxlen=2))


def filled() -> Outer:
    outer = Outer(limit=7.0)
    outer.inner.count, outer.by_name = 3, {"a": Inner()}
    outer.points.append(Point(1, 2.5))
    outer._recent.extend([(1, 0.5), (2, None), (3, math.nan)])
    return outer


def test_a_memory_survives_json_and_settings_stay_as_constructed() -> None:
    state = json.loads(json.dumps(filled().state_dict(), allow_nan=False))
    other = Outer(limit=9.0)
    other.inner.label = "mine"
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert (other.limit, other.inner.label, other.inner.count) == (9.0, "mine", 3)
    assert other.points == [Point(1, 2.5)]
    assert list(other._recent) == [(2, None), (3, None)]
    other._recent.append((4, 1.0))
    assert len(other._recent) == 2


def test_the_memory_starts_from_its_defaults_and_a_reset_returns_to_them() -> None:
    outer = filled()
    outer.reset()
    assert outer.state_dict() == Outer().state_dict()
    assert Outer().inner is not Outer().inner


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner": 7}, "`inner` in the state of Outer must be .*Inner.*, got 7"),
        ({"inner": {"count": 1.5}}, "`count` in the state of Inner must be a whole number, got 1.5"),
        ({"inner": {"count": True}}, "must be a whole number, got True"),
        ({"inner": {}}, r"The state of Inner must hold \['count'\], but holds only \[\]"),
        ({"points": [{"x": 1}]}, r"The state of Point must hold \['y'\]"),
        (
            {"points": [{"x": 1, "y": math.inf}]},
            "`y` in the state of Point must be a finite number or null, got inf",
        ),
        ({"points": [{"x": 1, "y": "2"}]}, "must be a finite number or null, got '2'"),
        ({"recent": "text"}, "`recent` in the state of Outer must be a list, got 'text'"),
        ({"recent": [[1]]}, "`recent` in the state of Outer must be"),
        ({"by_name": []}, "`by_name` in the state of Outer must be"),
    ],
)
def test_a_state_of_another_type_is_refused_and_changes_nothing(
    changes: dict[str, Any], message: str
) -> None:
    outer = filled()
    before = outer.state_dict()
    with pytest.raises(StateError, match=message):
        outer.load_state_dict({**before, "limit": 3.0, **changes})
    assert outer.state_dict() == before


@pytest.mark.parametrize("state", [None, [], "text"], ids=repr)
def test_a_state_that_is_no_mapping_is_refused(state: Any) -> None:
    with pytest.raises(StateError, match="The state of Outer must be a mapping"):
        Outer().load_state_dict(state)


def test_frozen_records_go_to_json_and_back() -> None:
    point = Point(3, 0.5)
    assert encode(point) == {"x": 3, "y": 0.5}
    assert decode(Point, encode(point), "`point`") == point
    assert encode(Point(1, math.inf)) == {"x": 1, "y": None}
