"""The page of diffusion-report as a browser shows it: it draws, sorts, filters and compares without a network and an error, by
mouse and by keys, in light and dark, on a desk and on a phone, and axe-core finds nothing that keeps anybody out.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from made_up import make_generated, make_run

from diffusion_cli.report.making import make
from diffusion_cli.settings import Report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: it is in the test extra")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
EVIL = "<img src=x onerror=alert(1)>"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]


@dataclass
class Opened:
    """A page and all that it said and asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def runs(self) -> list[str]:
        """The rows of the table that are shown, from above."""
        return self.page.locator("table:not(.plain) tbody tr:not([hidden]) th").all_inner_texts()

    def sorted_by(self) -> tuple[str, str]:
        head = self.page.locator("th[aria-sort]")
        return head.inner_text().strip(), head.get_attribute("aria-sort")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The address of a page of one run, and of one of a sweep: six that differ, one failed, one with an evil name."""
    folder = tmp_path_factory.mktemp("report")
    make_generated(make_run(folder / "one"))
    for i, (lr, schedule) in enumerate([(0.1, "Flow"), (0.01, "Flow"), (0.001, "Flow"), (0.1, "Edm"), (0.01, "Edm")]):
        make_run(folder / "sweep" / f"job_{i}", i, lr=lr, schedule=schedule, error=(0.5, 0.1, 0.4, 0.3, 0.2)[i])
    make_run(folder / "sweep" / EVIL, 5, lr=0.5, error=0.9)
    (folder / "sweep/lost").mkdir()
    (folder / "sweep/lost/status.json").write_text('{"state": "failed", "step": 0, "reason": "' + EVIL + ' no data"}')
    return {name: make(Report((str(folder / name),), None)).absolute().as_uri() for name in ("one", "sweep")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, files: dict[str, str]) -> Iterator[Callable[..., Opened]]:
    """Opens a page; at the end of the test it must have said nothing and asked for nothing."""
    all_opened = []

    def of(name: str, view: str = "", size: dict[str, int] = DESK, **wishes: Any) -> Opened:
        context = browser.new_context(viewport=size, **wishes)
        new = Opened(context.new_page())
        all_opened.append(new)
        new.page.on("console", lambda message: new.said.append(message.text))
        new.page.on("pageerror", lambda error: new.said.append(str(error)))
        new.page.on("dialog", lambda dialog: (new.said.append(dialog.message), dialog.dismiss()))
        new.page.on("request", lambda request: new.asked.append(request.url))
        new.page.goto(files[name] + view)
        new.page.wait_for_selector("h1")
        return new

    yield of
    for each in all_opened:
        assert each.said == []
        strange = [url for url in each.asked if not url.startswith(("data:", *(files[name] for name in files)))]
        assert strange == []
        each.page.context.close()


VIEWS = [("one", ""), ("sweep", ""), ("sweep", "#run=1"), ("sweep", "#compare=1,6")]  # 6: lost, the run that failed


@pytest.mark.parametrize(("name", "view"), [("one", ""), ("sweep", ""), ("sweep", "#run=6"), ("sweep", "#compare=1,2")])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(opened: Callable[..., Opened], name: str, view: str, scheme: str) -> None:
    """Names, roles, order of headings, contrast (WCAG 2 AA): whatever axe-core can tell, with all that folds unfolded."""
    page = opened(name, view, color_scheme=scheme, reduced_motion="reduce").page
    for summary in page.locator("summary").all():
        summary.click()
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize(("name", "view"), VIEWS)
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_everything_is_drawn_and_fits(opened: Callable[..., Opened], name: str, view: str, size: dict[str, int]) -> None:
    page = opened(name, view, size).page
    assert page.locator(".draw").count() == page.locator(".draw svg").count() > 0
    assert page.locator(".draw svg path").count() > page.locator(".draw").count()
    page.wait_for_function("[...document.images].every((image) => image.complete)")
    assert page.evaluate("[...document.images].filter((image) => !image.naturalWidth).length") == 0
    assert page.locator("img:not([alt])").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "the page itself scrolls sideways"


def test_words_of_a_run_stay_words(opened: Callable[..., Opened]) -> None:
    shown = opened("sweep")
    assert EVIL in shown.runs() and shown.page.locator("img[src='x']").count() == 0
    i = shown.page.evaluate("(name) => DATA.runs.findIndex((run) => run.name === name)", EVIL)
    shown.page.evaluate(f"location.hash = 'run={i}'")
    shown.page.wait_for_function("(name) => document.querySelector('h1').textContent === name", arg=EVIL)
    shown.page.evaluate(f"location.hash = 'compare={i},0'")
    shown.page.locator(".legend button").first.wait_for()
    shown.page.locator(".draw").first.scroll_into_view_if_needed()
    box = shown.page.locator(".draw").first.bounding_box()
    shown.page.mouse.move(box["x"] + 200, box["y"] + 100)
    assert EVIL in shown.page.locator(".tip").inner_text()
    assert shown.page.locator("img[src='x']").count() == 0


def test_the_policy_stops_what_would_reach_out(opened: Callable[..., Opened]) -> None:
    """As if a line of ours went wrong: the browser itself refuses markup's scripts and any address."""
    shown = opened("one")
    markup = "<img src=x onerror='window.ran = 1'><i style='color: red'></i>"
    shown.page.evaluate("(markup) => document.body.insertAdjacentHTML('beforeend', markup)", markup)
    shown.page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert shown.page.evaluate("window.ran") is None
    assert shown.said and all("Content Security Policy" in line for line in shown.said)
    shown.said.clear()
    shown.asked.clear()


