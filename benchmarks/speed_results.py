"""The result of `speed.py`: its file, what follows from all cells together, and lines to read."""

import csv
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import zoology_reference as zoology
from speed_cells import choose

from recallzoo.errors import UserError
from recallzoo.files import read_json, write_json
from recallzoo.provenance import commit, environment
from recallzoo.train.packed import device_name

BASELINES = Path(__file__).parent / "reference_step_times_h200.csv"
ABOUT = ("command", "device", "commit", "reference_commit", "environment", "peaks")


def baselines() -> dict[tuple[str, int, int], float]:
    """Earlier step times of the reference on an H200, in milliseconds."""
    with BASELINES.open() as file:
        return {
            (row["mixer"], int(row["seq_len"]), int(row["d_model"])): float(row["ms_per_step"])
            for row in csv.DictReader(file)
        }


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and smallest speed-up."""
    out: dict[str, Any] = {}
    for name, key in (("", "speedup"), ("_over_baseline", "speedup_over_baseline")):
        found = {cell["cell"]: cell[key] for cell in cells if key in cell}
        if found:
            logs = [math.log(value) for value in found.values()]
            out[f"geomean_speedup{name}"] = round(math.exp(statistics.fmean(logs)), 2)
            worst = min(found, key=lambda cell: found[cell])
            out[f"min_speedup{name}"] = found[worst]
            out[f"worst_cell{name}"] = worst
    return out


def kept(path: Path | None, device: torch.device) -> list[dict[str, Any]]:
    """Cells of an earlier result. UserError if it came from another device."""
    if path is None:
        return []
    earlier = read_json(path)
    if earlier["device"] != device_name(device):
        raise UserError(
            f"{path} was measured on {earlier['device']}, this is {device_name(device)}: their "
            f"cells do not belong into one table."
        )
    return earlier["cells"]


def print_cell(entry: dict[str, Any]) -> None:
    """One line."""
    if "failed" in entry:
        print(f"{entry['cell']:<22} failed: {entry['failed']}", flush=True)
        return
    reference = entry.get("reference", {}).get("step", {}).get("ms")
    theirs = f"reference {reference:.2f} ms, {entry['speedup']:.1f} x; " if reference else ""
    others = ", ".join(
        f"{pack['runs']}: {pack.get('failed') or format(pack['step_of_a_run']['ms'], '.3f')}"
        for pack in entry["packs"]
    )
    print(
        f"{entry['cell']:<22} {theirs}{entry['ms_per_run_and_step']:.3f} ms a run and step "
        f"({others}), {100 * entry['share_of_limit']:.0f} % of the limit ({entry['limit_is']})",
        flush=True,
    )


def write(out: Path | None, about: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """The result's file."""
    short = about["device"].lower().replace("nvidia", "").split()[0].strip(",")
    path = out or Path("results") / f"speed_{short}.json"
    write_json(path, {**about, **summary(entries), "cells": entries})


def about(device: torch.device, has_reference: bool, peaks: dict[str, float]) -> dict[str, Any]:
    """How and where a result came about."""
    return {
        "command": command(),
        "device": device_name(device),
        "commit": commit(),
        "reference_commit": zoology.COMMIT if has_reference else None,
        "environment": environment(),
        "peaks": {name: float(f"{value:.4g}") for name, value in peaks.items()},
    }


def merge(paths: list[Path], out: Path | None, command: str | None = None) -> list[dict[str, Any]]:
    """The cells of several results, written as one: of two that hold a cell the later's, if it did
    not fail. The command is theirs, all of them, if no other is given."""
    results = [read_json(path) for path in paths]
    devices = {result["device"] for result in results}
    if len(devices) > 1:
        raise UserError(f"the results to merge were measured on {' and '.join(sorted(devices))}.")
    cells: dict[str, dict[str, Any]] = {}
    for cell in (cell for result in results for cell in result["cells"]):
        earlier = cells.get(cell["cell"])
        if earlier is None or "failed" not in cell or "failed" in earlier:
            cells[cell["cell"]] = cell
    about = {k: v for k, v in results[-1].items() if k in ABOUT}
    for name in ("command", "peaks"):  # of a result that was merged itself, a list
        told = [result[name] for result in results]
        flat = [one for each in told for one in (each if isinstance(each, list) else [each])]
        about[name] = [one for i, one in enumerate(flat) if one and one not in flat[:i]]
    about["command"] = command or about["command"]
    order = [cell.name for cell in choose(["*"])]
    entries = sorted(cells.values(), key=lambda cell: order.index(cell["cell"]))
    write(out, about, entries)
    return entries


def concluded(entries: list[dict[str, Any]]) -> int:
    """Say what follows from all cells. 1 if one failed."""
    print(*(f"{name}: {value}" for name, value in summary(entries).items()), sep=", ")
    return int(any("failed" in entry for entry in entries))


def command() -> str:
    """The command line, without the folders of this machine."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return "python benchmarks/speed.py " + shlex.join(words)
