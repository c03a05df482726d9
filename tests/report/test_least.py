"""The least that recalls is the smallest of the widths tried whose test accuracy is 0.9."""

import dataclasses

from stores import result, store_of

from recallzoo.report import write_report
from recallzoo.report._charts import Look
from recallzoo.report._entries import entries, labels_of
from recallzoo.report._least import least_figure, least_table


def at_widths(mixer: str, accuracies: dict[int, float], **options) -> list:
    return [result(mixer, width=w, accuracy=a, **options) for w, a in accuracies.items()]


def row(found, model: str) -> dict:
    table = least_table(found)
    (cells,) = [cells for cells in table["rows"] if cells[0] == model]
    names = [column["title"] for column in table["columns"]]
    return dict(zip(names, cells, strict=True)) | {"widths": [cells[3], cells[5], cells[7]]}


def test_the_smallest_width_that_reaches_it_is_shown_even_if_a_larger_one_fails():
    found = entries(at_widths("lookup", {8: 0.89, 16: 0.9, 32: 0.5, 64: 1.0}))
    least = row(found, "lookup")
    assert least["least: parameters"] == 16_000
    assert least["least: state, elements"] == 16 * 64
    assert least["widths tried"] == "8, 16, 32, 64"


def test_parameters_and_state_may_be_least_at_different_widths():
    runs = at_widths("lookup", {8: 1.0, 16: 1.0})
    runs[0] = dataclasses.replace(runs[0], state_size={"kv": 9000})
    assert row(entries(runs), "lookup")["widths"] == [8, None, 16]


def test_the_vectors_of_words_are_left_out_where_the_head_shares_them():
    runs = at_widths("lookup", {8: 1.0, 16: 1.0}, vocab_size=100)
    assert row(entries(runs), "lookup")["widths"][1] is None
    for one in runs:
        one.config["model"]["tie_embeddings"] = True
    name = "least: parameters without the vectors of words"
    assert row(entries(runs), "lookup")[name] == 8000 - 800


def test_what_validation_chose_counts_not_the_best_test_accuracy():
    runs = [
        result("lookup", learning_rate=1e-3, accuracy=0.99, valid_accuracy=0.1),
        result("lookup", learning_rate=1e-2, accuracy=0.5, valid_accuracy=0.9),
        result("lookup", learning_rate=1e-3, width=128, accuracy=0.99),
    ]
    assert row(entries(runs), "lookup")["widths"][0] == 128


def test_a_model_that_never_reaches_it_is_named_and_left_blank():
    found = entries(
        [*at_widths("lookup", {8: 1.0, 16: 1.0}), *at_widths("shift", {8: 0.2, 16: 0.3})]
    )
    figure = least_figure(found, Look.of(labels_of(found)))
    assert figure is not None
    assert "no width reaches it: shift (mqar, 64 tokens, 4 pairs)" in figure.caption
    assert row(found, "shift")["widths"] == [None, None, None]
    assert "lookup" in figure.svg()


def test_the_page_has_it_where_several_widths_were_tried(tmp_path):
    several = [*at_widths("lookup", {8: 0.2, 16: 1.0}), *at_widths("lookup", {8: 1.0}, seq_len=128)]
    for runs, has in ((several, True), (several[:1], False)):
        out = tmp_path / str(has)
        write_report(store_of(tmp_path / f"runs{has}", runs), out, ("html", "svg"))
        assert ('id="least"' in (out / "report.html").read_text()) is has
        assert (out / "least.svg").exists() is has


def test_where_no_model_recalls_the_page_has_the_table_alone(tmp_path):
    runs = at_widths("shift", {8: 0.2, 16: 0.3})
    write_report(store_of(tmp_path / "runs", runs), tmp_path / "out", ("html", "svg"))
    assert 'data-table="least"' in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "least.svg").exists()
