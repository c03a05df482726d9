"""What the page of an audit says, whatever draws it."""

import functools
import json
import math
import operator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from audits import HOSTILE_TEXT, audit, passage
from stores import result, store_of

from recallzoo.cli import main
from recallzoo.errors import UserError
from recallzoo.evaluate.audit_store import MANIFEST, PASSAGES, SUMMARY, SUMMARY_SCHEMA, Audit
from recallzoo.files import read_json
from recallzoo.report import write_audit_report
from recallzoo.report._audit import _cuts_table, _models_table, _notes
from recallzoo.report._audit_charts import audit_figures
from recallzoo.report._page import json_for_script
from recallzoo.report._tokens import token_view


def named(table: dict, row: int) -> dict:
    """A row of a table, by the titles of its columns."""
    titles = [column["title"] for column in table["columns"]]
    return dict(zip(titles, table["rows"][row], strict=True))


def test_models_have_perplexities_of_hits_and_others_at_the_first_cut(tmp_path):
    opened = Audit.open(audit(tmp_path / "a", cuts=(3, 30)))
    summary = opened.full_summary()
    row = named(_models_table(opened.about, summary), 0)
    wanted = summary.filter(model="conv", slice_kind="ar_hit", cut=3)["ppl"][0]
    assert (row["model"], row["role"], row["of AR hits"]) == ("conv", "model", wanted)


def test_the_share_of_the_gap_is_given_at_every_cut_with_its_interval(tmp_path):
    opened = Audit.open(audit(tmp_path / "a", cuts=(3, 30)))
    table = _cuts_table(opened.about, opened.full_summary())
    rows = [named(table, i) for i in range(len(table["rows"]))]
    of_conv = [row for row in rows if row["model"] == "conv"]
    assert [row["AR hits"] for row in of_conv] == [
        "at most 3 in training",
        "at most 30 in training",
        "all repeated pairs",
    ]
    assert all(row["share of gap"] is not None for row in of_conv)
    assert all(" to " in row["interval, 95%"] for row in of_conv)
    assert all(row["share of gap"] is None for row in rows if row["model"] == "attention")


def test_without_a_reference_losses_are_drawn_and_no_gap(tmp_path):
    opened = Audit.open(audit(tmp_path / "a", references=()))
    figures = audit_figures(opened, opened.full_summary())
    assert [figure.name for figure in figures] == [
        "audit_frequency",
        "audit_distance",
        "audit_distance_tokens",
        "audit_occurrence",
        "audit_domain",
    ]
    assert figures[0].title.startswith("Loss by")


def test_each_reference_has_a_panel(tmp_path):
    opened = Audit.open(audit(tmp_path / "a", references=("attention", "mamba")))
    figures = {f.name: f for f in audit_figures(opened, opened.full_summary())}
    rows = next(iter(figures["audit_cuts"].spec["datasets"].values()))
    assert {row["panel"] for row in rows} == {"against attention", "against mamba"}


def test_other_tokenizers_and_stand_in_counts_are_said_first(tmp_path):
    opened = Audit.open(
        audit(tmp_path / "a", unsliced=("foreign",), stand_in=True, notes=("one more",))
    )
    first, second, third = _notes(opened.about)
    assert "stand-in corpus" in first
    assert "training frequency of pairs: stories/train" in first
    assert "bits per byte" in second
    assert third == "one more"


@pytest.mark.parametrize(
    "options",
    [
        {"models": (), "references": (), "unsliced": ("a", "b")},
        {"references": ()},
        {"cuts": (0,)},
        {"passages": []},
        {"models": ("conv", "hyena"), "references": ("attention", "mamba"), "unsliced": ("b",)},
    ],
    ids=["nothing sliced", "no reference", "one cut", "no passages", "many models"],
)
def test_every_kind_of_audit_gives_a_page(tmp_path, options):
    folder = audit(tmp_path / "a", **options)
    written = write_audit_report(folder, tmp_path / "out", ("html",))
    assert [path.name for path in written] == ["audit.html"]
    assert write_audit_report(folder, tmp_path / "again", ("html",))[0].read_bytes() == (
        written[0].read_bytes()
    )


def test_text_of_the_corpus_is_in_the_page_as_data_only(tmp_path):
    folder = audit(tmp_path / "a")
    text = write_audit_report(folder, tmp_path / "out", ("html",))[0].read_text()
    assert HOSTILE_TEXT not in text
    assert json_for_script(HOSTILE_TEXT)[1:-1] in text


def test_the_command_reports_on_audits_as_on_runs(tmp_path, capsys):
    folder = audit(tmp_path / "a")
    (folder / "settings.json").write_text("{}")
    assert main(["report", str(folder), "--formats", "html"]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "report" / "audit.html")]
    store_of(tmp_path / "runs", [result()])
    assert main(["report", str(tmp_path / "runs"), "--formats", "html"]) == 0
    both = [str(folder), str(tmp_path / "runs")]
    for paths in (both, both[::-1]):
        assert main(["report", *paths, "--out", str(tmp_path / "out")]) == 2
        assert "is an audit, of which each has a report of its own" in capsys.readouterr().err
    (tmp_path / "o").write_text("mine")
    assert main(["report", str(folder), "--out", str(tmp_path / "o" / "sub")]) == 2
    assert "o is a file, so there can be no" in capsys.readouterr().err
    (folder / "audit.json").unlink()
    assert main(["report", str(folder)]) == 2
    assert "not finished" in capsys.readouterr().err


