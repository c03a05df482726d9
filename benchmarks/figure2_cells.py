"""Our cells of the paper's Figure 2 beside the published ones, as a table and as JSON.

    python benchmarks/figure2_cells.py runs/figure2-64 runs/figure2-128 --out results/figure2.json
    python benchmarks/figure2_cells.py results/recipes/figure2.parquet runs/figure2-64 \
        --out results/figure2.json --table results/recipes/figure2.parquet

Sources are results folders and tables of runs (`*.parquet`), in any mix; `--table` writes their
runs as one table, which may be one of those read. `--num-learning-rates` counts the runs of a grid
alone, there too, so that cells with denser rates are chosen from as many as the others.

Accuracy is that on the test set at the learning rate chosen on the validation set: mean, lowest
and highest over seeds, and the mean at every learning rate tried. A run that several sources hold
counts once, as in the first folder that has it, or else the first table. `runs_missing` of a cell
are those that a folder's sweeps were to train; a table does not know what was planned, so that a
cell that stands in tables alone has null. `not_begun` names cells without any run. `precision` lays
cells side by side that differ in nothing but bf16 and fp32. `folders` has each folder's wall time,
data, compilation and validation included but not the start of Python and Ray, beside what the
reference's steps would take for the same runs (`figure2_time.py`), where its step is known at all
of their sizes, and models and batches are those of the recipe `figure2`. `tables` says what each
table knows of how its runs were made, and what not.
"""

import argparse
import json
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from figure2_time import SPEED, Times

from recallzoo.cells import Cell, cell_words, cells
from recallzoo.files import atomic_file, read_json, write_json
from recallzoo.recipes._figure2 import BATCH_SIZES, learning_rate_grid
from recallzoo.report import runs_of_table
from recallzoo.report._published import published_points
from recallzoo.report._sources import TABLE_ENDING, Runs
from recallzoo.result import Result
from recallzoo.store import Store, table_of

MADE_WITH = ("commit", "device", "torch", "triton", "pack_size", "compiled", "fallbacks")
OF_TABLE = ("commit", "device")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Plans:
    """What the sweeps of folders were to train: hashes of runs by the words for their cell."""

    hashes: dict[str, set[str]]
    finished: set[str]
    """Hashes of all runs that are finished, wherever."""

    def missing(self, cell: Cell) -> int | None:
        """How many runs of a cell are not finished; None where no folder knows of it."""
        own = {result.hash for result in cell.results}
        names = {cell_words(result.label, result.config) for result in cell.results}
        planned = [hashes for name, hashes in self.hashes.items() if name in names or hashes & own]
        return len(set().union(*planned) - self.finished) if planned else None

    def not_begun(self, found: Iterable[Cell]) -> list[str]:
        """The cells of which no run is finished."""
        names = {cell_words(r.label, r.config) for cell in found for r in cell.results}
        return sorted(
            name
            for name, hashes in self.hashes.items()
            if name not in names and not hashes & self.finished
        )


def row_of(cell: Cell, published: pl.DataFrame, plans: Plans) -> dict[str, Any]:
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
        "runs": len(cell.results),
        "runs_missing": plans.missing(cell),
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
        mixer, seq_len = model["mixers"][0]["name"], task["seq_len"]
        ms = times.reference_ms(mixer, seq_len, model["d_model"])
        is_timed = (model["num_layers"], model["state_mixer"]) == (2, "identity")
        if (
            ms is None
            or not is_timed
            or result.config["budget"]["batch_size"] != BATCH_SIZES[seq_len]
        ):
            return row
        steps_ms.append((result.steps, ms))
    # What a killed call took is not known.
    if steps_ms and row["wall_seconds"] and not row["calls_that_were_killed"]:
        bounds = [sum(steps * ms[end] for steps, ms in steps_ms) / 1000 for end in (0, 1)]
        row["reference_hours"] = [round(seconds / 3600, 2) for seconds in bounds]
        row["speedup"] = [round(seconds / row["wall_seconds"], 1) for seconds in bounds]
    return row


def table_row(path: Path, runs: Runs) -> dict[str, Any]:
    """What a table knows of how its runs were made, and what it does not."""
    return {
        "table": path.name,
        "runs": len(runs.results),
        "steps": sum(result.steps for result in runs.results),
        **{name: _values(runs.results, name) for name in OF_TABLE},
        UNKNOWN: [
            "command",
            *(name for name in MADE_WITH if name not in OF_TABLE),
            "wall_seconds",
            "runs_missing",
        ],
        "remarks": runs.remarks,
    }


