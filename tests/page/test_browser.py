"""The page of ``report`` in a real browser. `make test-page` installs what these tests need."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.cli.main import main
from hf_divguard.cli.output import printable
from hf_divguard.cli.page.document import Page, document
from tests.cli.conftest import write_events
from tests.page.runs import HOSTILE_TEXT, write_run

api = pytest.importorskip("playwright.sync_api", reason="`make test-page` installs playwright and a browser")

PLACES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser, started once."""
    with api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, PLACES)), None)
        try:
            started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no browser can be started: `make test-page` installs one ({str(error)[:80]})")
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with every kind of trouble and hostile names."""
    root = tmp_path_factory.mktemp("page")
    folder = write_run(root / "runs")
    write_events(
        folder,
        {
            "event": "warned",
            "step": 900,
            "onset_step": 890,
            "finding": {"message": HOSTILE_TEXT, "kind": "spike"},
        },
        {"event": "rollback", "step": 1510, "onset_step": 1500, "target_step": 1200, "steps_lost": 300},
        {
            "event": "stopped",
            "step": 3000,
            "onset_step": 2400,
            "finding": {"message": HOSTILE_TEXT, "kind": "jump"},
        },
    )
    assert main(["report", str(folder), "-o", str(root / "page.html")]) == 0
    return root / "page.html"


@pytest.fixture
def opened(browser: Any, page_file: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened; nothing may be asked of the network, no script of a name may run, nothing may fail."""
    settings = {"viewport": {"width": 1200, "height": 900}, **getattr(request, "param", {})}
    context = browser.new_context(**settings)
    page, wrong = context.new_page(), []
    page.on(
        "request",
        lambda each: wrong.append(each.url) if not each.url.startswith(("file:", "data:")) else None,
    )
    page.on("dialog", lambda each: (wrong.append("a dialog"), each.dismiss()))
    page.on("pageerror", lambda each: wrong.append(str(each)))
    page.on("console", lambda each: wrong.append(each.text))
    page.goto(page_file.as_uri())
    yield page
    if os.environ.get("SCREENSHOTS"):
        name = re.sub(r"\W+", "-", request.node.name)
        page.screenshot(path=Path(os.environ["SCREENSHOTS"], f"{name}.png"), full_page=True)
    context.close()
    assert wrong == []


VIEWS = [
    {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    for width in (1200, 360)
    for scheme in ("light", "dark")
]


def luminance(colour: str) -> float:
    parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


COLOURS = """selector => [...document.querySelectorAll(selector)].map(each => {
    let paper = each, found = "rgba(0, 0, 0, 0)";
    while (paper && (found = getComputedStyle(paper).backgroundColor) === "rgba(0, 0, 0, 0)") paper = paper.parentElement;
    return [each.tagName, getComputedStyle(each).color, found];
})"""


@pytest.mark.parametrize(
    "opened", VIEWS, indirect=True, ids=["wide-light", "wide-dark", "phone-light", "phone-dark"]
)
def test_text_can_be_read_and_nothing_is_cut_off(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for tag, ink, paper in opened.evaluate(
        COLOURS, "h1,h2,h3,p,dt,dd,code,button,th,td,small,strong,.yaxis span,output"
    ):
        assert contrast(ink, paper) >= 4.5, (tag, ink, paper)
    for tag, ink, paper in opened.evaluate(COLOURS, ".sign,.curve"):
        assert contrast(ink, paper) >= 3.0, (tag, ink, paper)
    sizes = opened.evaluate(
        "[...document.querySelectorAll('.yaxis span')].map(e => e.getBoundingClientRect())"
    )
    assert all(box["height"] >= 10 and box["left"] >= 0 for box in sizes)


def test_hostile_names_stand_there_as_text(opened: Any) -> None:
    assert "onerror=alert(1)" in opened.locator("h1").inner_text()
    assert "</script>" in opened.locator("main").inner_text()
    assert opened.locator("img").count() == 0


def test_the_curve_is_drawn_where_its_values_are(opened: Any) -> None:
    path = opened.locator("[data-chart=c0] path.curve").get_attribute("d")
    points = [tuple(map(float, each.split())) for each in path[1:].split("L")]
    assert points[0][0] == 0.0
    assert points[-1][0] == 1000.0
    highest = min(points, key=lambda point: point[1])
    assert highest[0] == pytest.approx(1000 * (1000 - 1) / 2999, abs=1)
    assert opened.locator("[data-chart=c0] .sign.found").count() == 1
    assert opened.locator("[data-chart=c0] .sign.broken").count() == 2


def test_the_keyboard_reads_the_values_of_a_chart(opened: Any) -> None:
    output = opened.locator("[data-chart=c0] output")
    opened.keyboard.press("Tab")
    for _ in range(20):
        if opened.evaluate("document.activeElement.dataset.chart") == "c0":
            break
        opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.dataset.chart") == "c0"
    opened.keyboard.press("Home")
    assert output.inner_text().startswith("step 1 ")
    opened.keyboard.press("ArrowRight")
    assert not output.inner_text().startswith("step 1 ")
    opened.keyboard.press("End")
    assert output.inner_text().startswith("step 3000 ")
    assert "stopped" in output.inner_text()
    opened.keyboard.press("Escape")
    assert not opened.locator("[data-chart=c0] .cursor").is_visible()


def test_the_pointer_reads_the_value_below_it(opened: Any) -> None:
    area = opened.locator("[data-chart=c0] .area")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    step = int(re.match(r"step (\d+)", opened.locator("[data-chart=c0] output").inner_text())[1])
    assert abs(step - 1500) <= 5


def test_the_button_changes_between_light_and_dark(opened: Any) -> None:
    colours = []
    for _ in range(3):
        colours.append(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
        opened.locator("#theme").click()
    assert colours[0] == colours[2] != colours[1]


def test_what_to_paste_is_copied_or_selected(browser: Any, tmp_path: Path) -> None:
    paste = f"--resume_from_checkpoint '{HOSTILE_TEXT.strip()}'"
    text = document(Page("run", "stopped", "It was killed.", [], paste, [], [], []))
    (tmp_path / "page.html").write_text(text)
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.locator("#copy").click()
    page.wait_for_function("document.getElementById('copy').textContent !== 'Copy'")
    if page.locator("#copy").inner_text() == "Selected":
        got = page.evaluate("getSelection().toString()")
    else:
        got = page.evaluate("navigator.clipboard.readText()")
    assert got == printable(paste)
    context.close()


def test_it_prints_in_dark_ink_without_buttons(opened: Any) -> None:
    opened.locator("#theme").click()
    opened.emulate_media(media="print")
    assert not opened.locator("#theme").is_visible()
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.pdf()[:5] == b"%PDF-"


@pytest.mark.parametrize("opened", [{"java_script_enabled": False}], indirect=True)
def test_without_scripts_everything_but_the_readout_is_there(opened: Any) -> None:
    assert opened.locator("path.curve").count() >= 4
    assert "Checkpoints" in opened.locator("main").inner_text()
