"""What `benchmarks/table1.py` and `table2.py` make of the sums that jobs leave."""

# pyright: reportMissingImports=false

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import table1
import table2
import table_charts
import text_models
from text_models import Job

from recallzoo.presets import registry

CUT = {"rate": 1.25e-7, "max_count": 3, "share_of_tokens": 0.25}
SLICES = [["all", "all", None, None, None], ["ar_hit", "hits", None, None, 3],
          ["other", "other", None, None, 3], ["frequency_repeated", "2 to 3", 2, 3, None],
          ["frequency_new", "0", 0, 0, None]]  # fmt: skip


def keep(folder: Path, job: Job, hits: float, other: float, **changed: Any) -> None:
    """Sums of a job on two documents: 2 tokens of 8 are AR hits, with these losses in nats. The
    hits are the repeated pairs, seen 2 or 3 times in training; the others are new."""
    about: dict[str, Any] = {
        **{name: None for name in text_models.ROW},
        "model": job.model,
        "learning_rate": job.learning_rate,
        "seed": job.seed,
        "corpus": "text",
        "parameters": 1,
        "tokens_per_second": 1.0,
        "valid_loss_nats": hits + other,
        "cuts": [CUT],
        "slices": SLICES,
        "order": {"seed": job.seed, "context": 8},
        "split_checksum": "s",
        "train_checksum": "t",
        "test_tokens": 8,
        "causal": "topk" not in job.model,
        "special": None,
        "share_of_layers": 0.0,
        **changed,
    }
    losses = np.array([[hits + 3 * other] * 2, *[[hits] * 2, [3 * other] * 2] * 2])
    tokens = np.array([[4.0] * 2, *[[1.0] * 2, [3.0] * 2] * 2])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / f"{job.name}.npz", about=np.array(json.dumps(about)), num_tokens=tokens,
        losses=losses,
    )  # fmt: skip


def keep_metrics(folder: Path, job: Job, hits: tuple[float, ...], other: float) -> None:
    """Metrics of a job with a look at the validation split every second of its steps of 10 tokens,
    with these losses on AR hits."""
    lines: list[dict[str, Any]] = []
    for i, loss in enumerate(hits, start=1):
        lines += [{"step": step, "tokens": 10 * step} for step in (2 * i - 1, 2 * i)]
        recall = {"valid_ar_hit_3_loss_nats": loss, "valid_other_3_loss_nats": other}
        lines.append({"step": 2 * i, "valid_loss_nats": 2.0, **recall})
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{job.name}.jsonl").write_text(text)


def charts_of(found: dict[str, Any], metrics: Path) -> tuple[dict[str, Any], list[str]]:
    """The charts by kind, and what is told of them."""
    figures, told = table_charts.figures(found, metrics, "t")
    return {figure.name.removeprefix("t_"): figure for figure in figures}, told


def charted(figure: Any, of: str = "seed") -> dict[tuple[Any, ...], Any]:
    """Values of a chart by series, kind of tokens, x and seed."""
    rows = [row for rows in figure.spec["datasets"].values() for row in rows]
    places = ("series", "which", "x", "seed")
    return {tuple(row[p] for p in places): row["value"] for row in rows if row["of"] == of}


def charts_in(folder: Path) -> dict[str, str]:
    """SVG files by name, less the numbers of their clips, which count on from chart to chart."""
    return {
        path.name: re.sub(r"clip\d+", "clip", path.read_text()) for path in folder.glob("*.svg")
    }


