"""Reports on several folders and on tables."""

from datetime import date
from decimal import Decimal

import polars as pl
import pytest
from stores import HOSTILE, result, store_of

from recallzoo.cells import cells
from recallzoo.cli import main
from recallzoo.errors import UserError
from recallzoo.report import open_runs, write_report
from recallzoo.report._charts import Look
from recallzoo.report._entries import entries, labels_of
from recallzoo.report._slices import slice_figures
from recallzoo.store import Store

RUNS = [
    result("base_conv", learning_rate=1e-3, accuracy=0.4),
    result("base_conv", learning_rate=1e-2, status="diverged", accuracy=0.0),
    result("attention", learning_rate=1e-3, accuracy=1.0, state_size={"kv": 3, "conv": 4}),
    result("attention", learning_rate=1e-2, accuracy=0.9, state_size={}),
]


def test_a_table_has_the_cells_of_its_folder(tmp_path):
    store = store_of(tmp_path / "runs", RUNS)
    read = {one.hash: one for one in open_runs([store.write_table()]).results}
    assert set(read) == {one.hash for one in RUNS}
    for one in RUNS:
        other = read[one.hash]
        assert (other.config, other.status, other.test_accuracy) == (
            one.config,
            one.status,
            one.test_accuracy,
        )
        assert sum(other.state_size.values()) == sum(one.state_size.values())
        assert other.provenance["commit"] == one.provenance["commit"]
    found, wanted = cells(read[one.hash] for one in RUNS), cells(RUNS)
    assert [(c.label, c.config, c.learning_rates) for c in found] == [
        (c.label, c.config, c.learning_rates) for c in wanted
    ]


def test_a_page_of_a_table_says_what_it_lacks(tmp_path):
    table = store_of(tmp_path / "runs", [result(label=HOSTILE)]).write_table()
    out = tmp_path / "out"
    written = write_report(open_runs([table]), out, ("html", "svg"))
    assert "accuracy.svg" in {path.name for path in written}
    page = (out / "report.html").read_text()
    assert "table.parquet is a table of runs: it has no accuracy by slice" in page
    assert "Neither fallbacks nor runs that are not finished stand in it" in page
    assert HOSTILE not in page


def test_runs_of_several_places_are_drawn_as_one(tmp_path):
    a = store_of(tmp_path / "a", RUNS[:2])
    b = store_of(tmp_path / "b", RUNS[2:])
    whole = store_of(tmp_path / "whole", RUNS)
    joined = open_runs([a.folder, b.folder])
    assert joined.name == "a + b"
    assert joined.results == open_runs([whole.folder]).results
    for one in RUNS:
        assert joined.rows_of(one.hash) == one.rows


@pytest.mark.parametrize("order", [1, -1], ids=["folder first", "table first"])
def test_a_run_of_several_places_counts_once_and_is_a_folders_before_a_tables(tmp_path, order):
    folder = store_of(tmp_path / "a", RUNS[:1]).folder
    table = store_of(tmp_path / "b", RUNS).write_table()
    runs = open_runs([folder, table][::order])
    assert len(runs.results) == len(RUNS)
    assert "fallbacks" in next(r for r in runs.results if r.hash == RUNS[0].hash).provenance
    assert runs.rows_of(RUNS[0].hash) == RUNS[0].rows
    assert runs.rows_of(RUNS[1].hash) == []
    assert "1 runs stand in more than one of the places given" in runs.remarks[-1]


def test_charts_by_slice_say_which_runs_they_lack(tmp_path):
    seeds = [result("base_conv", seed=seed) for seed in (0, 1)]
    folder = store_of(tmp_path / "a", seeds[:1]).folder
    table = store_of(tmp_path / "b", [seeds[1], result("h3")]).write_table()
    for paths, words in (
        ([folder], "all seeds together."),
        ([folder, table], "Runs that lack it are left out: base_conv (1 of 2), h3 (1 of 1)."),
    ):
        runs = open_runs(paths)
        found = entries(runs.results)
        (figure,) = slice_figures(found, Look.of(labels_of(found)), runs.rows_of)
        assert words in figure.caption
        assert ("all seeds" in figure.caption) == (paths == [folder])
        (rows,) = figure.spec["datasets"].values()
        assert {row["runs"] for row in rows} == {seeds[0].hash}


