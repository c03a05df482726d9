"""Our cells of the paper's Figure 2 beside the published ones, as a table and as JSON.

    python benchmarks/figure2_cells.py runs/figure2 --out results/figure2_cells.json

Accuracy is that on the test set at the learning rate chosen on the validation set: mean, lowest
and highest over seeds, and the mean at every learning rate tried.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import polars as pl

from recallzoo.cells import Cell, cells
from recallzoo.files import write_json
from recallzoo.report._published import published_points
from recallzoo.store import Store


def row_of(cell: Cell, published: pl.DataFrame) -> dict[str, Any]:
    """One cell, with the published accuracy of the same mixer, length and width if there is one."""
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
    return {
        "model": cell.label,
        "mixer": mixer,
        "seq_len": task["seq_len"],
        "num_pairs": task["num_pairs"],
        "d_model": width,
        "num_layers": first.config["model"]["num_layers"],
        "precision": first.config["precision"],
        "schedule": first.config["optimizer"]["schedule"],
        "learning_rate": cell.learning_rate,
        "test_accuracy": round(cell.test_accuracy, 4),
        "lowest": round(min(accuracies), 4),
        "highest": round(max(accuracies), 4),
        "seeds": sorted(result.config["seed"] for result in cell.at_best),
        "published": match["accuracy"][0] if len(match) else None,
        "by_learning_rate": {
            f"{rate:g}": round(statistics.fmean(r.test_accuracy for r in runs), 4)
            for rate, runs in cell.by_learning_rate.items()
        },
        "train_seconds_per_run": round(statistics.fmean(r.train_seconds for r in cell.results), 2),
        "statuses": [result.status for result in cell.at_best],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("store", type=Path, nargs="+", help="results folders of recallzoo run")
    parser.add_argument("--command", help="what made them", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results = [r for folder in options.store for r in Store(folder, create=False).results()]
    published = published_points()
    rows = [row_of(cell, published) for cell in cells(results)]
    rows.sort(key=lambda row: (row["seq_len"], row["d_model"], row["mixer"], row["num_layers"]))
    made = {
        key: sorted({str(result.provenance.get(key)) for result in results})
        for key in ("commit", "device", "torch", "triton", "pack_size", "compiled", "fallbacks")
    }
    write_json(options.out, {"command": options.command, **made, "cells": rows})
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=140):
        print(
            pl.DataFrame(rows).select(
                *("model", "seq_len", "d_model", "num_layers", "learning_rate"),
                *("test_accuracy", "lowest", "highest", "published"),
            )
        )


if __name__ == "__main__":
    main()
