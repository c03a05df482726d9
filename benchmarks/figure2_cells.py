"""Our cells of the paper's Figure 2 beside the published ones, as a table and as JSON.

    python benchmarks/figure2_cells.py runs/figure2-64 runs/figure2-128 --out results/figure2.json

Accuracy is that on the test set at the learning rate chosen on the validation set: mean, lowest
and highest over seeds, and the mean at every learning rate tried. A run that several folders hold
counts once. Cells that lack runs say how many, and `not_begun` names those without any. `precision`
lays cells side by side that differ in nothing but bf16 and fp32. `folders` has each folder's wall
time, data, compilation and validation included but not the start of Python and Ray, beside what
the reference's steps would take for the same runs (`figure2_time.py`), where its step is known at
all of their sizes.
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl
from figure2_time import SPEED, Times

from recallzoo.cells import Cell, cells
from recallzoo.files import read_json, write_json
from recallzoo.report._published import published_points
from recallzoo.result import Result
from recallzoo.store import Store

MADE_WITH = ("commit", "device", "torch", "triton", "pack_size", "compiled", "fallbacks")


def row_of(cell: Cell, published: pl.DataFrame, planned: dict[str, set[str]]) -> dict[str, Any]:
    """One cell, with the published accuracy of the same mixer, length and width if there is one.
    `planned` has the hashes of the runs of its cell, by that of any of them."""
    first = cell.results[0]
    mixer = first.config["model"]["mixers"][0]["name"]
    task, width = first.config["data"]["test"][0]["task"], first.config["model"]["d_model"]
    match = published.filter(
        (pl.col("mixer") == mixer)
        & (pl.col("seq_len") == task["seq_len"])
        & (pl.col("num_pairs") == task["num_pairs"])
        & (pl.col("d_model") == width)
    )
    accuracies = [result.test_accuracy for result in cell.at_best]
    finished = {result.hash for result in cell.results}
    wanted = set().union(*(planned.get(run_hash, set()) for run_hash in finished))
    budget = first.config["budget"]
    return {
        "model": cell.label,
        "mixer": mixer,
        "seq_len": task["seq_len"],
        "num_pairs": task["num_pairs"],
        "d_model": width,
        "num_layers": first.config["model"]["num_layers"],
        "precision": first.config["precision"],
        "schedule": first.config["optimizer"].get("schedule"),
        "num_epochs": budget["num_epochs"],
        "stop_accuracy": budget.get("stop_accuracy"),
        "stop_group": budget.get("stop_group"),
        "learning_rates": cell.learning_rates,
        "test_accuracy": round(cell.test_accuracy, 4),
        "lowest": round(min(accuracies), 4),
        "highest": round(max(accuracies), 4),
        "seeds": sorted(result.config["seed"] for result in cell.at_best),
        "published": match["accuracy"][0] if len(match) else None,
        "by_learning_rate": {
            f"{rate:g}": round(statistics.fmean(r.test_accuracy for r in runs), 4)
            for rate, runs in cell.by_learning_rate.items()
        },
        "steps": {
            f"{rate:g}": [r.steps for r in sorted(runs, key=_seed)]
            for rate, runs in cell.by_learning_rate.items()
        },
        "runs": len(finished),
        "runs_missing": len(wanted - finished),
        "train_seconds_per_run": round(statistics.fmean(r.train_seconds for r in cell.results), 2),
        "statuses": [result.status for result in cell.at_best],
        "commit": _distinct(cell.results, "commit"),
        "device": _distinct(cell.results, "device"),
    }


def precision_pairs(found: Iterable[Cell]) -> list[dict[str, Any]]:
    """Cells that differ in precision alone. They agree where their means are no further apart
    than the seeds of either: `within_seeds`, None with one seed."""
    by_rest: dict[str, dict[str, Cell]] = {}
    for cell in found:
        rest = {name: value for name, value in cell.config.items() if name != "precision"}
        key = json.dumps(rest, sort_keys=True)
        by_rest.setdefault(key, {})[cell.config["precision"]] = cell
    rows = []
    for pair in by_rest.values():
        if not {"bf16", "fp32"} <= pair.keys():
            continue
        first = pair["bf16"].results[0].config
        values = {
            name: [result.test_accuracy for result in pair[name].at_best]
            for name in ("bf16", "fp32")
        }
        means = {name: statistics.fmean(runs) for name, runs in values.items()}
        difference = means["bf16"] - means["fp32"]
        spread = max(max(runs) - min(runs) for runs in values.values())
        several = min(map(len, values.values())) > 1
        rows.append(
            {
                "model": pair["bf16"].label,
                "seq_len": first["data"]["test"][0]["task"]["seq_len"],
                "d_model": first["model"]["d_model"],
                **{name: round(mean, 4) for name, mean in means.items()},
                "learning_rates": [pair[name].learning_rates for name in ("bf16", "fp32")],
                "seeds": [len(runs) for runs in values.values()],
                "difference": round(difference, 4),
                "spread_over_seeds": round(spread, 4),
                "within_seeds": abs(difference) <= spread if several else None,
            }
        )
    return rows


def folder_row(store: Store, results: list[Result], times: Times) -> dict[str, Any]:
    """Wall time of a folder's sweeps, and of the reference's steps for the runs in it."""
    path = store.folder / "sweep.json"
    calls = read_json(path)["calls"] if path.exists() else []
    row: dict[str, Any] = {
        "folder": store.folder.name,
        "runs": len(results),
        "steps": sum(result.steps for result in results),
        "calls": len(calls),
        "calls_that_were_killed": sum(call["wall_seconds"] is None for call in calls),
        "wall_seconds": round(sum(call["wall_seconds"] or 0.0 for call in calls), 1),
        "reference_hours": None,
        "speedup": None,
    }
    steps_ms = []
    for result in results:
        model, task = result.config["model"], result.config["data"]["test"][0]["task"]
        mixer = model["mixers"][0]["name"]
        ms = times.reference_ms(mixer, task["seq_len"], model["d_model"])
        if ms is None or model["num_layers"] != 2:
            return row
        steps_ms.append((result.steps, ms))
    # What a killed call took is not known.
    if steps_ms and row["wall_seconds"] and not row["calls_that_were_killed"]:
        bounds = [sum(steps * ms[end] for steps, ms in steps_ms) / 1000 for end in (0, 1)]
        row["reference_hours"] = [round(seconds / 3600, 2) for seconds in bounds]
        row["speedup"] = [round(seconds / row["wall_seconds"], 1) for seconds in bounds]
    return row


def _distinct(results: Iterable[Result], name: str) -> str:
    return ", ".join(sorted({str(result.provenance.get(name)) for result in results}))


def _seed(result: Result) -> int:
    return result.config["seed"]


def summary(folders: list[Path], times: Times) -> dict[str, Any]:
    """All that is written. UserError for a folder without results."""
    stores = [Store(folder, create=False) for folder in folders]
    by_store = [list(store.results()) for store in stores]
    results = list({result.hash: result for found in by_store for result in found}.values())
    of_cell: dict[str, set[str]] = {}
    for store in stores:
        for run_hash, run in store.planned().items():
            of_cell.setdefault(run["cell"], set()).add(run_hash)
    finished = {result.hash for result in results}
    planned = {run_hash: hashes for hashes in of_cell.values() for run_hash in hashes}
    published, found = published_points(), cells(results)
    rows = [row_of(cell, published, planned) for cell in found]
    rows.sort(key=lambda row: (row["seq_len"], row["d_model"], row["mixer"], row["num_layers"]))
    made = {
        key: sorted({str(result.provenance.get(key)) for result in results}) for key in MADE_WITH
    }
    return {
        "command": [command for store in stores for command in store.commands()],
        **made,
        "not_begun": sorted(cell for cell, hashes in of_cell.items() if not hashes & finished),
        "folders": [
            folder_row(store, found, times) for store, found in zip(stores, by_store, strict=True)
        ],
        "precision": precision_pairs(found),
        "cells": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("store", type=Path, nargs="+", help="results folders of recallzoo run")
    parser.add_argument("--speed", type=Path, default=SPEED, help="what speed.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    content = summary(options.store, Times(options.speed))
    write_json(options.out, content)
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=140):
        if content["cells"]:
            columns = ("model", "seq_len", "d_model", "num_layers", "precision", "learning_rates")
            figures = ("test_accuracy", "lowest", "highest", "published", "runs_missing")
            print(pl.DataFrame(content["cells"], strict=False).select(*columns, *figures))
        if content["precision"]:
            print(pl.DataFrame(content["precision"]))
        print(pl.DataFrame(content["folders"], strict=False))
    for cell in content["not_begun"]:
        print(f"no run is finished of {cell}")


if __name__ == "__main__":
    main()
