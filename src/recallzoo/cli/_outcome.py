"""What came of a sweep: one line a model and task, at its best learning rate."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recallzoo.cells import Cell, cells, data_words, mixer_words, rates_text
from recallzoo.result import Result

TABLE_WIDTH = 120
"""Columns of a table that is not written to a terminal."""


def print_table(results: list[Result], stream: TextIO) -> None:
    """Print one line a cell; columns beyond the sizes are those options that differ."""
    rows = cells(results)
    more = [
        name
        for name in rows[0].config
        if not name.startswith("data.")
        and name not in ("model.d_model", "model.mixers")
        and len({json.dumps(cell.config.get(name)) for cell in rows}) > 1
    ]
    columns = list(dict.fromkeys(column for cell in rows for column in cell.sizes))
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model", overflow="fold")
    mixers = mixer_words(rows)
    if any(mixers):
        table.add_column("mixers", overflow="fold")
    for column in columns:
        table.add_column(Text(column), justify="left" if column == "task" else "right")
    words = data_words(rows)
    if any(words):
        table.add_column("data", overflow="fold")
    for name in more:
        table.add_column(Text(name.rpartition(".")[2]), justify="right")
    for column in ("best lr", "test accuracy", "seeds"):
        table.add_column(column, justify="right")
    table.add_column("runs", overflow="fold")
    for cell, own, data in zip(rows, mixers, words, strict=True):
        row = (
            cell.label,
            *((own,) if any(mixers) else ()),
            *(cell.sizes.get(column, "") for column in columns),
            *((data,) if any(words) else ()),
            *(str(cell.config.get(name, "")) for name in more),
            rates_text(cell.learning_rates),
            _accuracy(cell),
            str(len(cell.at_best)),
            _statuses(cell.results),
        )
        table.add_row(*map(Text, row))
    console = Console(file=stream, width=None if stream.isatty() else TABLE_WIDTH)
    console.print(table)
    by_seed = any(cell.is_chosen_by_seed and len(cell.at_best) > 1 for cell in rows)
    print(
        "best lr: highest validation accuracy, mean over seeds"
        + ("; each seed's own where one solved the task first. " if by_seed else ". ")
        + "test accuracy: mean over seeds"
        + (" (lowest to highest)." if any(len(cell.at_best) > 1 for cell in rows) else "."),
        file=stream,
    )


def notes(results: list[Result]) -> list[str]:
    """What a reader of the table has to know: divergence, and fallbacks that runs took."""
    lines = [
        f"{result.label} diverged at learning rate "
        f"{result.config['optimizer']['learning_rate']:g}, seed {result.config['seed']} "
        f"(step {result.diverged_step})."
        for result in results
        if result.status == "diverged"
    ]
    fallbacks = Counter(
        str(fallback) for result in results for fallback in result.provenance.get("fallbacks", ())
    )
    lines += [f"{fallback} ({count} runs)" for fallback, count in fallbacks.items()]
    return lines


def _accuracy(cell: Cell) -> str:
    values = [result.test_accuracy for result in cell.at_best]
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{cell.test_accuracy:.3f}{spread}"


def _statuses(results: Iterable[Result]) -> str:
    counts = Counter(result.status.replace("_", " ") for result in results)
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
