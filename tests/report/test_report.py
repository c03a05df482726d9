"""What the report says, whatever draws it."""

import copy
import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import HOSTILE, figure2, result, store_of

from recallzoo.cells import cells
from recallzoo.cli._outcome import print_table
from recallzoo.errors import StoreError, UserError
from recallzoo.report import write_report
from recallzoo.report._about import contracts, notes, runs_table
from recallzoo.report._accuracy import _label_at, accuracy_figure, run_row
from recallzoo.report._charts import Look
from recallzoo.report._entries import colours, entries, labels_of
from recallzoo.report._page import json_for_script
from recallzoo.report._published import published_points, published_rows
from recallzoo.report._sensitivity import sensitivity_table, window
from recallzoo.report._slices import bins
from recallzoo.report._sources import runs_of_store
from recallzoo.result import Result, Status
from recallzoo.store import Store

RATES = (1e-4, 1e-3, 1e-2)


def at_rates(*accuracies: float, **options) -> list:
    return [
        result(learning_rate=rate, accuracy=accuracy, **options)
        for rate, accuracy in zip(RATES, accuracies, strict=True)
    ]


def test_the_learning_rate_is_chosen_on_validation_and_test_is_shown():
    found = entries(
        [result(learning_rate=1e-3, valid_accuracy=0.9, accuracy=0.6, seed=seed) for seed in (0, 1)]
        + [
            result(learning_rate=1e-2, valid_accuracy=0.8, accuracy=0.7 + 0.2 * seed, seed=seed)
            for seed in (0, 1)
        ]
    )
    row = run_row(found[0])
    assert (row["learning_rate"], row["accuracy"], row["seeds"]) == ("0.001", 0.6, "0, 1")


def test_each_seed_has_its_learning_rate_where_runs_stopped_because_another_had_solved_the_task():
    def run(seed: int, rate: float, accuracy: float, status: Status):
        return result(
            seed=seed,
            learning_rate=rate,
            valid_accuracy=accuracy,
            accuracy=accuracy - 0.01,
            status=status,
        )

    (entry,) = entries(
        [
            run(0, 1e-3, 0.1, "group_solved"),
            run(0, 1e-2, 0.995, "solved"),
            run(1, 1e-3, 0.993, "solved"),
            run(1, 1e-2, 0.4, "group_solved"),
            run(2, 1e-3, 0.2, "finished"),
            run(2, 1e-2, 0.1, "finished"),
        ]
    )
    assert entry.cell.learning_rates == (1e-3, 1e-2)
    assert [run.test_accuracy for run in entry.cell.at_best] == pytest.approx([0.985, 0.983, 0.19])
    assert run_row(entry)["learning_rate"] == "0.001, 0.01"
    (row,) = sensitivity_table([entry])["rows"]
    assert row[6] == "0.001, 0.01"
    assert "best is the lowest tried; best is the highest tried" in row[-1]
    told = io.StringIO()
    print_table(list(entry.cell.results), told)
    assert "0.001, 0.01" in told.getvalue()
    assert "each seed's own where one solved the task first" in told.getvalue()


def test_no_two_entries_share_a_place_whatever_options_differ():
    found = entries(
        [
            result(num_layers=num_layers, vocab_size=vocab_size, num_examples=num_examples, width=w)
            for num_layers in (1, 2)
            for vocab_size in (128, 8192)
            for num_examples in (100, 200)
            for w in (64, 128)
        ]
    )
    places = {(entry.panel, entry.series, entry.width) for entry in found}
    assert len(places) == len(found) == 16
    assert {entry.series for entry in found} == {
        "attention, num_layers=1",
        "attention, num_layers=2",
    }
    assert "mqar, 64 tokens, 4 pairs; num_examples=100, train_num_examples=100, " in min(
        entry.panel for entry in found
    )


