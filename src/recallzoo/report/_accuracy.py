"""Accuracy over width, length and mixer (arXiv:2312.04927, Figure 2); over the state's size."""

import re
from typing import Any

import altair as alt

from recallzoo.cells import rates_text
from recallzoo.report._charts import Figure, Look, accuracy_axis, faceted, fading, tooltip
from recallzoo.report._entries import Entry
from recallzoo.report._published import CAPTION, published_rows

HOW = (
    "Test accuracy at the learning rate that is best on the validation set (each seed's own where "
    "one solved the task and the others stopped); mean over seeds, with a bar from the lowest to "
    "the highest seed."
)
LABEL_WIDTH = 0.17
"""Of a number beside a bar, as a share of the axis."""
RUN_FIELDS = (
    ("series", "model"),
    ("panel", "task"),
    ("width", "width"),
    ("accuracy", "test accuracy", ".4f"),
    ("spread", "lowest to highest"),
    ("valid_accuracy", "validation accuracy", ".4f"),
    ("learning_rate", "learning rate"),
    ("seeds", "seeds"),
    ("num_parameters", "parameters", ","),
    ("state", "state, elements"),
    ("runs", "runs"),
)


def run_row(entry: Entry) -> dict[str, Any]:
    """What a chart draws and shows of a cell at its best learning rate."""
    best = entry.cell.at_best
    accuracies = [result.test_accuracy for result in best]
    parts = best[0].state_size
    return {
        "source": "this folder",
        "panel": entry.panel,
        "series": entry.series,
        "width": entry.width,
        "accuracy": entry.cell.test_accuracy,
        "low": min(accuracies),
        "high": max(accuracies),
        "spread": f"{min(accuracies):.4f} to {max(accuracies):.4f}",
        "valid_accuracy": sum(result.valid_accuracy for result in best) / len(best),
        "learning_rate": rates_text(entry.cell.learning_rates),
        "seeds": ", ".join(str(result.config["seed"]) for result in best),
        "num_parameters": best[0].num_parameters,
        "state_size": sum(parts.values()) if parts else None,
        "state": ", ".join(f"{kind} {size:,}" for kind, size in parts.items()) or "unknown",
        "runs": ", ".join(result.hash for result in best),
    }