def test_a_run_twice_in_a_table_counts_once_and_the_page_says_so(tmp_path):
    table = store_of(tmp_path / "runs", RUNS).write_table()
    rows = pl.read_parquet(table)
    second = rows[:2].with_columns(test_accuracy=pl.lit(0.125))
    pl.concat([rows, second]).write_parquet(table)
    runs = open_runs([table])
    assert [one.hash for one in runs.results] == rows["hash"].to_list()
    assert 0.125 not in [one.test_accuracy for one in runs.results]
    assert "2 rows of table.parquet are of a run that stands in it already" in runs.remarks[-1]


def test_a_run_planned_in_one_place_and_finished_in_another_is_not_missing(tmp_path):
    a, b = store_of(tmp_path / "a", RUNS[:1]), store_of(tmp_path / "b", RUNS[1:2])
    a.plan({one.hash: {"cell": "a cell"} for one in RUNS[:3]})
    assert open_runs([a.folder]).missing() == {"a cell": (2, 3)}
    assert open_runs([a.folder, b.folder]).missing() == {"a cell": (1, 3)}


def test_commands_of_several_places_are_shown_once_each(tmp_path):
    folders = [store_of(tmp_path / name, [run]) for name, run in zip("ab", RUNS, strict=False)]
    for store, command in zip(folders, ("recallzoo run x", "recallzoo run y"), strict=True):
        store.add_command("recallzoo run both")
        store.add_command(command)
    assert open_runs([store.folder for store in folders]).commands == [
        "recallzoo run both",
        "recallzoo run x",
        "recallzoo run y",
    ]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pl.DataFrame({"x": [1]}), "no table of runs: it lacks hash, group, label"),
        (pl.DataFrame(), "no table of runs"),
    ],
    ids=["another table", "an empty table"],
)
def test_another_table_is_refused(tmp_path, frame, message):
    frame.write_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=message):
        open_runs([tmp_path / "t.parquet"])


def test_a_table_that_is_no_parquet_or_has_no_rows_is_refused(tmp_path):
    table = store_of(tmp_path / "runs", RUNS).write_table()
    pl.read_parquet(table).clear().write_parquet(table)
    with pytest.raises(UserError, match="has no runs in it"):
        open_runs([table])
    table.write_bytes(b"\x00 no parquet")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_runs([table])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_runs([tmp_path / "missing.parquet"])


def test_a_table_that_polars_panics_at_is_refused(tmp_path, monkeypatch):
    def panics(*arguments, **options):
        raise pl.exceptions.PanicException("out of range")

    monkeypatch.setattr(pl, "read_parquet", panics)
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_runs([tmp_path / "t.parquet"])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("model.mixers", "[{", "its row cannot be read"),
        pytest.param("model.mixers", "[" * 10**6, "its row cannot be read", id="too deep"),
        ("optimizer.weight_decay", date(2020, 1, 1), "where text or a number is wanted"),
        ("precision", b"fp32", "precision is b'fp32', where text or a number is wanted"),
        ("test_accuracy", Decimal("0.5"), "test_accuracy is Decimal"),
        ("data.train.seed", 1, "data.train.seed is a part of train, which is a value"),
        ("model.mixers", "none", "config.model.mixers is"),
        ("test_accuracy", "high", "test_accuracy is"),
        ("seed", None, "config.seed is null"),
    ],
)
def test_a_changed_table_is_refused_by_the_run_and_what_is_wrong(
    tmp_path, capsys, column, value, message
):
    table = store_of(tmp_path / "runs", RUNS).write_table()
    pl.read_parquet(table).with_columns(pl.lit(value).alias(column)).write_parquet(table)
    assert main(["report", str(table), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert str(table) in said
    assert message in said
    assert "Give it as recallzoo run wrote it, or its results folder." in said


def test_each_place_must_have_finished_runs(tmp_path):
    store = store_of(tmp_path / "runs", RUNS)
    with pytest.raises(UserError, match="empty holds no finished runs"):
        open_runs([store.folder, Store(tmp_path / "empty").folder])
