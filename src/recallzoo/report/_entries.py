"""Which panel and which line of a chart each cell belongs to.

A panel holds cells with the same data, a line those with the same model and training but for
the width. Options that tell cells apart are named; those that all share are not.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from recallzoo.cells import Cell, cells, data_options, differing
from recallzoo.result import Result

PREFERRED_COLOURS = {
    "attention": "#0072B2",
    "base_conv": "#D55E00",
    "h3": "#009E73",
    "hyena": "#CC79A7",
    "rwkv4": "#E69F00",
    "sliding_window": "#56B4E9",
}
"""Okabe and Ito's palette (https://jfly.uni-koeln.de/color/): told apart by colour-blind eyes."""
COLOURS = (
    *PREFERRED_COLOURS.values(),
    *("#332288", "#117733", "#882255", "#6E6E00", "#AA4499", "#000000"),
)
"""The same and six dark ones of Paul Tol's muted scheme, for all other models."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")


@dataclass(frozen=True)
class Entry:
    """A cell and its place in every chart. No two have the same panel, series and width."""

    cell: Cell
    panel: str
    """Task and sizes: `mqar, 64 tokens, 4 pairs`."""
    series: str
    """The model's label, and the options in which it differs from another of that label."""
    panel_order: tuple[Any, ...]

    @property
    def width(self) -> int:
        return self.cell.config["model.d_model"]

    @property
    def mixers(self) -> list[dict[str, Any]]:
        """Name, options and source hash of the mixers, by layer."""
        return json.loads(self.cell.config["model.mixers"])

    @property
    def test_tasks(self) -> list[dict[str, Any]]:
        """Task configurations of the test segments."""
        return [segment["task"] for segment in json.loads(self.cell.config["data.test"])]


def plain(text: str) -> str:
    """Text that every format can hold: control characters and lone surrogates replaced."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def entries(results: Iterable[Result]) -> list[Entry]:
    """The cells of some results, by panel, series and width."""
    grid = cells(results)
    panels = _panels(grid)
    labels = [plain(cell.label) for cell in grid]
    alike: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for cell, label in zip(grid, labels, strict=True):
        place = (panels[_data_key(cell)][0], label, cell.config["model.d_model"])
        alike[place].append(_model_options(cell))
    by_label: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for (_, label, _), options in alike.items():
        by_label[label].append(options)
    lines = {label: _Lines(places) for label, places in by_label.items()}
    found = []
    for cell, label in zip(grid, labels, strict=True):
        named = lines[label].words(_model_options(cell))
        panel, order = panels[_data_key(cell)]
        found.append(Entry(cell, panel, plain(", ".join([label, *named])), order))
    return sorted(found, key=lambda e: (e.panel_order, e.series, e.width))


def colours(labels: Mapping[str, str]) -> dict[str, str]:
    """Series -> colour, for series with the labels given. A mixer keeps its colour in every
    report, as far as no other model of the page has it."""
    labels = dict(sorted(labels.items()))
    chosen: dict[str, str] = {}
    for series, label in labels.items():
        preferred = PREFERRED_COLOURS.get(label.partition("(")[0])
        if preferred and preferred not in chosen.values():
            chosen[series] = preferred
    for series in labels:
        if series not in chosen:
            free = [colour for colour in COLOURS if colour not in chosen.values()] or list(COLOURS)
            digest = hashlib.sha256(series.encode()).digest()
            chosen[series] = free[int.from_bytes(digest[:4], "big") % len(free)]
    return dict(sorted(chosen.items()))


def labels_of(found: Iterable[Entry]) -> dict[str, str]:
    """Series -> the label of its model."""
    return {entry.series: plain(entry.cell.label) for entry in found}


def shapes(series: Iterable[str]) -> dict[str, str]:
    """Series -> shape of its points, so that no one depends on colour alone."""
    return {name: SHAPES[i % len(SHAPES)] for i, name in enumerate(sorted(series))}


def _data_key(cell: Cell) -> str:
    return json.dumps({k: v for k, v in cell.config.items() if k.startswith("data.")})


def _panels(grid: list[Cell]) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Data -> the panel's name and place. Data of equal sizes are told apart by their options."""
    by_sizes: dict[str, dict[str, Cell]] = defaultdict(dict)
    for cell in grid:
        by_sizes[_sizes(cell)].setdefault(_data_key(cell), cell)
    panels = {}
    for sizes, members in by_sizes.items():
        options = {key: data_options(cell) for key, cell in members.items()}
        telling = differing(list(options.values()))
        for key, cell in members.items():
            named = [f"{name}={options[key].get(name)}" for name in sorted(telling)]
            name = plain("; ".join([sizes, ", ".join(named)] if named else [sizes]))
            panels[key] = (name, (*_size_order(cell), name))
    return panels