def accuracy_figure(found: list[Entry], look: Look) -> Figure:
    """Accuracy over width, a panel for each task; one bar a model where there is one width."""
    published = published_rows(found)
    rows = [run_row(entry) for entry in found] + published
    if len({entry.width for entry in found}) == 1:
        return _over_models(rows, look, published)
    widths = sorted({entry.width for entry in found})
    ours, theirs = alt.datum.source == "this folder", alt.datum.source == "published"
    shown = widths if len(widths) <= 6 else widths[:: len(widths) // 6 + 1]
    x = alt.X(
        "width:Q",
        title="width (d_model)",
        scale=alt.Scale(type="log", base=2, padding=12, nice=False),
        axis=alt.Axis(values=shown, format="d", grid=False),
    )
    base = alt.Chart().encode(x=x, color=look.colour(), opacity=fading())
    plain = base.transform_filter(ours)
    hollow = base.transform_filter(theirs)
    layers = [
        plain.mark_rule(strokeWidth=1.5).encode(y=accuracy_axis("low"), y2="high:Q"),
        plain.mark_line(strokeWidth=2).encode(y=accuracy_axis()),
        plain.mark_point(filled=True).encode(
            y=accuracy_axis(), shape=look.shape(), tooltip=tooltip(*RUN_FIELDS)
        ),
    ]
    if published:
        layers = [
            hollow.mark_line(strokeWidth=1.2, strokeDash=[4, 3]).encode(y=accuracy_axis()),
            *layers,
            hollow.mark_point(filled=False, size=70, strokeWidth=1.4).encode(
                y=accuracy_axis(),
                shape=look.shape(),
                tooltip=_published_tooltip(),
            ),
        ]
    caption = f"{HOW} {CAPTION}" if published else HOW
    return faceted("accuracy", "Accuracy over width", caption, rows, layers)


def _over_models(rows: list[dict[str, Any]], look: Look, published: list[Any]) -> Figure:
    """One width: a bar a model, its accuracy in figures."""
    num_series = max(
        len({row["series"] for row in rows if row["panel"] == panel})
        for panel in {row["panel"] for row in rows}
    )
    width = next(row["width"] for row in rows)
    ours, theirs = alt.datum.source == "this folder", alt.datum.source == "published"
    x = alt.X(
        "accuracy:Q",
        title=f"test accuracy at width {width}",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(values=[0, 0.25, 0.5, 0.75, 1], format=".2~f"),
    )
    y = alt.Y(
        "series:N",
        title=None,
        sort=sorted({row["series"] for row in rows}, key=_natural),
        axis=alt.Axis(labelLimit=180, ticks=False, domain=False),
    )
    base = alt.Chart().encode(y=y).transform_filter(ours)
    inside = alt.datum.accuracy > 0.5
    diamonds = {(r["panel"], r["series"]): r["accuracy"] for r in published}
    rows = [
        {**row, "label_at": _label_at(row, diamonds.get((row["panel"], row["series"])))}
        for row in rows
    ]
    label_x = alt.X("label_at:Q", title=f"test accuracy at width {width}")
    layers = [
        base.mark_bar(height={"band": 0.62}).encode(
            x=x, color=look.colour(legend=False), tooltip=tooltip(*RUN_FIELDS)
        ),
        base.mark_rule(strokeWidth=1.5, color="#1f2933").encode(x=alt.X("low:Q"), x2="high:Q"),
        base.transform_filter(inside)
        .mark_text(align="right", dx=-8, fontWeight=600, fontSize=12, color="white")
        .encode(x=label_x, text=alt.Text("accuracy:Q", format=".3f")),
        base.transform_filter(~inside)
        .mark_text(align="left", dx=10, fontWeight=600, fontSize=12, color="#1f2933")
        .encode(x=label_x, text=alt.Text("accuracy:Q", format=".3f")),
    ]
    if published:
        layers.append(
            alt.Chart()
            .encode(y=y)
            .transform_filter(theirs)
            .mark_point(filled=False, shape="diamond", size=110, strokeWidth=2, color="#1f2933")
            .encode(x=x, tooltip=_published_tooltip())
        )
    return faceted(
        "accuracy",
        "Accuracy by model",
        f"{HOW} {CAPTION.replace('Hollow, dashed', 'Diamonds')}" if published else HOW,
        rows,
        layers,
        height=max(70, 36 * num_series),
        pick=False,
    )


def _label_at(row: dict[str, Any], diamond: float | None) -> float:
    """Where a bar's number begins, or, written within the bar, ends: past the spread over seeds,
    and past a published point that it would be written over."""
    if row["accuracy"] > 0.5:
        left = min(row["low"], row["accuracy"])
        return diamond if diamond is not None and left - LABEL_WIDTH < diamond <= left else left
    right = max(row["high"], row["accuracy"])
    return diamond if diamond is not None and right <= diamond < right + LABEL_WIDTH else right


def _natural(text: str) -> list[tuple[int, str]]:
    """Order by which k = 8 stands before k = 16."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


def _published_tooltip() -> list[alt.Tooltip]:
    return tooltip(
        ("model", "model"),
        ("panel", "task"),
        ("width", "width"),
        ("accuracy", "accuracy", ".2f"),
        ("reading", "reading"),
    )


def state_figure(found: list[Entry], look: Look) -> Figure | None:
    """Accuracy over the state's size; None if no cell has a known size above zero."""
    rows = [run_row(entry) for entry in found]
    drawn_rows = [row for row in rows if row["state_size"]]
    if not drawn_rows:
        return None
    look = look.within(drawn_rows)
    left_out = sorted({row["series"] for row in rows if not row["state_size"]})
    x = alt.X(
        "state_size:Q",
        title="state, elements",
        scale=alt.Scale(type="log", padding=12, nice=False),
        axis=alt.Axis(values=_ticks([row["state_size"] for row in drawn_rows]), format="~s"),
    )
    base = alt.Chart().encode(x=x, color=look.colour(), opacity=fading())
    layers = [
        base.mark_line(strokeWidth=1.2, strokeOpacity=0.4).encode(
            y=accuracy_axis(), order="width:Q"
        ),
        base.mark_rule(strokeWidth=1.5).encode(y=accuracy_axis("low"), y2="high:Q"),
        base.mark_point(filled=True).encode(
            y=accuracy_axis(), shape=look.shape(), tooltip=tooltip(*RUN_FIELDS)
        ),
    ]
    caption = (
        "Elements carried from token to token while decoding, over all layers, after the longest "
        "sequence: counted in the cache, not computed from a formula. Lines join the widths of a "
        "model."
    )
    if left_out:
        caption += f" Not shown, because their state is unknown or empty: {', '.join(left_out)}."
    return faceted("state_size", "Accuracy over the size of the state", caption, drawn_rows, layers)


def _ticks(sizes: list[int]) -> list[int]:
    """At most six round numbers that span some sizes."""
    lowest, highest = min(sizes), max(sizes)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10**k for k in range(16) for d in digits if lowest <= d * 10**k <= highest]
        if len(ticks) <= 6:
            break
    return ticks[:: len(ticks) // 7 + 1] or [lowest]
