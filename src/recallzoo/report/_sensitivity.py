"""How wide the window of learning rates is that works, not just its best point."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import altair as alt

from recallzoo.cells import Cell, rates_text
from recallzoo.report._charts import Figure, Look, accuracy_axis, faceted, fading, tooltip
from recallzoo.report._entries import Entry
from recallzoo.result import Result

SHARES = (0.9, 0.99)
"""A learning rate works if its test accuracy reaches this share of the cell's best one."""


@dataclass(frozen=True)
class Window:
    """The learning rates of a cell that reach a share of its best test accuracy."""

    num_working: int
    num_tried: int
    decades: float
    """log10 of the largest over the smallest rate of the unbroken stretch of working ones
    around the best; 0 for a single one."""
    is_open: bool
    """Whether the stretch reaches the lowest or highest rate tried, so that it may be wider."""


def window(cell: Cell, share: float) -> Window:
    """The window of a cell whose learning rates were tried on a grid."""
    means = {rate: _mean(runs) for rate, runs in cell.by_learning_rate.items()}
    rates = list(means)
    best = max(rates, key=lambda rate: means[rate])
    works = [means[rate] > 0 and means[rate] >= share * means[best] for rate in rates]
    if not any(works):
        return Window(num_working=0, num_tried=len(rates), decades=0.0, is_open=False)
    first = last = rates.index(best)
    while first > 0 and works[first - 1]:
        first -= 1
    while last < len(rates) - 1 and works[last + 1]:
        last += 1
    return Window(
        num_working=sum(works),
        num_tried=len(rates),
        decades=math.log10(rates[last] / rates[first]),
        is_open=first == 0 or last == len(rates) - 1,
    )


def sensitivity_table(found: list[Entry]) -> dict[str, Any]:
    """One row a cell: its best learning rate, and how much worse the others are."""
    rows = []
    for entry in found:
        cell = entry.cell
        best = cell.at_best
        accuracies = [result.test_accuracy for result in best]
        windows = [window(cell, share) for share in SHARES]
        rows.append(
            [
                entry.series,
                entry.panel,
                entry.width,
                statistics.fmean(accuracies),
                f"{min(accuracies):.3f} to {max(accuracies):.3f}" if len(best) > 1 else None,
                len(best),
                rates_text(cell.learning_rates),
                rates_text(cell.by_learning_rate),
                *(f"{w.num_working} of {w.num_tried}" for w in windows),
                *(f"{'≥ ' * w.is_open}{w.decades:.1f}" for w in windows),
                _remarks(cell),
            ]
        )
    return {
        "columns": [
            {"title": "model", "kind": "text", "choose": True},
            {"title": "task", "kind": "text", "choose": True},
            {"title": "width", "kind": "int"},
            {"title": "test accuracy", "kind": "accuracy"},
            {"title": "lowest to highest", "kind": "text"},
            {"title": "seeds", "kind": "int"},
            {"title": "best learning rate", "kind": "text"},
            {"title": "tried", "kind": "text"},
            *({"title": f"reach {share:g} of best", "kind": "text"} for share in SHARES),
            *({"title": f"window at {share:g}, decades", "kind": "text"} for share in SHARES),
            {"title": "remarks", "kind": "text"},
        ],
        "rows": rows,
    }


def _remarks(cell: Cell) -> str | None:
    by_rate = cell.by_learning_rate
    rates = list(by_rate)
    words = []
    if len(rates) == 1:
        words.append("one learning rate tried")
    else:
        ends = {rates[0]: "lowest", rates[-1]: "highest"}
        words += [f"best is the {ends[rate]} tried" for rate in cell.learning_rates if rate in ends]
    if len({len(runs) for runs in by_rate.values()}) > 1:
        words.append("not all seeds at every learning rate")
    statuses = [result.status for result in cell.results]
    if "group_solved" in statuses:
        words.append(
            f"{statuses.count('group_solved')} stopped when another solved the task: windows are "
            f"lower bounds"
        )
    if "diverged" in statuses:
        words.append(f"{statuses.count('diverged')} of {len(statuses)} diverged")
    return "; ".join(words) or None