# -- the table ---------------------------------------------------------------------------------------------------------------


def test_the_best_run_is_first_and_marked(opened: Callable[..., Opened]) -> None:
    shown = opened("sweep")
    assert shown.sorted_by() == ("held-out error", "ascending")
    assert shown.runs() == ["job_1", "job_4", "job_3", "job_2", "job_0", EVIL, "lost"]
    assert "Best held-out error: 0.1, job_1." in shown.page.locator("main").inner_text()
    assert shown.page.locator("tr:has-text('job_1') td.best").count() >= 1
    assert shown.page.locator(".wall figcaption a").first.inner_text() == "job_1"


def test_columns_sort_by_mouse_and_keys(opened: Callable[..., Opened]) -> None:
    shown = opened("sweep")
    head = shown.page.get_by_role("button", name="lr", exact=True)
    head.click()
    assert shown.sorted_by() == ("lr", "ascending") and shown.runs()[0] == "job_2" and shown.runs()[-1] == "lost"
    head.focus()
    shown.page.keyboard.press("Enter")
    assert shown.sorted_by() == ("lr", "descending") and shown.runs()[0] == EVIL and shown.runs()[-1] == "lost"
    shown.page.keyboard.press("Space")
    assert shown.sorted_by() == ("lr", "ascending")
    shown.page.keyboard.press("Shift+Tab")
    shown.page.keyboard.press("Enter")
    assert shown.sorted_by() == ("schedule", "ascending")
    assert shown.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is visible"


def test_runs_are_filtered_by_words_and_state(opened: Callable[..., Opened]) -> None:
    shown = opened("sweep")
    search = shown.page.get_by_label("Filter by words")
    search.fill("edm lr=0.01")
    assert shown.runs() == ["job_4"] and shown.page.locator("p[role=status]").inner_text() == "1 of 7 runs"
    assert shown.page.locator(".wall figure").count() == 1
    search.fill("")
    shown.page.get_by_label("State").select_option("failed")
    assert shown.runs() == ["lost"]
    shown.page.get_by_label("State").select_option("")
    assert len(shown.runs()) == 7


def test_an_axis_that_is_marked_filters(opened: Callable[..., Opened]) -> None:
    shown = opened("sweep")
    shown.page.locator(".parallel .draw").scroll_into_view_if_needed()
    box = shown.page.locator(".parallel .draw").bounding_box()
    at = shown.page.evaluate("DATA.columns.findIndex((column) => column.key === 'evaluate/x0_mse')")
    count = shown.page.evaluate("DATA.columns.length")
    x = box["x"] + 48 + at * (box["width"] - 48 - 64) / (count - 1)
    shown.page.mouse.move(x, box["y"] + box["height"] - 26)
    shown.page.mouse.down()
    shown.page.mouse.move(x, box["y"] + box["height"] - 200, steps=5)
    shown.page.mouse.up()
    shown.page.wait_for_timeout(300)
    left = shown.runs()
    assert "job_1" in left and EVIL not in left