def test_options_that_all_cells_share_are_not_named():
    found = entries([result(width=64), result("base_conv", width=128, num_layers=4)])
    assert [entry.series for entry in found] == ["attention", "base_conv"]
    assert {entry.panel for entry in found} == {"mqar, 64 tokens, 4 pairs"}


def with_options(one: Result, *, batch_size: int, schedule: str) -> Result:
    config = copy.deepcopy(one.config)
    config["budget"]["batch_size"], config["optimizer"]["schedule"] = batch_size, schedule
    return dataclasses.replace(one, config=config)


def test_options_that_follow_the_data_do_not_break_a_line_and_are_named_with_all_its_values():
    short, long = result(seq_len=64), result(seq_len=256)
    runs = [
        with_options(short, batch_size=1024, schedule="linear"),
        with_options(short, batch_size=512, schedule="cosine"),
        with_options(long, batch_size=64, schedule="cosine"),
    ]
    assert [entry.series for entry in entries(runs)] == [
        "attention, schedule=cosine, batch_size=64 or 512",
        "attention, schedule=linear, batch_size=1024",
        "attention, schedule=cosine, batch_size=64 or 512",
    ]


def test_options_that_differ_together_are_all_named():
    runs = [
        with_options(result(), batch_size=1024, schedule="linear"),
        with_options(result(), batch_size=512, schedule="cosine"),
    ]
    assert [entry.series for entry in entries(runs)] == [
        "attention, batch_size=1024, schedule=linear",
        "attention, batch_size=512, schedule=cosine",
    ]


def test_options_that_cells_cannot_be_told_apart_without_are_named_though_they_differ_by_length():
    short, long = result(seq_len=64), result(seq_len=256)
    runs = [
        with_options(short, batch_size=1024, schedule="cosine"),
        with_options(short, batch_size=512, schedule="cosine"),
        with_options(long, batch_size=64, schedule="cosine"),
    ]
    assert [entry.series for entry in entries(runs)] == [
        "attention, batch_size=1024",
        "attention, batch_size=512",
        "attention, batch_size=64",
    ]


def test_mixers_of_one_label_are_told_apart():
    found = entries([result("attention", label="mine"), result("h3", label="mine")])
    assert [entry.series for entry in found] == [
        "mine, mixers=attention()",
        "mine, mixers=h3()",
    ]


def test_the_printed_table_tells_mixers_of_one_label_apart_and_names_what_differs_alone():
    def printed(*runs: Result) -> list[list[str]]:
        told = io.StringIO()
        print_table(list(runs), told)
        return [line.split() for line in told.getvalue().splitlines()]

    head, *lines = printed(
        result("base_conv", label="x", kernel_size=4),
        result("base_conv", label="x", kernel_size=30),
        result("h3", label="x"),
        result("attention", label="y"),
    )
    assert head[:3] == ["model", "mixers", "task"]
    assert [line[1:3] for line in lines[:2]] == [
        ["mixers=base_conv,", "kernel_size=4"],
        ["mixers=base_conv,", "kernel_size=30"],
    ]
    assert lines[2][1:3] == ["mixers=h3", "mqar"]
    assert lines[3][:2] == ["y", "mqar"]
    widths = [result("base_conv", kernel_size=width, width=width) for width in (64, 128)]
    assert printed(*widths)[0][:2] == ["model", "task"]


def test_a_mixer_keeps_its_colour_in_every_company():
    alone = colours(labels_of(entries([result("h3")])))["h3"]
    together = colours(labels_of(entries(figure2(widths=[64], seeds=[0], rates=[1e-3]))))
    assert together["h3"] == alone
    assert len(set(together.values())) == len(together)


def test_the_published_table_is_whole():
    points = published_points()
    assert points.height == 5 * 4 * 4
    assert points.unique(["mixer", "seq_len", "num_pairs", "d_model"]).height == points.height
    assert points["accuracy"].is_between(0, 1).all()
    assert points["hidden"].sum() == 19


