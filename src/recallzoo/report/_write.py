"""From a results folder to a page and pictures."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from recallzoo.files import atomic_file, require_folder, write_text
from recallzoo.report._about import how_made, notes, runs_table
from recallzoo.report._accuracy import accuracy_figure, state_figure
from recallzoo.report._charts import Figure, Look
from recallzoo.report._entries import Entry, entries, labels_of, plain
from recallzoo.report._least import REACHED, has_several_widths, least_figure, least_table
from recallzoo.report._page import chart_data, page
from recallzoo.report._sensitivity import sensitivity_figure, sensitivity_table
from recallzoo.report._slices import slice_figures
from recallzoo.report._sources import Runs, runs_of_store
from recallzoo.result import SliceRow
from recallzoo.store import Store

FORMATS = ("html", "svg", "png")
SOLVED_ACCURACY = 0.99
"""Test accuracy from which a cell counts as solved."""


def write_report(
    runs: Store | Runs, out_folder: Path, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write `report.html` and each of its charts as SVG and PNG; return their paths.

    Raises UserError for a folder without finished runs, StoreError for a damaged one or where
    the report cannot be written. Equal results give equal files.
    """
    require_folder(out_folder, "a folder for the report")
    if isinstance(runs, Store):
        runs = runs_of_store(runs)
    found = entries(runs.results)
    figures = draw(found, runs.rows_of)
    written = write_figures(figures, out_folder, formats)
    if "html" in formats:
        named = {figure.name: figure for figure in figures}
        text = page(
            "report.html.j2",
            name=plain(runs.name),
            results=runs.results,
            models=sorted({entry.series for entry in found}),
            tasks=list(dict.fromkeys(entry.panel for entry in found)),
            notes=[plain(note) for note in (*runs.remarks, *notes(found, runs.missing()))],
            verdict=_verdict(found),
            accuracy=named["accuracy"],
            learning_rate=named["learning_rate"],
            slices=[figure for figure in figures if figure.name.startswith("slice_")],
            state=named.get("state_size"),
            least=named.get("least"),
            several_widths=has_several_widths(found),
            reached=REACHED,
            chart_data=chart_data(figures),
            tables={
                "cells": sensitivity_table(found),
                "least": least_table(found),
                "runs": runs_table(found),
            },
            contracts=runs.contracts,
            how_made=how_made(runs.results, runs.commands),
        )
        write_text(out_folder / "report.html", text)
        written.insert(0, out_folder / "report.html")
    return written


def draw(found: list[Entry], rows_of: Callable[[str], list[SliceRow]]) -> list[Figure]:
    """All figures, in the order of the page."""
    look = Look.of(labels_of(found))
    figures: list[Figure | None] = [
        accuracy_figure(found, look),
        sensitivity_figure(found, look),
        *slice_figures(found, look, rows_of),
        state_figure(found, look),
        least_figure(found, look),
    ]
    return [figure for figure in figures if figure is not None]


def write_figures(figures: list[Figure], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write figures as SVG and PNG files, as far as `formats` asks for them."""
    written = []
    for figure in figures:
        if "svg" in formats:
            written.append(folder / f"{figure.name}.svg")
            write_text(written[-1], figure.svg())
        if "png" in formats:
            written.append(folder / f"{figure.name}.png")
            with atomic_file(written[-1]) as temporary:
                temporary.write_bytes(figure.png())
    return written


def _verdict(found: list[Entry]) -> str:
    """How many cells each model solves, in one sentence."""
    solved = Counter(e.series for e in found if e.cell.test_accuracy >= SOLVED_ACCURACY)
    cells = Counter(entry.series for entry in found)
    most = f"At its best learning rate, test accuracy is {SOLVED_ACCURACY} or more"
    words = [f"{series} in {solved[series]} of {cells[series]}" for series in sorted(cells)]
    if not solved:
        return f"{most} in none of {len(found)} cells."
    return f"{most} in this many cells (a task and a width): {'; '.join(words)}."