def _sizes(cell: Cell) -> str:
    sizes = cell.sizes
    words = [sizes["task"]]
    if "length" in sizes:
        words.append(f"{sizes['length']} tokens")
    if "pairs" in sizes:
        words.append(f"{sizes['pairs']} pairs")
    return ", ".join(words)


def _size_order(cell: Cell) -> tuple[str, float, float]:
    tasks = [segment["task"] for segment in json.loads(cell.config["data.test"])]
    longest = max(task.get("seq_len") or 0 for task in tasks)
    return cell.sizes["task"], longest, max(task.get("num_pairs") or 0 for task in tasks)


class _Lines:
    """The lines of one label, given the options of its cells in each place.

    Options that differ in some place tell lines apart, but for those that follow the data, such
    as a batch size that falls with the length: one that cells can be told apart without, and that
    would break a line. A line names all values that it has of those.
    """

    def __init__(self, places: list[list[dict[str, Any]]]) -> None:
        self._places = places
        self._cells = [options for place in places for options in place]
        self._telling = set[str]().union(*map(differing, places))
        self._following = set[str]()
        # One may hide another that follows the data as well.
        while found := next(filter(self._follows_the_data, sorted(self._telling)), None):
            self._telling.remove(found)
            self._following.add(found)
        self._by_line: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for options in self._cells:
            self._by_line[_values(options, self._telling)].append(options)

    def _follows_the_data(self, name: str) -> bool:
        others = self._telling - {name}
        breaks_lines = _count(self._cells, others) < _count(self._cells, self._telling)
        return breaks_lines and all(_count(place, others) == len(place) for place in self._places)

    def words(self, options: dict[str, Any]) -> list[str]:
        """The line of a cell with these options, such as `num_layers=2`, `batch_size=256 or 512`.
        Mixers, which are the longest, come last: legends are cut."""
        line, words = self._by_line[_values(options, self._telling)], []
        for names in (self._telling, self._following):
            for name in sorted(names, key=lambda name: (name == "model.mixers", name)):
                values = dict.fromkeys(str(own.get(name)) for own in line)
                words.append(f"{_short(name)}={' or '.join(sorted(values, key=_by_number))}")
        return words


def _values(options: dict[str, Any], names: set[str]) -> str:
    return json.dumps([options.get(name) for name in sorted(names)])


def _count(cells: list[dict[str, Any]], names: set[str]) -> int:
    return len({_values(options, names) for options in cells})


def _by_number(text: str) -> tuple[float, str]:
    return (float(text) if text.replace(".", "", 1).isdigit() else math.inf), text


def _model_options(cell: Cell) -> dict[str, Any]:
    options = {k: v for k, v in cell.config.items() if not k.startswith("data.")}
    del options["model.d_model"]
    options["model.mixers"] = pattern(json.loads(options["model.mixers"]))
    return options


def pattern(mixers: list[dict[str, Any]]) -> str:
    """Mixers by layer with all their options; a user's own also with its source's hash."""
    words = []
    for mixer in mixers:
        chosen = ", ".join(f"{name}={value}" for name, value in mixer["options"])
        source = f"@{mixer['source_sha256'][:8]}" if mixer.get("source_sha256") else ""
        words.append(f"{mixer['name']}{source}({chosen})")
    return " + ".join(words)


def _short(name: str) -> str:
    return name.rpartition(".")[2]
