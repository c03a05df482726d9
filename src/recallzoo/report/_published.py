"""The points of the paper's Figure 2, to be laid beside ours."""

import functools
import io
from importlib.resources import files
from typing import Any

import polars as pl

from recallzoo.report._entries import Entry

LONG = -1
"""A BaseConv's kernel_size where its filter is as long as the input; its module imports torch."""

TASK = {"task": "mqar", "vocab_size": 8192, "filler": "zero", "num_passes": 1, "power": 0.01}
"""The paper's task but for its sizes; cells with other options are another task."""

CAPTION = (
    "Hollow, dashed: published in arXiv:2312.04927, Figure 2, read off its pixels (to ±0.01; the "
    "tooltip says where a point is partly covered), best of four learning rates, one seed. By the "
    "code of those days (recipe figure2_2023) BaseConv stood eight times in its models, H3 four "
    "times, the others twice, each before an MLP; the release has two layers of attention and four "
    "of the others, without MLP."
)


@functools.cache
def published_points() -> pl.DataFrame:
    """One row a mixer, seq_len, num_pairs and d_model: accuracy, uncertainty, hidden."""
    text = (files("recallzoo.report") / "data" / "published_figure2.csv").read_text("utf-8")
    return pl.read_csv(io.StringIO(text), comment_prefix="#")


def published_rows(found: list[Entry]) -> list[dict[str, Any]]:
    """Published points of the cells that `found` has as well, in the colour of the first series
    of that mixer."""
    points = {
        (row["mixer"], row["seq_len"], row["num_pairs"], row["d_model"]): row
        for row in published_points().iter_rows(named=True)
    }
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in found:
        key = _published_cell(entry)
        point = points.get(key) if key else None
        if point is None or (entry.panel, key) in rows:
            continue
        rows[entry.panel, key] = {
            "source": "published",
            "panel": entry.panel,
            "series": _series_of(found, entry.panel, point["mixer"]),
            "width": entry.width,
            "accuracy": point["accuracy"],
            "low": max(0.0, point["accuracy"] - point["uncertainty"]),
            "high": min(1.0, point["accuracy"] + point["uncertainty"]),
            "model": f"{point['mixer']}, published",
            "reading": f"±{point['uncertainty']:g}" + (", partly covered" * point["hidden"]),
        }
    return list(rows.values())


def _published_cell(entry: Entry) -> tuple[str, int, int, int] | None:
    mixers = {mixer["name"] for mixer in entry.mixers}
    tasks = entry.test_tasks
    if len(mixers) != 1 or len(tasks) != 1 or not _sees_all(entry):
        return None
    task = tasks[0]
    if any(task.get(option) != value for option, value in TASK.items()):
        return None
    return mixers.pop(), task["seq_len"], task["num_pairs"], entry.width


def _sees_all(entry: Entry) -> bool:
    """Whether every token can reach the last one: of the paper's BaseConv every second filter was
    as long as the input, and one whose filters are all short is another model."""
    sizes = [dict(mixer["options"]).get("kernel_size") for mixer in entry.mixers]
    return "base_conv" not in {mixer["name"] for mixer in entry.mixers} or LONG in sizes


def _series_of(found: list[Entry], panel: str, mixer: str) -> str:
    """One colour for a mixer's published points in a panel, whichever widths each series has."""
    return next(
        other.series
        for other in found
        if other.panel == panel and (_published_cell(other) or ("",))[0] == mixer
    )