def options(out: Path, script: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    check = getattr(script, "CHECK", [])
    text_models.add_options(parser, script.MODELS, check)
    parser.add_argument("--base", default="base_conv")
    return parser.parse_args(["--data", "DATA", "--out", str(out), *words])


def test_the_share_of_the_gap_is_that_of_the_papers_formula(tmp_path):
    keep(tmp_path / "sums", Job("attention", 8e-4, 0), hits=1.0, other=3.0)
    keep(tmp_path / "sums", Job("hyena", 8e-4, 0), hits=2.5, other=3.5)
    rows = {row["model"]: row for row in table1.table(options(tmp_path, table1))["rows"]}
    assert rows["hyena"]["share_of_gap"]["value"] == pytest.approx(1.5 / (1.5 + 3 * 0.5))
    assert rows["hyena"]["ppl_ar_hits"] == pytest.approx(np.exp(2.5))
    assert rows["attention"]["ppl_overall"] == pytest.approx(np.exp(2.5))
    assert "share_of_gap" not in rows["attention"]


def test_validation_chooses_the_learning_rate_and_all_tried_are_told(tmp_path):
    keep(tmp_path / "sums", Job("attention", 8e-4, 0), 1.0, 3.0, valid_loss_nats=2.0)
    keep(tmp_path / "sums", Job("attention", 4e-4, 0), 0.5, 3.0, valid_loss_nats=2.5)
    [row] = table1.table(options(tmp_path, table1))["rows"]
    assert row["learning_rate"] == 8e-4
    assert row["tried_learning_rates"] == {"0.0008": 2.0, "0.0004": 2.5}


def test_gaps_are_closed_between_base_conv_and_attention(tmp_path):
    keep(tmp_path / "sums", Job("attention", 8e-4, 0), hits=1.0, other=3.0)
    keep(tmp_path / "sums", Job("base_conv", 8e-4, 0), hits=3.0, other=3.5)
    keep(tmp_path / "sums", Job("base_conv_lookup", 8e-4, 0), hits=1.5, other=3.5)
    rows = {row["model"]: row for row in table2.table(options(tmp_path, table2))["rows"]}
    row = rows["base_conv_lookup"]
    assert row["ar_gap_closed"]["value"] == pytest.approx(0.75)
    assert row["gap_closed"]["value"] == pytest.approx(1.5 / 3.5)
    base, reference, own = (np.exp(x / 4) for x in (13.5, 10.0, 12.0))
    assert row["gap_closed_ppl"] == pytest.approx((base - own) / (base - reference))
    assert "gap_closed" not in rows["base_conv"]
    assert "gap_closed" not in rows["attention"]


def test_a_seed_is_compared_with_its_own_where_that_is_there(tmp_path):
    for seed, loss in ((0, 1.0), (1, 2.0)):
        keep(tmp_path / "sums", Job("attention", 8e-4, seed), hits=loss, other=3.0)
        keep(tmp_path / "sums", Job("base_conv_lookup", 8e-4, seed), hits=2.0, other=3.0)
    keep(tmp_path / "sums", Job("base_conv", 8e-4, 0), hits=3.0, other=3.0)
    found = table2.table(options(tmp_path, table2))
    rows = {row["seed"]: row for row in found["rows"] if row["model"] == "base_conv_lookup"}
    assert (rows[1]["reference_seed"], rows[1]["base_seed"]) == (1, 0)
    assert rows[0]["gap_closed"]["value"] == pytest.approx(0.5)
    assert rows[1]["gap_closed"]["value"] == pytest.approx(1.0)
    [about] = [one for one in found["seeds"] if one["model"] == "base_conv_lookup"]
    assert about["gap_closed"] == pytest.approx({"mean": 0.75, "lowest": 0.5, "highest": 1.0})


def test_a_row_whose_model_looks_ahead_says_so(tmp_path):
    for name in ("attention", "base_conv", "base_conv_topk"):
        keep(tmp_path / "sums", Job(name, 8e-4, 0), hits=len(name), other=3.0)
    rows = table2.table(options(tmp_path, table2))["rows"]
    assert [row["model"] for row in rows if not row["causal"]] == ["base_conv_topk"]


@pytest.mark.parametrize("name", ["split_checksum", "train_checksum", "test_tokens"])
def test_jobs_on_other_data_do_not_share_a_table(name, tmp_path):
    keep(tmp_path / "sums", Job("attention", 8e-4, 0), 1.0, 3.0)
    keep(tmp_path / "sums", Job("hyena", 8e-4, 0), 2.0, 3.0, **{name: "other"})
    with pytest.raises(SystemExit, match=f"differ in {name}"):
        table1.table(options(tmp_path, table1))


def test_another_seed_orders_data_otherwise_and_is_no_other_data(tmp_path):
    keep(tmp_path / "sums", Job("attention", 8e-4, 0), 1.0, 3.0)
    keep(tmp_path / "sums", Job("attention", 8e-4, 1), 1.0, 3.0)
    assert len(table1.table(options(tmp_path, table1))["rows"]) == 2


def test_every_model_comes_once_before_learning_rates_are_tried(tmp_path):
    args = options(tmp_path, table1, "--seeds", "0", "1", "--models", "attention", "rwkv")
    names = [job.name for job in text_models.jobs_of(args)]
    assert names[:2] == ["attention-lr0.0008-seed0", "rwkv-lr0.0008-seed0"]
    assert len(names) == len(set(names)) == 2 * (3 + 1)


def test_all_models_of_the_tables_are_presets():
    for model in (*table1.MODELS, *table2.MODELS):
        assert f"{model}-70m" in registry


def test_charts_hold_the_numbers_of_the_table_by_seed_and_their_mean(tmp_path):
    for seed, loss in ((0, 1.0), (1, 2.0)):
        keep(tmp_path / "sums", Job("attention", 8e-4, seed), hits=loss, other=3.0)
    keep(tmp_path / "sums", Job("base_conv", 8e-4, 0), hits=3.0, other=3.5)
    keep(tmp_path / "sums", Job("base_conv_lookup", 8e-4, 0), hits=1.5, other=3.5)
    charts, _ = charts_of(table2.table(options(tmp_path, table2)), tmp_path / "metrics")
    assert list(charts) == ["frequency", "cuts", "closed"]
    repeated, new = "pair repeated in context", "pair new"
    loss = charted(charts["frequency"])
    assert loss["attention", repeated, "2 to 3", 0] == 1.0
    assert loss["attention", repeated, "2 to 3", 1] == 2.0
    assert loss["base_conv", new, "0", 0] == 3.5
    means = charted(charts["frequency"], "mean")
    assert means["attention", repeated, "2 to 3", None] == 1.5
    upper, lower = [part["data"]["name"] for part in charts["cuts"].spec["concat"]]
    data = charts["cuts"].spec["datasets"]
    hits = [r["value"] for r in data[upper] if r["which"] == "AR hits" and r["seed"] == 1]
    assert hits == pytest.approx([np.exp(2.0)])
    shares = {r["series"]: r["value"] for r in data[lower] if r["of"] == "seed" and r["seed"] == 0}
    assert shares == pytest.approx({"base_conv": 2 / 3.5, "base_conv_lookup": 0.5 / 2})
    closed = charted(charts["closed"])
    assert closed["base_conv_lookup", "AR hits", 0, 0] == pytest.approx(0.75)
    assert closed["base_conv_lookup", "all tokens", 0, 0] == pytest.approx(1.5 / 3.5)


def test_recall_over_training_is_that_of_the_learning_rate_chosen(tmp_path):
    for rate, valid in ((8e-4, 2.0), (4e-4, 2.5)):
        job = Job("attention", rate, 0)
        keep(tmp_path / "sums", job, 1.0, 3.0, valid_loss_nats=valid)
        keep_metrics(tmp_path / "metrics", job, hits=(valid, 0.5), other=3.0)
    charts, _ = charts_of(table1.table(options(tmp_path, table1)), tmp_path / "metrics")
    assert charted(charts["training"]) == {
        ("attention", "AR hits", 20, 0): 2.0,
        ("attention", "AR hits", 40, 0): 0.5,
        ("attention", "other tokens", 20, 0): 3.0,
        ("attention", "other tokens", 40, 0): 3.0,
    }


def test_models_keep_their_colour_over_charts_and_when_others_come(tmp_path):
    def colours() -> list[dict[str, str]]:
        charts, _ = charts_of(table1.table(options(tmp_path, table1)), tmp_path / "metrics")
        scales = []
        for chart in charts.values():
            encodings = [layer["encoding"] for spec in chart.spec.get("concat", [chart.spec])
                         for layer in spec["spec"]["layer"]]  # fmt: skip
            found = [e["color"]["scale"] for e in encodings if "color" in e]
            scales += [dict(zip(s["domain"], s["range"], strict=True)) for s in found]
        return scales

    for model in ("attention", "rwkv"):
        keep(tmp_path / "sums", Job(model, 8e-4, 0), len(model), 3.0)
        keep_metrics(tmp_path / "metrics", Job(model, 8e-4, 0), hits=(2.0,), other=3.0)
    before = colours()
    keep(tmp_path / "sums", Job("long_conv", 8e-4, 0), 5.0, 3.0)
    for model in ("attention", "rwkv"):
        assert len({one[model] for one in (*before, *colours()) if model in one}) == 1


def test_models_without_data_are_left_out_and_told(tmp_path, capsys):
    for model in ("attention", "hyena"):
        keep(tmp_path / "sums", Job(model, 8e-4, 0), len(model), 3.0)
    keep_metrics(tmp_path / "metrics", Job("hyena", 8e-4, 0), hits=(2.0,), other=3.0)
    results = tmp_path / "results" / "table1.json"
    words = ["--data", "DATA", "--out", str(tmp_path), "--table-only", "--results", str(results)]
    assert table1.main([*words, "--models", "attention", "hyena", "rwkv"]) == 0
    told = capsys.readouterr().out
    assert "table1_cuts.svg: Not drawn, for want of sums: rwkv." in told
    lacking = "Not drawn, for want of metrics with losses by recall: attention, rwkv."
    assert f"table1_training.svg: {lacking}" in told
    svg = charts_in(results.parent)
    assert sorted(svg) == ["table1_cuts.svg", "table1_frequency.svg", "table1_training.svg"]
    for name in ("table1_cuts.svg", "table1_frequency.svg"):
        assert ">attention</text>" in svg[name]
        assert ">hyena</text>" in svg[name]
    assert ">hyena</text>" in svg["table1_training.svg"]
    assert ">attention</text>" not in svg["table1_training.svg"]
    assert "attention, rwkv." in svg["table1_training.svg"]

    again = tmp_path / "again"
    words = ["--table", str(results), "--metrics", str(tmp_path / "metrics"), "--out", str(again)]
    assert table_charts.main(words) == 0
    assert charts_in(again) == svg


def test_charts_say_which_model_looks_ahead(tmp_path):
    for name in ("attention", "base_conv", "base_conv_topk"):
        keep(tmp_path / "sums", Job(name, 8e-4, 0), hits=len(name), other=3.0)
    charts, _ = charts_of(table2.table(options(tmp_path, table2)), tmp_path / "metrics")
    for chart in charts.values():
        assert ">base_conv_topk (looks ahead)</text>" in chart.svg()


def test_a_seed_without_metrics_is_told(tmp_path):
    for seed in (0, 1):
        keep(tmp_path / "sums", Job("attention", 8e-4, seed), 1.0, 3.0)
    keep_metrics(tmp_path / "metrics", Job("attention", 8e-4, 0), hits=(2.0,), other=3.0)
    found = table1.table(options(tmp_path, table1, "--models", "attention"))
    _, told = charts_of(found, tmp_path / "metrics")
    assert "t_training.svg: Without metrics: attention-lr0.0008-seed1." in told