def test_published_points_stand_beside_the_same_cells_only():
    same = result("base_conv", seq_len=128, num_pairs=8, width=256)
    others = [
        result("base_conv", seq_len=128, num_pairs=8, width=256, vocab_size=128),
        result("base_conv", seq_len=128, num_pairs=4, width=256),
        result("sliding_window", seq_len=128, num_pairs=8, width=256),
        result("base_conv", seq_len=128, num_pairs=8, width=96),
    ]
    found = entries([same, *others])
    rows = published_rows(found)
    assert [(row["accuracy"], row["width"], row["model"]) for row in rows] == [
        (0.84, 256, "base_conv, published")
    ]
    assert rows[0]["reading"] == "±0.01"
    short = result("base_conv", seq_len=128, num_pairs=8, width=256, kernel_size=3)
    assert published_rows(entries([short])) == []
    both = published_rows(entries([same, short]))
    assert [row["series"] for row in both] == ["base_conv, mixers=base_conv(kernel_size=-1)"]


def test_the_window_is_the_unbroken_stretch_around_the_best():
    cell = cells(at_rates(0.95, 1.0, 0.2))[0]
    found = window(cell, 0.9)
    assert (found.num_working, found.num_tried, found.is_open) == (2, 3, True)
    assert found.decades == pytest.approx(1.0)
    narrow = window(cell, 0.99)
    assert (narrow.num_working, narrow.decades, narrow.is_open) == (1, 0.0, False)


def test_a_stretch_that_is_broken_does_not_count():
    found = window(cells(at_rates(1.0, 0.1, 0.99))[0], 0.9)
    assert (found.num_working, found.decades) == (2, 0.0)


def test_no_learning_rate_works_where_nothing_is_right():
    assert window(cells(at_rates(0.0, 0.0, 0.0, status="diverged"))[0], 0.9).num_working == 0


def test_remarks_say_what_makes_a_window_doubtful():
    found = entries(
        [
            *at_rates(0.1, 0.2, 0.3),
            result("h3", accuracy=0.9),
            result("hyena", learning_rate=1e-4, accuracy=1.0, status="solved"),
            result("hyena", learning_rate=1e-3, accuracy=0.1, status="group_solved"),
        ]
    )
    table = sensitivity_table(found)
    remarks = {row[0]: row[-1] for row in table["rows"]}
    assert remarks["attention"] == "best is the highest tried"
    assert remarks["h3"] == "one learning rate tried"
    assert "1 stopped when another solved the task" in remarks["hyena"]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])


@given(st.sets(st.integers(-5, 5000), min_size=1, max_size=200))
def test_bins_share_out_all_values(values):
    edges = bins(sorted(values))
    assert sorted(v for v in values for low, high in edges if low <= v <= high) == sorted(values)
    assert edges == sorted(edges)


@given(st.recursive(st.text() | st.integers() | st.none(), lambda x: st.lists(x)))
def test_json_in_a_script_element_stays_json_and_ends_no_element(value):
    text = str(json_for_script(value))
    assert json.loads(text) == value
    assert not set(text) & set("<>&\u2028\u2029")


def test_the_table_of_runs_has_every_run_its_status_and_fallbacks():
    found = entries(
        [
            result(fallbacks=["no Triton: ran eager"], num_layers=1),
            result(learning_rate=1e-2, status="diverged", accuracy=0.0),
        ]
    )
    table = runs_table(found)
    titles = [column["title"] for column in table["columns"]]
    rows = [dict(zip(titles, row, strict=True)) for row in table["rows"]]
    assert sorted(row["status"] for row in rows) == ["diverged at step 17", "finished"]
    assert "no Triton: ran eager" in [row["fallbacks"] for row in rows]
    assert "num_layers" in titles


