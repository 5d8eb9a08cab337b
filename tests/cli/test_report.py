"""``report``: what the page holds. How it looks and behaves in a browser is in tests/page."""

from __future__ import annotations

import html.parser
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.cli.page.curves import Scale, thinned
from tests.cli.conftest import write_events
from tests.page.runs import HOSTILE_TEXT, write_run

RunOf = Callable[[str], Path]

VOID = {"meta", "link", "br", "img", "input"}


class Reader(html.parser.HTMLParser):
    """Collects the elements of a page, and checks that each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element without content."""
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Check that it is the last one that was opened."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect what a reader sees."""
        self.text += data if not self.open or self.open[-1] not in ("script", "style") else ""


def page_of(cli: Any, folder: Path, tmp_path: Path) -> tuple[str, Reader]:
    target = tmp_path / "page.html"
    answer = cli("report", folder, "-o", target)
    assert answer.code == 0, answer.err
    text = target.read_text()
    return text, Reader(text)


def test_the_page_answers_and_shows_every_curve(cli: Any, run_of: RunOf, tmp_path: Path) -> None:
    text, page = page_of(cli, run_of("rolled"), tmp_path)
    for words in (
        "finished",
        "Training loss",
        "Gradient norm",
        "Learning rate",
        "Evaluation loss",
        "Checkpoints",
    ):
        assert words in page.text
    assert "rollback to step 12" in page.text
    kinds = [attributes.get("class") or "" for _, attributes in page.elements]
    assert "sign rollback" in kinds
    assert kinds.count("save complete") >= 4 * 6  # each checkpoint in each of the four curves
    assert "from_pretrained" in page.text
    assert len(text) < 100_000


def test_a_stopped_run_shows_finding_onset_and_what_to_paste(cli: Any, run_of: RunOf, tmp_path: Path) -> None:
    _, page = page_of(cli, run_of("stopped"), tmp_path)
    assert "diverged" in page.text
    assert "--resume_from_checkpoint" in page.text
    assert "sign found" in [attributes.get("class") for _, attributes in page.elements]


def test_a_stock_run_is_marked_by_a_replay_of_its_log(cli: Any, run_of: RunOf, tmp_path: Path) -> None:
    _, page = page_of(cli, run_of("stock_nan"), tmp_path)
    assert "Found by a replay of the log" in page.text
    assert "sign broken" in [attributes.get("class") for _, attributes in page.elements]


def test_hostile_names_and_texts_are_shown_and_do_nothing(cli: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs")
    message = HOSTILE_TEXT * 3
    write_events(
        folder,
        {
            "event": "stopped",
            "step": 2408,
            "onset_step": 2400,
            "finding": {"message": message, "kind": message},
        },
        {"event": message, "step": message, "time": math.inf, "finding": [message]},
        {"event": "rollback", "step": 5, "target_step": message, "reason": message},
    )
    text, page = page_of(cli, folder, tmp_path)
    names = [name for name, _ in page.elements]
    assert names.count("script") == 2
    assert "img" not in names
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert folder.name in page.text
    assert "\x1b" not in text
    addresses = [attributes.get(key) for _, attributes in page.elements for key in ("src", "href")]
    assert {address for address in addresses if address} == {"data:,"}


def test_a_million_values_give_a_small_page_with_the_extremes(cli: Any, tmp_path: Path) -> None:
    values = [(step, 2.0 + step % 7 / 10) for step in range(1_000_000)]
    values[777_777] = (777_777, 99.0)
    values[123_456] = (123_456, math.nan)
    curve = thinned("loss", values)
    assert len(curve.points) < 1500
    assert (777_777, 99.0) in curve.points
    assert (curve.broken, curve.total) == ([123_456], 1_000_000)
    assert [step for step, _ in curve.points] == sorted(step for step, _ in curve.points)
    folder = write_run(tmp_path, steps=20_000, every=200)
    assert len(page_of(cli, folder, tmp_path)[0]) < 500_000


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [0.0, 0.0], [-1e308, 1e308], [1e-300, 1e300], [5e-324, 1.0], [1.0, 1.0 + 1e-15], [-3.0, 7.0]],
)
def test_every_scale_has_few_ticks_within_it(values: list[float]) -> None:
    scale = Scale.of(values)
    assert len(scale.ticks) <= 12
    for share in (scale.share(tick) for tick in scale.ticks):
        assert -0.01 <= share <= 1.01
    padded = scale.padded()
    for value in values:
        assert -0.001 <= padded.share(max(-1e300, min(1e300, value))) <= 1.001


def test_a_run_without_a_log_still_has_a_page(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    _, page = page_of(cli, tmp_path / "out", tmp_path)
    assert "The run has no log to draw." in page.text
    assert "There are no curves" in page.text


def test_where_the_page_goes(
    cli: Any, run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_of("healthy")
    monkeypatch.chdir(tmp_path)
    before = sorted(folder.rglob("*"))
    content = cli("report", folder, "--json").json
    assert content["path"] == "healthy-report.html"
    assert content["bytes"] == (tmp_path / "healthy-report.html").stat().st_size
    assert sorted(folder.rglob("*")) == before
    assert cli("report", folder, "-o", "-").out.startswith("<!DOCTYPE html>")
    answer = cli("report", folder, "-o", tmp_path / "nowhere" / "page.html")
    assert (answer.code, answer.err.count("\n")) == (3, 1)
    assert "cannot be written" in answer.err
    assert json.loads(cli("report", tmp_path, "--json").out)["exit_code"] == 3
