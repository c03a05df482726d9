"""Accuracy by slice: by distance, by number of pairs, by what makes the task hard."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable

import altair as alt

from recallzoo.cells import rates_text
from recallzoo.report._charts import Figure, Look, accuracy_axis, faceted, fading, tooltip
from recallzoo.report._entries import Entry, plain
from recallzoo.result import Result, SliceRow

MOST_VALUES = 24
"""A slice with more values is shown in bins, two for each doubling."""

Counts = dict[tuple[int, int], tuple[int, int]]
"""(lowest, highest) value of a bin -> right answers, queries."""


def slice_figures(
    found: list[Entry], look: Look, rows_of: Callable[[str], list[SliceRow]]
) -> list[Figure]:
    """A figure for each slice that has more than one value, over the runs at each cell's best
    learning rate. `rows_of` gives the rows of a run."""
    counts: dict[str, dict[int, dict[int, list[int]]]] = defaultdict(dict)
    sliced: list[list[Result]] = []
    for number, entry in enumerate(found):
        sliced.append([])
        for result in entry.cell.at_best:
            rows = rows_of(result.hash)
            sliced[-1] += [result] * bool(rows)
            for row in rows:
                by_value = counts[row.slice].setdefault(number, {})
                sums = by_value.setdefault(row.value, [0, 0])
                sums[0] += row.correct
                sums[1] += row.total
    figures = []
    for name, by_entry in sorted(counts.items()):
        if len({value for by_value in by_entry.values() for value in by_value}) > 1:
            figures.append(_figure(plain(name), found, by_entry, look, sliced))
    return figures


def bins(values: list[int]) -> list[tuple[int, int]]:
    """(lowest, highest) of each bin: the values themselves, or two bins for each doubling."""
    if len(values) <= MOST_VALUES:
        return [(value, value) for value in values]
    by_bin: dict[int, list[int]] = defaultdict(list)
    for value in values:
        by_bin[math.floor(2 * math.log2(value)) if value > 0 else value - 1].append(value)
    return [(min(members), max(members)) for _, members in sorted(by_bin.items())]


def _figure(
    name: str,
    found: list[Entry],
    by_entry: dict[int, dict[int, list[int]]],
    look: Look,
    sliced: list[list[Result]],
) -> Figure:
    values = sorted({value for by_value in by_entry.values() for value in by_value})
    edges = bins(values)
    rows = []
    order = sorted(by_entry, key=lambda i: (found[i].panel_order, found[i].width, found[i].series))
    for number in order:
        entry, by_value = found[number], by_entry[number]
        for low, high in edges:
            members = [sums for value, sums in by_value.items() if low <= value <= high]
            total = sum(sums[1] for sums in members)
            if total:
                rows.append(
                    {
                        "panel": f"{entry.panel}; width {entry.width}",
                        "series": entry.series,
                        "value": math.sqrt(low * high) if low > 0 else low,
                        "values": str(low) if low == high else f"{low} to {high}",
                        "accuracy": sum(sums[0] for sums in members) / total,
                        "queries": total,
                        "learning_rate": rates_text(_rates(sliced[number])),
                        "runs": ", ".join(result.hash for result in sliced[number]),
                    }
                )
    look = look.within(rows)
    words = name.replace("_", " ")
    x = _axis(words, values)
    base = alt.Chart().encode(x=x, color=look.colour(), opacity=fading(), y=accuracy_axis())
    shown = tooltip(
        ("series", "model"),
        ("panel", "task"),
        ("values", words),
        ("accuracy", "test accuracy", ".4f"),
        ("queries", "queries", ","),
        ("learning_rate", "learning rate"),
        ("runs", "runs"),
    )
    layers = [
        base.mark_line(strokeWidth=2),
        base.mark_point(filled=True, size=45).encode(shape=look.shape(), tooltip=shown),
    ]
    caption = (
        f"Test accuracy by {words}, at each model's best learning rate, {_seeds(found, sliced)}"
    )
    if len(edges) < len(values):
        caption += f" The {len(values)} values are put into {len(edges)} bins, two a doubling."
    return faceted(f"slice_{_file_name(name)}", f"Accuracy by {words}", caption, rows, layers)


def _rates(runs: list[Result]) -> list[float]:
    return sorted({run.config["optimizer"]["learning_rate"] for run in runs})


def _seeds(found: list[Entry], sliced: list[list[Result]]) -> str:
    """How seeds are put together, and which runs are left out of all slices."""
    runs: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    for entry, drawn in zip(found, sliced, strict=True):
        runs[entry.series] += len(entry.cell.at_best)
        lacking[entry.series] += len(entry.cell.at_best) - len(drawn)
    if not lacking.total():
        return "all seeds together."
    words = [f"{series} ({n} of {runs[series]})" for series, n in sorted(lacking.items()) if n]
    return (
        f"the seeds together whose accuracy by slice is kept. Runs that lack it are left out: "
        f"{', '.join(words)}."
    )


def _axis(words: str, values: list[int]) -> alt.X:
    """Few values stand side by side, many on a scale, wide ranges on a logarithmic one."""
    if len(values) <= 6:
        label = "datum.value ? 'yes' : 'no'" if set(values) == {0, 1} else "datum.label"
        return alt.X(
            "value:O",
            title=words,
            sort=None,
            scale=alt.Scale(domain=values),
            axis=alt.Axis(labelAngle=0, labelExpr=label),
        )
    if values[-1] <= 64 and values[0] >= 0:
        return alt.X("value:Q", title=words, axis=alt.Axis(tickCount=6, format="d", grid=False))
    if values[0] > 0:
        scale = alt.Scale(type="log", base=2, padding=8, nice=False)
        powers = [2**i for i in range(64) if values[0] <= 2**i <= values[-1]]
        shown = powers[:: len(powers) // 7 + 1]
        return alt.X(
            "value:Q",
            title=words,
            scale=scale,
            axis=alt.Axis(values=shown, format="~s" if values[-1] >= 10_000 else "d", grid=False),
        )
    scale = alt.Scale(type="symlog", padding=8, nice=False)
    return alt.X("value:Q", title=words, scale=scale, axis=alt.Axis(tickCount=5, grid=False))


def _file_name(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in name)