def test_divergence_and_fallbacks_are_noted_with_counts():
    found = entries(
        [
            result(seed=0, fallbacks=["ran eager"]),
            result(seed=1, status="diverged", fallbacks=["ran eager"]),
            result(seed=2, learning_rate=1e-2, status="group_solved"),
        ]
    )
    assert notes(found, {"Hyena, width 64": (2, 4), "H3, width 64": (1, 4)}) == [
        "3 runs of these recipes are not finished. Run the same recallzoo run command again to "
        "finish them. A cell that lacks some may choose another learning rate once it has them.",
        "not finished: 2 of 4 runs of Hyena, width 64",
        "not finished: 1 of 4 runs of H3, width 64",
        "1 runs stopped when another learning rate had solved their task; their accuracy is a "
        "lower bound.",
        "attention diverged at learning rate 0.001 in 1 of 2 runs.",
        "ran eager (2 runs)",
    ]


def test_the_page_names_the_cells_whose_runs_are_not_all_finished(tmp_path):
    done = [result(width=width, seed=seed) for width in (16, 32) for seed in (0, 1)]
    store = store_of(tmp_path / "runs", done[:3])
    assert runs_of_store(store).missing() == {}
    store.plan({one.hash: {"cell": f"width {one.config['model']['d_model']}"} for one in done})
    store.plan({"0123": {"cell": "width <64>"}})
    assert runs_of_store(store).missing() == {"width 32": (1, 2), "width <64>": (1, 1)}
    write_report(store, tmp_path / "out", ("html",))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 runs of these recipes are not finished" in page
    assert "not finished: 1 of 2 runs of width 32" in page
    assert "not finished: 1 of 1 runs of width &lt;64&gt;" in page


