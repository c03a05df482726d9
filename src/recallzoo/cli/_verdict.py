"""Where a user's own mixer solves the task, beside the mixers it was trained with."""

import json
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recallzoo.cells import Cell, cells, data_words
from recallzoo.cli._outcome import TABLE_WIDTH
from recallzoo.result import Result
from recallzoo.run import without_folder

SOLVED_ACCURACY = 0.99
"""Test accuracy from which a cell counts as solved."""


def print_verdict(names: tuple[str, ...], results: list[Result], stream: TextIO) -> None:
    """One table, lengths down and widths across, then one sentence for each user's mixer."""
    grid = cells(results)
    widths = sorted({cell.config["model.d_model"] for cell in grid})
    table = Table(
        title="test accuracy at the best learning rate",
        title_justify="left",
        box=None,
        header_style="bold",
        pad_edge=False,
    )
    table.add_column("task")
    table.add_column("model")
    for width in widths:
        table.add_column(f"width {width}", justify="right")
    by_row: dict[tuple[str, str, str], dict[int, Cell]] = {}
    places = zip(grid, data_words(grid), strict=True)
    for cell, data in sorted(places, key=lambda place: _length(place[0])):
        task = f"{_task(cell)} {data}".rstrip()
        row = (task, cell.label, cell.config["model.mixers"])
        by_row.setdefault(row, {})[cell.config["model.d_model"]] = cell
    for (task, label, _), row in sorted(by_row.items(), key=lambda item: _length_of(item[1])):
        marks = (_mark(row.get(width)) for width in widths)
        table.add_row(*map(Text, (task, label, *marks)))
    Console(file=stream, width=None if stream.isatty() else TABLE_WIDTH).print(table)
    for name in names:
        print(_sentence(name, grid), file=stream)


def _sentence(name: str, grid: list[Cell]) -> str:
    own = [cell for cell in grid if _is_of(cell, name)]
    solved = [cell for cell in own if _is_solved(cell)]
    short = name.rpartition(":")[2]
    if not solved:
        best = max(own, key=lambda cell: cell.test_accuracy)
        return (
            f"{short} solves none of {len(own)} cells (test accuracy {SOLVED_ACCURACY} or more); "
            f"its best is {best.test_accuracy:.3f}, at {_task(best)}, "
            f"width {best.config['model.d_model']}."
        )
    where = "; ".join(f"{_task(cell)}, width {cell.config['model.d_model']}" for cell in solved)
    return (
        f"{short} solves {len(solved)} of {len(own)} cells (test accuracy {SOLVED_ACCURACY} or "
        f"more): {where}."
    )


def _mark(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return f"{cell.test_accuracy:.3f} {'solved' if _is_solved(cell) else '      '}"


def _is_solved(cell: Cell) -> bool:
    return cell.test_accuracy >= SOLVED_ACCURACY


def _is_of(cell: Cell, name: str) -> bool:
    return without_folder(name) in {
        mixer["name"] for mixer in json.loads(cell.config["model.mixers"])
    }


def _task(cell: Cell) -> str:
    sizes = {name: value for name, value in cell.sizes.items() if name not in ("task", "width")}
    return " ".join([cell.sizes["task"], *(f"{name} {value}" for name, value in sizes.items())])


def _length(cell: Cell) -> int:
    return max(segment["task"]["seq_len"] for segment in json.loads(cell.config["data.test"]))


def _length_of(row: dict[int, Cell]) -> int:
    return _length(next(iter(row.values())))
