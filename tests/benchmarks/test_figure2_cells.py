"""What `benchmarks/figure2_cells.py` and `figure2_time.py` make of results folders."""

# pyright: reportMissingImports=false

import copy
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import figure2_cells
import figure2_time
import polars as pl
import pytest
from figure2_time import Times
from polars.testing import assert_frame_equal

from recallzoo.cells import cell_words
from recallzoo.files import read_json, write_json
from recallzoo.recipes._figure2 import BATCH_SIZES
from recallzoo.recipes.figure2 import figure2 as recipe
from recallzoo.result import Result
from recallzoo.store import Store
from tests.report.stores import figure2, result, store_of

RESULTS = Path(__file__).resolve().parents[2] / "results"
SPEED = {
    "cells": [
        {
            "mixer": mixer,
            "seq_len": seq_len,
            "d_model": width,
            "ms_per_run_and_step": ours,
            "reference": {"step": {"ms": 10.0 * ours + 5}},
        }
        for mixer in ("attention", "rwkv")
        for seq_len, width, ours in ((64, 64, 0.5), (64, 512, 4.0), (128, 128, 1.5),
                                     (512, 64, 1.0), (512, 512, 16.0))
    ]
}  # fmt: skip


@pytest.fixture
def times(tmp_path) -> Times:
    write_json(tmp_path / "speed.json", SPEED)
    return Times(tmp_path / "speed.json")


def in_precision(precision: str, accuracy: float, seed: int, **options: Any) -> Result:
    one = result(seed=seed, accuracy=accuracy, **options)
    config = {**copy.deepcopy(one.config), "precision": precision}
    return dataclasses.replace(one, hash=f"{precision}{one.hash}"[:16], config=config)


def test_a_run_that_two_folders_hold_counts_once(tmp_path, times):
    runs = [result(seed=seed, accuracy=0.5 + 0.1 * seed) for seed in range(3)]
    store_of(tmp_path / "first", runs[:2])
    store_of(tmp_path / "second", runs[1:])
    content = summary([tmp_path / "first", tmp_path / "second"], times)
    (row,) = content["cells"]
    assert row["seeds"] == [0, 1, 2]
    assert (row["test_accuracy"], row["lowest"], row["highest"]) == (0.6, 0.5, 0.7)
    assert row["steps"] == {"0.001": [100, 100, 100]}
    assert (row["commit"], row["device"], row["precision"]) == ("0123abc", "CPU, 1 threads", "fp32")


def test_a_table_stands_for_its_folder_and_says_what_it_does_not_know(tmp_path, times):
    runs = [result(width=width, seed=seed) for width in (64, 128) for seed in range(2)]
    whole = summary([store_of(tmp_path / "whole", runs).folder], times)
    folder = store_of(tmp_path / "folder", runs[:2]).folder
    table = store_of(tmp_path / "other", runs[1:]).write_table()
    for paths in ([folder, table], [table, folder]):
        content = summary(paths, times)
        assert content["cells"] == whole["cells"]
        assert [row["runs"] for row in content["folders"]] == [2]
        (row,) = content["tables"]
        assert (row["table"], row["runs"], row["device"]) == (
            "table.parquet",
            3,
            ["CPU, 1 threads"],
        )
        assert {"torch", "fallbacks", "wall_seconds", "runs_missing"} <= {*row["unknown"]}
        assert content["torch"] == ["2.13.0", "unknown"]
        assert content["commit"] == ["0123abc"]
        found = figure2_cells.read_sources(paths).results
        assert [one.hash for one in found if "torch" in one.provenance] == [
            one.hash for one in found if one.hash in Store(folder).hashes()
        ]


def test_a_folder_that_was_to_complete_a_table_says_what_its_cells_lack(tmp_path, times):
    runs = [result(width=64, seed=seed) for seed in range(3)]
    others = [result(width=128), result(width=256)]
    table = store_of(tmp_path / "gone", [runs[0], others[0]]).write_table()
    store = store_of(tmp_path / "o", [])
    wanted = [*runs[1:], others[1]]
    store.plan({r.hash: {"cell": cell_words(r.label, r.config)} for r in wanted})
    for finished, missing in ((0, 2), (1, 1), (2, 0)):
        for run in runs[1 : 1 + finished]:
            store.write(run)
        content = summary([table, tmp_path / "o"], times)
        assert [row["runs_missing"] for row in content["cells"]] == [missing, None]
        assert content["not_begun"] == [
            "attention, 2 layers, width 256, fp32; mqar, 64 tokens, 4 pairs"
        ]


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["figure2_cells.py", *map(str, words)])
    figure2_cells.main()