def test_a_folder_from_before_plans_were_kept_says_how_many_runs_are_left(tmp_path):
    store = store_of(tmp_path / "runs", [result()])
    (tmp_path / "runs" / "packs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "packs" / "x" / "pack.json").write_text(json.dumps(["a", "b"]))
    assert runs_of_store(store).missing() == {"cells that are not described": (2, 2)}


@pytest.mark.parametrize(
    "results",
    [
        [result()],
        [result(status="diverged", accuracy=0.0, rows=[])],
        [result(state_size={})],
        [result(), result(task="in_stream", seq_len=128), result(task="forgetting", width=32)],
    ],
    ids=["one run", "only diverged runs", "no known state", "several tasks"],
)
def test_every_kind_of_folder_gives_a_report(tmp_path, results):
    store = store_of(tmp_path / "runs", results)
    written = write_report(store, tmp_path / "out", ("html",))
    assert [path.name for path in written] == ["report.html"]


def test_bars_of_one_width_stand_in_the_order_of_the_numbers_in_their_names():
    labels = [f"learned, k = {k}" for k in (128, 16, 8)]
    found = entries([result(label, label=label) for label in labels])
    figure = accuracy_figure(found, Look.of(labels_of(found)))
    order = figure.spec["spec"]["layer"][0]["encoding"]["y"]["sort"]
    assert order == ["learned, k = 8", "learned, k = 16", "learned, k = 128"]


@pytest.mark.parametrize(
    ("accuracy", "high", "diamond", "at"),
    [
        (0.04, 0.05, None, 0.05),
        (0.04, 0.05, 0.14, 0.14),
        (0.04, 0.05, 0.7, 0.05),
        (0.9, 0.95, 0.8, 0.8),
        (0.9, 0.95, 0.99, 0.85),
    ],
)
def test_the_number_of_a_bar_is_not_written_over_its_spread_or_a_published_point(
    accuracy, high, diamond, at
):
    row = {"accuracy": accuracy, "low": 2 * accuracy - high, "high": high}
    assert _label_at(row, diamond) == pytest.approx(at)


def test_a_folder_without_runs_is_refused_and_nothing_is_written(tmp_path):
    store = Store(tmp_path / "runs")
    with pytest.raises(UserError, match=r"holds no finished runs to report on; train some first"):
        write_report(store, tmp_path / "out")
    (store.folder / "packs" / "a").mkdir(parents=True)
    (store.folder / "packs" / "a" / "pack.json").write_text('["0123"]')
    with pytest.raises(UserError, match="1 runs are planned in it"):
        write_report(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_equal_results_give_equal_files(tmp_path):
    results = figure2(widths=[64, 128], seeds=[0], rates=RATES[:1])[:4]
    files = []
    for order in (results, results[::-1]):
        store = store_of(tmp_path / str(len(files)) / "runs", order)
        out = tmp_path / f"out{len(files)}"
        written = write_report(store, out, ("html", "svg"))
        files.append({path.name: path.read_bytes() for path in written})
    assert files[0] == files[1]


def test_pictures_are_whole_documents_with_labels_as_text(tmp_path):
    store = store_of(tmp_path / "runs", [result(HOSTILE, width=64), result(HOSTILE, width=128)])
    written = write_report(store, tmp_path / "out", ("svg", "png"))
    assert {path.suffix for path in written} == {".svg", ".png"}
    for path in written:
        if path.suffix == ".svg":
            root = ET.fromstring(path.read_text())
            assert not [e for e in root.iter() if e.tag.endswith(("script", "image"))]
            if path.name == "accuracy.svg":
                assert any("x.py:</script><script>" in (e.text or "") for e in root.iter())
        else:
            assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_text_that_no_format_can_hold_is_replaced(tmp_path):
    store = store_of(tmp_path / "runs", [result("a\x00b\ud800\x1b[31m")])
    written = write_report(store, tmp_path / "out", ("html", "svg"))
    for path in written:
        assert "\x00" not in path.read_text(encoding="utf-8")


def test_the_page_names_no_address_to_load_from(tmp_path):
    store = store_of(tmp_path / "runs", [result(HOSTILE)])
    text = write_report(store, tmp_path / "out", ("html",))[0].read_text()
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    addresses = re.findall(r"(?:src|href)=\"([^\"]*)\"|url\(([^)]*)\)", outside)
    assert {a or b for a, b in addresses if not (a or b).startswith("#")} == {"data:,"}
    assert "default-src 'none'" in outside


def test_commands_are_remembered_once_each_and_shown(tmp_path):
    store = store_of(tmp_path / "runs", [result()])
    for command in ("recallzoo run a --x '<b>'", "recallzoo run b", "recallzoo run b"):
        store.add_command(command)
    assert store.commands() == ["recallzoo run a --x '<b>'", "recallzoo run b"]
    text = write_report(store, tmp_path / "out", ("html",))[0].read_text()
    assert "<code>recallzoo run a --x &#39;&lt;b&gt;&#39;</code>" in text
    (store.folder / "commands.json").write_text("{}")
    with pytest.raises(StoreError, match=r"commands\.json is damaged"):
        store.commands()


def test_contract_verdicts_are_shown_and_damaged_ones_named(tmp_path):
    store = store_of(tmp_path / "runs", [result()])
    verdict = {
        "mixer": {"name": HOSTILE},
        "d_model": 64,
        "seq_len": 32,
        "passed": True,
        "summary": "causal  ok  <b>",
    }
    path = store.folder / "contracts" / "Mixer-0123.json"
    path.parent.mkdir()
    path.write_text(json.dumps(verdict))
    text = write_report(store, tmp_path / "out", ("html",))[0].read_text()
    assert "causal  ok  &lt;b&gt;" in text
    assert "checked for width 64, 32 tokens" in text
    path.write_text("{}")
    with pytest.raises(StoreError, match=r"Mixer-0123\.json is no contract report"):
        contracts(store)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    store = store_of(tmp_path / "runs", [result()])
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="is a file; a folder for the report is wanted"):
        write_report(store, tmp_path / "out", ("svg",))
    assert Path(tmp_path / "out").read_text() == "a file"