def test_a_folder_without_an_audit_is_named(tmp_path):
    with pytest.raises(UserError, match="is no audit"):
        write_audit_report(tmp_path, tmp_path / "out")


GONE = "(gone)"
DEEP = "[" * 10**6


def edited(file: Path, place: str, value: Any) -> None:
    """Set a value of a JSON file, `a.0.b` naming where; GONE takes it away."""
    content = read_json(file)
    *inner, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    holder = functools.reduce(operator.getitem, inner, content)
    if value is GONE:
        del holder[last]
    else:
        holder[last] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "place", "value", "words"),
    [
        (MANIFEST, "models", 5, "models is 5, where a list of at least one is wanted"),
        (MANIFEST, "models.0.ppl", math.nan, "models[0].ppl is NaN, where a finite number"),
        pytest.param(
            *(MANIFEST, "models.0.loss_nats", 10**400, "models[0].loss_nats is 1000"),
            id="a number too large",
        ),
        (MANIFEST, "models.1.tokenizer_hash", None, "hash is null, where text is wanted"),
        (MANIFEST, "data.num_tokens", GONE, "data.num_tokens is missing"),
        (MANIFEST, "bootstrap.level", "95", 'bootstrap.level is "95", where a number is wanted'),
        (MANIFEST, "notes", "none", 'notes is "none", where a list is wanted'),
        (MANIFEST, "cuts", [], "sliced models, cuts and pair_counts go together"),
        (MANIFEST, "references", ["x"], "its reference 'x' is none of its models"),
        (MANIFEST, "reference", None, "reference is None, where the first of references"),
        (PASSAGES, "cut", math.nan, "cut is NaN, where a whole number or None is wanted"),
        (PASSAGES, "passages.0.tokens.0.losses", GONE, "passages[0].tokens[0].losses is missing"),
        (PASSAGES, "passages.0.start", math.inf, "passages[0].start is Infinity, where a whole"),
    ],
)
def test_a_damaged_file_of_an_audit_is_named_with_the_field(
    tmp_path, capsys, file, place, value, words
):
    folder = audit(tmp_path / "a")
    edited(folder / file, place, value)
    require_damaged(folder, file, words, capsys)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *((file, content) for file in (MANIFEST, PASSAGES, SUMMARY) for content in ("", DEEP)),
        (PASSAGES, None),
        (SUMMARY, None),
    ],
    ids=lambda value: "deep" if value == DEEP else None,
)
def test_a_file_of_an_audit_that_cannot_be_read_is_named(tmp_path, capsys, file, content):
    folder = audit(tmp_path / "a")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    require_damaged(folder, file, "", capsys)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss_nats": math.nan}, "loss_nats has a row that is no finite number"),
        ({"low": math.inf}, "low has a row that is no finite number"),
        ({"ppl": -1.0}, "ppl has a row below 0"),
        ({"num_tokens": -1}, "num_tokens has a row below 0"),
        ({"slice": None}, "slice has a row without a value"),
        ({"cut": None}, "cut has no value in a row of AR hits"),
        ({"model": "x"}, "it has no row of the model 'conv'"),
        ({"reference": "x"}, "it has rows of 'x', which audit.json does not name"),
        ({"num_tokens": "many"}, "has other columns than an audit writes"),
        ({"low": GONE}, "has other columns than an audit writes"),
    ],
    ids=str,
)
def test_a_damaged_summary_of_an_audit_is_named_with_the_column(tmp_path, capsys, changes, words):
    folder = audit(tmp_path / "a")
    frame = pl.read_parquet(folder / SUMMARY)
    for name, value in changes.items():
        frame = (
            frame.drop(name)
            if value is GONE
            else frame.with_columns(
                pl.lit(value, pl.String if isinstance(value, str) else SUMMARY_SCHEMA[name]).alias(
                    name
                )
            )
        )
    frame.write_parquet(folder / SUMMARY)
    require_damaged(folder, SUMMARY, words, capsys)


def require_damaged(folder: Path, file: str, words: str, capsys) -> None:
    """`recallzoo report` says in one message what is wrong with a file, and what to do."""
    assert main(["report", str(folder), "--formats", "html"]) == 1
    message = capsys.readouterr().err
    assert message.count("error: ") == 1
    assert str(folder / file) in message
    assert words in message
    assert "same recallzoo audit command again" in message
    assert not (folder / "report").exists()


def test_a_loss_that_is_missing_stays_missing(tmp_path):
    folder = audit(tmp_path / "a", passages=[passage("conv", ("attention",))])
    view = token_view(Audit.open(folder))
    assert view is not None
    assert view["passages"][0]["tokens"][0][-1] == [None, None]
    assert view["passages"][0]["tokens"][13][-1] == [4.25, 2.25]
