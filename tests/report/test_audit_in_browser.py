"""The page of an audit, as a reader's browser shows it."""

import pytest
from audits import HOSTILE_TEXT, audit, passage
from browser import Page

from recallzoo.report import write_audit_report

pytestmark = pytest.mark.browser

HIT, EARLIER = 13, 1
"""Places in the passage of an AR hit, and of the token it repeats (the pair's second)."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """An audit of two models against a third, with two passages, full of hostile text."""
    folder = tmp_path_factory.mktemp("audit")
    passages = [
        passage("conv", ("hyena", "attention")),
        passage("conv", ("hyena", "attention"), id=HOSTILE_TEXT, source=HOSTILE_TEXT, start=0),
    ]
    made = audit(folder / "a", models=("conv", "hyena"), passages=passages, notes=(HOSTILE_TEXT,))
    return write_audit_report(made, folder, ("html",))[0]


def point_at(page: Page, place: int) -> None:
    page.hover(f".token[data-i='{place}']")
    page.wait_for(f"document.querySelector('.token.at[data-i=\"{place}\"]')")


def inspected(page: Page) -> dict[str, str]:
    """What is said of the token under the mouse."""
    return dict(zip(page.texts(".inspector dt"), page.texts(".inspector dd"), strict=True))


def background(page: Page, place: int) -> str:
    return page.run(
        f"getComputedStyle(document.querySelector(\".token[data-i='{place}']\")).backgroundColor"
    )


def test_charts_and_tables_are_drawn(page, report):
    page.open(report)
    drawn = page.run(
        "[...document.querySelectorAll('.chart')].map((c) =>c.querySelectorAll('svg path').length)"
    )
    assert len(drawn) == 6
    assert all(count > 10 for count in drawn)
    assert page.texts("[data-table=models] tbody td:first-child") == ["conv", "hyena", "attention"]


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_is_wider_than_the_window(page, report, width):
    page.open(report, width=width)
    assert page.run("document.documentElement.scrollWidth") <= width


def test_text_of_the_corpus_shows_as_text_and_runs_nothing(page, report):
    page.open(report)
    assert HOSTILE_TEXT in page.texts(".passage .token")
    assert HOSTILE_TEXT in page.texts(".notes li")
    assert any(HOSTILE_TEXT in text for text in page.texts("#token-view option"))
    page.fill("#token-view select[aria-label=passage]", "1")
    point_at(page, 7)
    assert HOSTILE_TEXT in inspected(page)["pair"]
    assert page.run("window.hacked") is None
    assert page.run("document.images.length") == 0


def test_tokens_that_show_nothing_are_made_visible(page, report):
    page.open(report)
    shown = page.texts(".passage .token")
    assert shown[3:7] == ["↵\n", "↵\n↵\n", "·", "⇥\t"]
    assert shown[18:21] == ["⟨U+FE0F⟩", "⟨U+FFA0⟩", "\u25cc\u0301e\u0301"]
    assert shown[8:12] == ["⟨U+202E⟩", "⟨U+200B⟩", "⟨token 110⟩", "\\xf0"]


def test_tokens_are_coloured_by_the_loss_difference_around_zero(page, report):
    page.open(report)
    red, _, blue = (int(part) for part in background(page, HIT)[4:-1].split(","))
    assert red > 230 > 150 > blue  # the first model loses 2 nats more
    red, _, blue = (int(part) for part in background(page, 5)[4:-1].split(","))
    assert red < blue == 252  # it loses a little less: nearly white
    assert background(page, 0) == "rgba(0, 0, 0, 0)"  # not scored


def test_ar_hits_are_marked(page, report):
    page.open(report)
    assert page.texts(".passage .token.hit") == [" met", " met"]
    style = "getComputedStyle(document.querySelector('.passage .token.hit')).borderBottomStyle"
    assert page.run(style) == "solid"


def test_hovering_shows_the_pair_its_earlier_occurrence_counts_and_losses(page, report):
    page.open(report)
    point_at(page, HIT)
    assert inspected(page) == {
        "pair": " Ada |  met",
        "kind": "AR hit",
        "in training": "2",
        "earlier": "12 tokens back",
        "conv": "4.250 nats",
        "hyena": "2.250 nats",
        "attention": "2.250 nats",
        "difference": "+2.000 nats",
        "token": "269 of its document, id 113",
    }
    earlier = "[...document.querySelectorAll('.token.earlier')].map((e) => Number(e.dataset.i))"
    assert page.run(earlier) == [EARLIER - 1, EARLIER]
    point_at(page, 2)
    assert page.run(earlier) == []
    assert inspected(page)["kind"] == "not repeated in context"


def test_an_earlier_occurrence_outside_of_the_passage_is_said_to_be(page, tmp_path):
    one = passage("conv", ("attention",))
    one["tokens"][HIT]["distance"] = 40
    folder = audit(tmp_path / "a", passages=[one])
    page.open(write_audit_report(folder, tmp_path, ("html",))[0])
    point_at(page, HIT)
    assert inspected(page)["earlier"] == "40 tokens back, before this passage"
    assert page.run("document.querySelectorAll('.token.earlier').length") == 0


def test_passage_and_models_can_be_chosen(page, report):
    page.open(report)
    page.fill("#token-view select[aria-label='compared with']", "0")
    assert background(page, HIT) == "rgb(255, 255, 255)"  # a model beside itself
    page.fill("#token-view select[aria-label='compared with']", "")
    assert "nats" in page.text(".key .ramp")
    assert background(page, 17) != "rgb(255, 255, 255)"
    page.click("#token-view button[aria-label='next passage']")
    point_at(page, HIT)
    assert inspected(page)["token"] == "13 of its document, id 113"
    assert page.run("document.querySelector('[aria-label=\"next passage\"]').disabled")


def test_arrow_keys_go_from_token_to_token(page, report):
    page.open(report)
    for _ in range(2):
        page.run(
            "document.querySelector('.passage').dispatchEvent("
            "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))"
        )
    assert page.run("document.querySelector('.token.at').dataset.i") == "1"


def test_models_without_slices_are_shown_in_bits_per_byte(page, tmp_path):
    folder = audit(tmp_path / "a", models=(), references=(), unsliced=("one", "two"))
    page.open(write_audit_report(folder, tmp_path, ("html",))[0])
    assert page.texts("[data-table=models] tbody td:first-child") == ["one", "two"]
    assert page.run("document.querySelectorAll('.chart').length") == 0
    assert "There are no passages" in page.text("#tokens")
