"""What `scaling.py` measured, as charts.

python benchmarks/scaling_charts.py --result results/scaling_h100.json

RESULT_time.svg      seconds of a step over the length, and times as fast as attention
RESULT_memory.svg    most memory that a step takes
"""

import argparse
from pathlib import Path
from typing import Any

import altair as alt

from recallzoo.files import read_json, write_text
from recallzoo.report._charts import Figure, Look, faceted

Row = dict[str, Any]
ATTENTION = "attention"


def draw(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write the charts that there are numbers for beside the result."""
    paths = []
    for figure in figures(result, stem):
        paths.append(folder / f"{figure.name}.svg")
        write_text(paths[-1], figure.svg())
    return paths


def figures(result: dict[str, Any], stem: str) -> list[Figure]:
    """Time, its ratio to attention's, and memory over the length."""
    measured = [row for row in result["models"] if "error" not in row]
    if not measured:
        return []
    look = Look.of({row["model"]: row["model"] for row in measured})
    attention = {
        row["seq_len"]: row["median_seconds"] for row in measured if row["model"] == ATTENTION
    }
    time = [_row("seconds of a step", one, one["median_seconds"]) for one in measured]
    time += [
        _row("times as fast as attention", one, attention[one["seq_len"]] / one["median_seconds"])
        for one in measured
        if one["seq_len"] in attention
    ]
    memory = [
        _row("GiB of a step", one, one["peak_memory_bytes"] / 2**30)
        for one in measured
        if one["peak_memory_bytes"]
    ]
    size = f"{result['settings']['num_layers']} layers of width {result['settings']['d_model']}"
    drawn = [_figure(f"{stem}_time", f"Time of a training step, {size}", time, look)]
    if memory:
        drawn.append(_figure(f"{stem}_memory", f"Memory of a training step, {size}", memory, look))
    return drawn


def _row(panel: str, measured: Row, value: float) -> Row:
    return {
        "panel": panel,
        "series": measured["model"],
        "tokens": measured["seq_len"],
        "value": value,
    }


def _figure(name: str, title: str, rows: list[Row], look: Look) -> Figure:
    look = look.within(rows)
    scale = alt.Scale(type="log", nice=False, padding=12)
    x = alt.X(
        "tokens:Q",
        title="tokens",
        scale=scale,
        axis=alt.Axis(values=sorted({row["tokens"] for row in rows}), format="d", labelAngle=-40),
    )
    y = alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(format="~g", tickCount=6))
    base = alt.Chart().encode(x=x, y=y, color=look.colour())
    layers = [
        base.mark_line(strokeWidth=2),
        base.mark_point(filled=True).encode(shape=look.shape()),
    ]
    figure = faceted(name, title, "", rows, layers, 300, 380, pick=False)
    figure.spec["resolve"]["scale"] = {"y": "independent"}
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--result", type=Path, required=True)
    path = parser.parse_args().result
    print("written to", *draw(read_json(path), path.parent, path.stem))


if __name__ == "__main__":
    main()