# -- pictures and views -------------------------------------------------------------------------------------------------------


def test_the_slider_shows_the_step(opened: Callable[..., Opened]) -> None:
    page = opened("one").page
    image = page.locator(".stage img")
    assert image.get_attribute("alt") == "Samples of one at step 300"
    last = image.get_attribute("src")
    page.get_by_role("slider").focus()
    page.keyboard.press("Home")
    assert image.get_attribute("alt") == "Samples of one at step 100" and image.get_attribute("src") != last
    page.get_by_role("radio", name="From noise to picture").check()
    assert image.get_attribute("alt") == "From noise to picture of one at step 300"
    page.get_by_role("button", name="Play").click()
    assert image.get_attribute("alt") == "From noise to picture of one at step 100"
    page.get_by_role("button", name="Play").wait_for(timeout=10_000)  # Pause until its end
    assert image.get_attribute("alt") == "From noise to picture of one at step 300"


def test_two_runs_move_together(opened: Callable[..., Opened]) -> None:
    page = opened("sweep", "#compare").page
    alts = lambda: [image.get_attribute("alt") for image in page.locator(".pair img").all()]  # noqa: E731
    assert alts() == ["Samples of job_1 at step 300", "Samples of job_4 at step 300"], "the two best at first"
    page.get_by_role("combobox", name="Right").select_option(label="job_0")
    page.get_by_role("slider").focus()
    page.keyboard.press("ArrowLeft")
    assert alts() == ["Samples of job_1 at step 200", "Samples of job_0 at step 200"]
    assert "Same seed" in page.locator("main").inner_text()
    differ = page.get_by_role("region", name="Settings that differ").inner_text()
    assert "optimizer.lr" in differ and "0.01" in differ and "seed" not in differ
    assert "+400 %" in page.get_by_role("region", name="Figures of both runs").inner_text()
    page.get_by_role("button", name="Swap").click()
    assert alts()[0].startswith("Samples of job_0")
    page.go_back()
    page.wait_for_function("document.querySelector('.pair img').alt.startsWith('Samples of job_1')")


def test_a_run_says_what_differs_and_the_way_leads_back(opened: Callable[..., Opened]) -> None:
    shown = opened("sweep")
    shown.page.locator("tbody").get_by_role("link", name="job_3").click()
    assert shown.page.locator("h1").inner_text() == "job_3"
    assert shown.page.locator("nav [aria-current=page]").inner_text() == "One run"
    row = shown.page.get_by_role("region", name="Settings in which runs differ").get_by_role("row", name="schedule")
    assert row.inner_text().split("\t")[1:] == ["edm", "flow (4), edm (1)"]
    shown.page.get_by_role("link", name="All runs").click()
    assert len(shown.runs()) == 7


def test_curves_answer(opened: Callable[..., Opened]) -> None:
    page = opened("one").page
    card = page.locator(".chart", has_text="Training loss by noise level t")
    assert "0.0–0.5: 0.1 at step 300" in card.locator(".draw").get_attribute("aria-label")
    before = card.locator("svg").inner_html()
    key = card.get_by_role("button", name="0.0–0.5")
    key.press("Space")
    assert key.get_attribute("aria-pressed") == "false" and card.locator("svg").inner_html() != before
    first = page.locator(".chart").first
    before = first.locator("svg").inner_html()
    first.get_by_role("checkbox").check()
    assert first.locator("svg").inner_html() != before
    first.locator("summary").click()
    assert first.locator("tbody tr").first.inner_text().split("\t") == ["100", "1"]


def test_light_and_dark(opened: Callable[..., Opened]) -> None:
    page = opened("sweep", color_scheme="dark").page
    ground = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    drawn = page.locator(".draw svg").first.inner_html()
    dark = ground()
    page.get_by_role("button", name="Light colours").click()
    assert ground() != dark and page.locator(".draw svg").first.inner_html() != drawn
    page.reload()
    assert ground() != dark, "the choice is remembered"
    assert page.get_by_role("button", name="Dark colours").is_visible()
