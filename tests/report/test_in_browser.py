"""The page of a results folder, as a reader's browser shows it."""

import pytest
from browser import Page
from stores import HOSTILE, figure2, result, store_of

from recallzoo.report import write_report
from recallzoo.result import Result
from recallzoo.store import Store

pytestmark = pytest.mark.browser

HEADERS = "[...document.querySelectorAll('[data-table=runs] th button')]"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report on a grid of cells, one model of which has a hostile name."""
    folder = tmp_path_factory.mktemp("report")
    results = figure2(widths=[64, 128], seeds=[0], rates=[1e-3, 1e-2])
    results += [
        result(HOSTILE, accuracy=0.321, fallbacks=["<i>ran eager</i>"], rows=[]),
        result("hyena", width=128, learning_rate=1.0, status="diverged", accuracy=0.0, rows=[]),
    ]
    return write_report(store_of(folder / "runs", results), folder, ("html",))[0]


def column_of(page: Page, title: str) -> int:
    """Which column of the table of runs stands under a title, from 0."""
    return page.texts("[data-table=runs] th button").index(title)


def cells_of(page: Page, title: str) -> list[str]:
    """The column of the table of runs under a title, as far as it is shown."""
    return page.texts(f"[data-table=runs] tbody td:nth-child({column_of(page, title) + 1})")


def sort_by(page: Page, title: str) -> None:
    page.run(f"{HEADERS}[{column_of(page, title)}].click()")


def test_every_chart_is_drawn(page, report):
    page.open(report)
    drawn = page.run(
        "[...document.querySelectorAll('.chart')].map((c) => [c.dataset.figure,"
        "c.querySelectorAll('svg path').length])"
    )
    assert [name for name, _ in drawn] == [
        "accuracy",
        "learning_rate",
        "slice_distance",
        "state_size",
        "least",
    ]
    assert all(count > 20 for _, count in drawn)
    assert page.texts(".failed") == []


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_is_wider_than_the_window(page, report, width):
    page.open(report, width=width)
    assert page.run("document.documentElement.scrollWidth") <= width
    charts = page.run(
        "[...document.querySelectorAll('.chart')].map("
        "(c) => [c.dataset.figure, c.scrollWidth, c.clientWidth])"
    )
    assert [chart for chart in charts if chart[1] > chart[2]] == []


def test_charts_follow_the_window(page, report):
    page.open(report, width=1200)
    height = "document.querySelector('.chart').scrollHeight"
    before = page.run(height)
    page.resize(390, 800)
    page.wait_for(f"{height} > 2 * {before}")


def test_a_label_with_markup_shows_as_text_and_runs_nothing(page, report):
    page.open(report)
    assert HOSTILE in page.text(".summary")
    assert HOSTILE in cells_of(page, "model")
    assert any("x.py:</script><script>" in text for text in page.texts(".chart svg text"))
    assert "<i>ran eager</i> (1 runs)" in page.texts(".notes li")
    assert page.run("window.hacked") is None
    assert page.run("document.images.length") == 0


def test_hovering_over_a_point_shows_its_run(page, report):
    page.open(report)
    page.hover("[data-figure=learning_rate] svg .mark-symbol path[aria-label*='x.py:']")
    page.wait_for("document.querySelector('#vg-tooltip-element.visible')")
    shown = page.text("#vg-tooltip-element")
    assert HOSTILE in shown
    assert "test accuracy0.3210" in shown
    assert result(HOSTILE, accuracy=0.321).hash in shown
    assert page.run("window.hacked") is None


def test_a_click_on_the_legend_fades_the_other_models(page, report):
    page.open(report)
    faded = (
        "[...document.querySelectorAll('[data-figure=accuracy] .mark-symbol path')]"
        ".filter((p) => Number(p.getAttribute('opacity')) < 0.5).length"
    )
    assert page.run(faded) == 0
    x, y = page.run(
        "(() => { const e = [...document.querySelectorAll('[data-figure=accuracy] text')]"
        ".find((t) => t.textContent === 'attention'); const b = e.getBoundingClientRect();"
        "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    page.mouse_click(x, y)
    page.wait_for(f"{faded} > 0")


def test_the_table_of_runs_sorts_by_number_both_ways(page, report):
    page.open(report)
    unsorted = cells_of(page, "test accuracy")
    sort_by(page, "test accuracy")
    assert cells_of(page, "test accuracy") == sorted(unsorted, key=float, reverse=True)
    sort_by(page, "test accuracy")
    assert cells_of(page, "test accuracy") == sorted(unsorted, key=float)
    assert page.texts("[data-table=runs] th[aria-sort=ascending]") == ["test accuracy"]


def test_what_is_missing_stands_last_however_it_is_sorted(page, report):
    page.open(report)
    for _ in range(2):
        sort_by(page, "test loss, nats")
        assert cells_of(page, "test loss, nats")[-1] == "–"


def test_the_table_of_runs_filters_by_words_and_by_choice(page, report):
    page.open(report)
    whole = page.text("[data-table=runs] .count")
    page.fill("[data-table=runs] input", "hyena DIVERGED")
    assert cells_of(page, "status") == ["diverged at step 17"]
    page.fill("[data-table=runs] input", "no such run")
    assert page.text("[data-table=runs] .count").startswith("no row")
    page.fill("[data-table=runs] input", "")
    assert page.text("[data-table=runs] .count") == whole
    page.fill("[data-table=runs] select[data-column=width]", "1")
    assert set(cells_of(page, "width")) == {"128"}


class ManyRuns(Store):
    """A folder of more runs than a test has time to write."""

    def __init__(self, folder, results: list[Result]) -> None:
        super().__init__(folder)
        self.by_hash = {one.hash: one for one in results}

    def hashes(self) -> list[str]:
        return sorted(self.by_hash)

    def read(self, run_hash: str) -> Result:
        return self.by_hash[run_hash]


@pytest.mark.slow
def test_twelve_thousand_runs_are_shown_and_sorted_at_once(page, tmp_path):
    results = [
        result(
            mixer,
            width=width,
            learning_rate=(1 + rate) * 1e-4,
            seed=seed,
            accuracy=(seed * 7 + rate) % 100 / 100,
            rows=[],
        )
        for mixer in ("attention", "base_conv")
        for width in (64, 128)
        for rate in range(30)
        for seed in range(100)
    ]
    report = write_report(ManyRuns(tmp_path / "runs", results), tmp_path / "out", ("html",))[0]
    page.open(report)
    assert page.text("[data-table=runs] .count") == "1 to 100 of 12,000"
    milliseconds = page.run(
        "(() => { const start = performance.now();"
        f"{HEADERS}[6].click();"
        "return performance.now() - start; })()"
    )
    assert milliseconds < 3000
    assert cells_of(page, "test accuracy")[0] == "0.990"
    page.run("[...document.querySelectorAll('[data-table=runs] .controls button')][1].click()")
    assert page.text("[data-table=runs] .count") == "101 to 200 of 12,000"