def test_a_table_is_extended_from_itself_and_a_folder(tmp_path, times, monkeypatch):
    runs = [result(seed=seed, status="diverged" if seed else "finished") for seed in range(4)]
    table = store_of(tmp_path / "a", runs[:3]).write_table()
    folder = store_of(tmp_path / "b", runs[2:]).folder
    out, wanted = tmp_path / "cells.json", store_of(tmp_path / "whole", runs).table()
    command(monkeypatch, table, folder, "--out", out, "--table", table)
    assert_frame_equal(pl.read_parquet(table), wanted)
    assert read_json(out)["cells"][0]["seeds"] == [0, 1, 2, 3]
    for source, other in ((store_of(tmp_path / "empty", []).folder, table), (table, out)):
        with pytest.raises(SystemExit):
            command(monkeypatch, source, "--out", tmp_path / "no.json", "--table", other)
    assert_frame_equal(pl.read_parquet(table), wanted)
    assert not (tmp_path / "no.json").exists()


def test_denser_rates_are_left_out_of_cells_and_table_but_are_not_missing(tmp_path, monkeypatch):
    runs = [result(learning_rate=rate, accuracy=rate) for rate in (1e-4, 1e-3, 2.15443e-3)]
    store = store_of(tmp_path / "o", runs)
    store.plan({one.hash: {"cell": "the cell"} for one in runs})
    out, table = tmp_path / "cells.json", tmp_path / "table.parquet"
    command(monkeypatch, store.folder, "--out", out, "--table", table, "--num-learning-rates", 3)
    (row,) = read_json(out)["cells"]
    assert (row["learning_rates"], row["runs"], row["runs_missing"]) == ([1e-3], 2, 0)
    assert pl.read_parquet(table)["optimizer.learning_rate"].sort().to_list() == [1e-4, 1e-3]


def test_a_table_does_not_lose_runs_that_are_not_counted(tmp_path, monkeypatch, capsys):
    runs = [result(learning_rate=rate) for rate in (1e-4, 1e-3, 2.15443e-3)]
    table = store_of(tmp_path / "o", runs).write_table()
    out = tmp_path / "cells.json"
    with pytest.raises(SystemExit):
        command(monkeypatch, table, "--out", out, "--table", table, "--num-learning-rates", 3)
    assert "1 runs" in capsys.readouterr().err
    assert (len(pl.read_parquet(table)), out.exists()) == (3, False)


def test_the_published_table_has_the_published_cells(times):
    published = read_json(RESULTS / "figure2.json")["cells"]
    content = summary([RESULTS / "recipes" / "figure2.parquet"], times)
    assert json.loads(json.dumps(content["cells"])) == [
        {**row, "runs_missing": None} for row in published
    ]


def test_part_of_a_sweep_says_what_it_lacks(tmp_path, times):
    runs = [result(width=64, seed=seed) for seed in range(3)] + [result(width=128)]
    store = store_of(tmp_path / "o", runs[:2])
    cell_of = {one.hash: {"cell": f"width {one.config['model']['d_model']}"} for one in runs}
    store.plan(cell_of)
    content = summary([tmp_path / "o"], times)
    (row,) = content["cells"]
    assert (row["runs"], row["runs_missing"]) == (2, 1)
    assert content["not_begun"] == ["width 128"]


def test_a_whole_figure_is_small_and_has_the_published_points(tmp_path, times, monkeypatch):
    store_of(tmp_path / "o", figure2())
    out = tmp_path / "figure2.json"
    command(monkeypatch, tmp_path / "o", "--out", out)
    rows = read_json(out)["cells"]
    assert len(rows) == 5 * 4 * 4
    assert all(row["published"] is not None for row in rows)
    assert out.stat().st_size < 200_000


@pytest.mark.parametrize(
    ("bf16", "fp32", "within"),
    [
        ((0.50, 0.60), (0.56, 0.58), True),
        ((0.50, 0.52), (0.56, 0.58), False),
        ((0.5,), (0.5,), None),
    ],
)
def test_precisions_agree_where_they_are_no_further_apart_than_seeds(
    tmp_path, times, bf16, fp32, within
):
    runs = [in_precision("bf16", accuracy, seed) for seed, accuracy in enumerate(bf16)]
    runs += [in_precision("fp32", accuracy, seed) for seed, accuracy in enumerate(fp32)]
    runs += [in_precision("fp32", 0.1, 0, width=128)]  # which has no counterpart
    store_of(tmp_path / "o", runs)
    (pair,) = summary([tmp_path / "o"], times)["precision"]
    assert pair["within_seeds"] is within
    assert pair["seeds"] == [len(bf16), len(fp32)]
    assert pair["difference"] == pytest.approx(sum(bf16) / len(bf16) - sum(fp32) / len(fp32))