def sensitivity_figure(found: list[Entry], look: Look) -> Figure:
    """Test accuracy over learning rate, a panel for each task and width."""
    rows = [
        _row(entry, rate, runs)
        for entry in sorted(found, key=lambda e: (e.panel_order, e.width, e.series))
        for rate, runs in entry.cell.by_learning_rate.items()
    ]
    rates = sorted({row["learning_rate"] for row in rows})
    fields = (
        ("series", "model"),
        ("panel", "task"),
        ("learning_rate", "learning rate", ".3~g"),
        ("accuracy", "test accuracy", ".4f"),
        ("spread", "lowest to highest"),
        ("valid_accuracy", "validation accuracy", ".4f"),
        ("chosen", "chosen on validation"),
        ("status", "status"),
        ("seeds", "seeds"),
        ("runs", "runs"),
    )
    x = alt.X(
        "learning_rate:Q",
        title="learning rate",
        scale=alt.Scale(type="log", padding=12, nice=False),
        axis=alt.Axis(
            values=_spaced(rates),
            format=".2~g" if rates[0] >= 1e-3 else ".1~e",
            grid=False,
        ),
    )
    base = alt.Chart().encode(x=x, color=look.colour(), opacity=fading())
    kinds = {row["kind"] for row in rows}
    of_kind = {kind: base.transform_filter(alt.datum.kind == kind) for kind in kinds}
    points = {
        "measured": {"filled": True},
        "lower bound": {"filled": True, "fill": "white", "strokeWidth": 1.6},
    }
    layers = [
        base.mark_rule(strokeWidth=1.5).encode(y=accuracy_axis("low"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=accuracy_axis()),
        *(
            of_kind[kind]
            .mark_point(**mark)
            .encode(y=accuracy_axis(), shape=look.shape(), tooltip=tooltip(*fields))
            for kind, mark in points.items()
            if kind in kinds
        ),
        base.transform_filter(alt.datum.chosen == "yes")
        .mark_point(shape="circle", size=230, strokeWidth=1.4, filled=False)
        .encode(y=accuracy_axis(), tooltip=tooltip(*fields)),
    ]
    if "diverged" in kinds:
        layers.append(
            of_kind["diverged"]
            .mark_point(shape="M-1,-1L1,1M1,-1L-1,1", size=70, strokeWidth=2.2, filled=False)
            .encode(y=accuracy_axis(), tooltip=tooltip(*fields))
        )
    caption = (
        "Test accuracy at every learning rate tried; mean over seeds, with a bar from the lowest "
        "to the highest. A ring marks the learning rate that validation chose, each seed's own "
        "where one solved the task and the others stopped."
    )
    if "lower bound" in kinds:
        caption += (
            " White points stopped when another learning rate had solved the task: lower bounds."
        )
    if "diverged" in kinds:
        caption += " Crosses: at least one seed diverged."
    return faceted("learning_rate", "Sensitivity to the learning rate", caption, rows, layers)


def _spaced(rates: list[float]) -> list[float]:
    """Those of the rates, ascending, whose labels do not touch: the first, and each that is a
    fifth of the axis away from the one before."""
    gap = math.log(rates[-1] / rates[0]) / 5
    kept = rates[:1]
    for rate in rates[1:]:
        if math.log(rate / kept[-1]) >= gap:
            kept.append(rate)
    return kept


def _row(entry: Entry, rate: float, runs: list[Result]) -> dict[str, Any]:
    accuracies = [result.test_accuracy for result in runs]
    statuses = [result.status for result in runs]
    kind = "measured"
    if "diverged" in statuses:
        kind = "diverged"
    elif "group_solved" in statuses:
        kind = "lower bound"
    return {
        "panel": f"{entry.panel}; width {entry.width}",
        "series": entry.series,
        "learning_rate": rate,
        "accuracy": statistics.fmean(accuracies),
        "low": min(accuracies),
        "high": max(accuracies),
        "spread": f"{min(accuracies):.4f} to {max(accuracies):.4f}",
        "valid_accuracy": statistics.fmean(result.valid_accuracy for result in runs),
        "chosen": "yes" if rate in entry.cell.learning_rates else "no",
        "kind": kind,
        "status": ", ".join(status.replace("_", " ") for status in dict.fromkeys(statuses)),
        "seeds": ", ".join(str(result.config["seed"]) for result in runs),
        "runs": ", ".join(result.hash for result in runs),
    }


def _mean(runs: list[Result]) -> float:
    return statistics.fmean(result.test_accuracy for result in runs)