def _values(results: Iterable[Result], name: str) -> list[str]:
    return sorted({str(result.provenance.get(name, UNKNOWN)) for result in results})


def _distinct(results: Iterable[Result], name: str) -> str:
    return ", ".join(_values(results, name))


def _seed(result: Result) -> int:
    return result.config["seed"]


@dataclass(frozen=True)
class Sources:
    """Results folders and tables of runs, read."""

    folders: list[tuple[Store, list[Result]]]
    tables: list[tuple[Path, Runs]]
    rates: Collection[float] | None = None
    """The learning rates that count; None: all."""

    @property
    def counted(self) -> list[Result]:
        """Each run once, of the learning rates that count."""
        return [
            result
            for result in self.results
            if self.rates is None or result.config["optimizer"]["learning_rate"] in self.rates
        ]

    @property
    def results(self) -> list[Result]:
        """Each run once."""
        found: dict[str, Result] = {}
        for results in (
            *(results for _, results in self.folders),
            *(runs.results for _, runs in self.tables),
        ):
            for result in results:
                found.setdefault(result.hash, result)
        return list(found.values())


def read_sources(paths: Iterable[Path], rates: Collection[float] | None = None) -> Sources:
    """UserError for a folder without results, or a file that is no table of runs."""
    sources = Sources([], [], rates)
    for path in paths:
        if path.suffix == TABLE_ENDING and not path.is_dir():
            sources.tables.append((path, runs_of_table(path)))
        else:
            store = Store(path, create=False)
            sources.folders.append((store, list(store.results())))
    return sources


def summary(sources: Sources, times: Times) -> dict[str, Any]:
    """All that is written as JSON."""
    results = sources.counted
    plans = Plans({}, {result.hash for result in sources.results})
    for store, _ in sources.folders:
        for run_hash, run in store.planned().items():
            plans.hashes.setdefault(run["cell"], set()).add(run_hash)
    published, found = published_points(), cells(results)
    rows = [row_of(cell, published, plans) for cell in found]
    rows.sort(key=lambda row: (row["seq_len"], row["d_model"], row["mixer"], row["num_layers"]))
    return {
        "command": [command for store, _ in sources.folders for command in store.commands()],
        **{name: _values(results, name) for name in MADE_WITH},
        "not_begun": plans.not_begun(found),
        "folders": [folder_row(store, runs, times) for store, runs in sources.folders],
        "tables": [table_row(path, runs) for path, runs in sources.tables],
        "precision": precision_pairs(found),
        "cells": rows,
    }


def _lost_by(table: Path | None, sources: Sources) -> int:
    """Runs of a table that is read and written anew, and that are not counted."""
    counted = {result.hash for result in sources.counted}
    return sum(
        result.hash not in counted
        for path, runs in sources.tables
        if table is not None and path.resolve() == table.resolve()
        for result in runs.results
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "source", type=Path, nargs="+", help="results folders of recallzoo run, and their tables"
    )
    parser.add_argument("--speed", type=Path, default=SPEED, help="what speed.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="Parquet file for the runs that count")
    parser.add_argument(
        "--num-learning-rates", type=int, help="count only those of the recipe's grid of so many"
    )
    options = parser.parse_args()
    number = options.num_learning_rates
    sources = read_sources(options.source, None if number is None else learning_rate_grid(number))
    if options.table is not None and options.table.suffix != TABLE_ENDING:
        parser.error(f"--table {options.table} does not end in {TABLE_ENDING}")
    if options.table is not None and not sources.counted:
        parser.error("--table: no run is finished in any of the sources")
    if lost := _lost_by(options.table, sources):
        parser.error(
            f"--table: {lost} runs that {options.table} has would be lost, as --num-learning-rates "
            f"leaves them out"
        )
    content = summary(sources, Times(options.speed))
    write_json(options.out, content)
    if options.table is not None:
        with atomic_file(options.table) as temporary:
            table_of(sources.counted).write_parquet(temporary)
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=140):
        if content["cells"]:
            columns = ("model", "seq_len", "d_model", "num_layers", "precision", "learning_rates")
            figures = ("test_accuracy", "lowest", "highest", "published", "runs_missing")
            print(pl.DataFrame(content["cells"], strict=False).select(*columns, *figures))
        if content["precision"]:
            print(pl.DataFrame(content["precision"]))
        if content["folders"]:
            print(pl.DataFrame(content["folders"], strict=False))
    for table in content["tables"]:
        print(*table["remarks"], sep="\n")
    for cell in content["not_begun"]:
        print(f"no run is finished of {cell}")


if __name__ == "__main__":
    main()