def summary(paths: list[Path], times: Times) -> dict[str, Any]:
    return figure2_cells.summary(figure2_cells.read_sources(paths), times)


def calls(folder: Path, *wall_seconds: float | None) -> None:
    entries = [{"wall_seconds": seconds} for seconds in wall_seconds]
    write_json(folder / "sweep.json", {"record_version": 1, "calls": entries})


def as_timed(one: Result, **different: Any) -> Result:
    """A run of the model and the batches that the reference was timed with, but for these."""
    config = copy.deepcopy(one.config)
    seq_len = config["data"]["test"][0]["task"]["seq_len"]
    options = {"batch_size": BATCH_SIZES[seq_len], "state_mixer": "identity", **different}
    config["budget"]["batch_size"] = options.pop("batch_size")
    config["model"].update(options)
    return dataclasses.replace(one, config=config)


def test_time_is_held_against_the_steps_that_the_reference_would_take(tmp_path, times):
    runs = [result(width=64), result("rwkv4", width=512), result(width=128)]  # 100 steps each
    store_of(tmp_path / "o", [as_timed(run) for run in runs])
    calls(tmp_path / "o", 0.5, 0.5)
    (row,) = summary([tmp_path / "o"], times)["folders"]
    curve = 10 + 35 * (128**2 - 64**2) / (512**2 - 64**2)
    line = 10 + 35 * (128 - 64) / (512 - 64)
    assert row["speedup"] == [round((10 + 45 + ms) / 10, 1) for ms in (curve, line)]
    assert (row["wall_seconds"], row["steps"], row["calls"]) == (1.0, 300, 2)


OTHERWISE = {
    "unknown size": as_timed(result(seq_len=128)),
    "unknown layers": as_timed(result(seed=1), num_layers=4),
    "unknown batches": as_timed(result(seed=1), batch_size=1024),
    "unknown state mixer": as_timed(result(seed=1), state_mixer="tanh_mlp"),
}


@pytest.mark.parametrize("how", ["killed", "no record", *OTHERWISE])
def test_no_speedup_is_told_where_a_time_is_not_known(tmp_path, times, how):
    runs = [as_timed(result()), *([OTHERWISE[how]] if how in OTHERWISE else [])]
    store_of(tmp_path / "o", runs)
    if how != "no record":
        calls(tmp_path / "o", 1.0, *([None] if how == "killed" else []))
    (row,) = summary([tmp_path / "o"], times)["folders"]
    assert (row["runs"], row["speedup"], row["reference_hours"]) == (len(runs), None, None)


def test_times_are_those_measured_and_grow_with_the_width_between_them(times):
    for cell in SPEED["cells"]:
        at = (cell["mixer"], cell["seq_len"], cell["d_model"])
        assert times.ours_ms(*at) == pytest.approx(cell["ms_per_run_and_step"])
    for seq_len in (64, 128, 512):
        found = [times.ours_ms("rwkv4", seq_len, width) for width in (64, 128, 256, 512)]
        assert all(a < b for a, b in itertools.pairwise(found))
    # At 128 the exponent is a third of the way from that at 64, which is 1, to 4/3 at 512.
    assert times.ours_ms("attention", 128, 256) == pytest.approx(1.5 * 2 ** (1 + 1 / 9))
    assert times.ours_ms("hyena", 64, 64) is None
    assert times.reference_ms("hyena", 64, 64) is None


def test_a_run_takes_the_steps_of_all_its_epochs(times):
    (run,) = recipe(("attention",), (64,), (64,), learning_rates=(1e-3,), seeds=(0,))
    seconds = figure2_time.seconds_of(run, times)
    assert seconds == pytest.approx(0.5e-3 * 64 * 195)
    deeper = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=4))
    assert figure2_time.seconds_of(deeper, times) == pytest.approx(2 * seconds)
    larger = dataclasses.replace(run, budget=dataclasses.replace(run.budget, batch_size=1024))
    assert figure2_time.seconds_of(larger, times) == pytest.approx(2 * 97 / 195 * seconds)
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, state_mixer="tanh_mlp"))
    assert figure2_time.seconds_of(other, times) is None


def test_estimates_are_printed_by_length(tmp_path, capsys, monkeypatch):
    write_json(tmp_path / "speed.json", json.loads(json.dumps(SPEED)))
    words = ["figure2_time.py", "figure2", "--speed", str(tmp_path / "speed.json")]
    words += ["--seq-lens", "64", "--mixers", "attention", "hyena", "--widths", "64"]
    monkeypatch.setattr(sys, "argv", [*words, "--seeds", "0"])
    figure2_time.main()
    out = capsys.readouterr().out
    assert "length 64: 25 s; Attention 25 s (4 runs)" in out
    assert "in all 25 s; 4 runs of unknown time" in out
