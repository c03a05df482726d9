"""Charts of the tables that `table1.py` and `table2.py` write, as SVG files beside their JSON.

    python benchmarks/table_charts.py --table results/table1.json --metrics OUT/metrics

    TABLE_frequency.svg  loss by training frequency of the pair, apart for pairs repeated in the
                         context and new ones (arXiv:2312.04927, Figure 1)
    TABLE_cuts.svg       at each cut: perplexity on AR hits and on other tokens, and the share of
                         the gap to the reference that lies in AR hits (Figure 3)
    TABLE_training.svg   loss on AR hits and other tokens of the validation split over training
    TABLE_closed.svg     of table 2: gap closed over all tokens and over AR hits

Lines and ticks are means over seeds, points are seeds. What has no data is not drawn; which models
these are is printed, and written below the title of the chart.
"""

import argparse
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import altair as alt
from text_models import Job

from recallzoo.files import read_json, write_text
from recallzoo.report._audit_charts import BINS, WIDE
from recallzoo.report._charts import SOFT, Figure, Look, faceted

Row = dict[str, Any]
"""What is drawn: panel, series, which (of two kinds of tokens), x, value with its interval low and
high, seed; of: "seed", or "mean" over num_seeds."""

HITS, OTHER, ALL = "AR hits", "other tokens", "all tokens"
LOSS = "loss, nats a token"
SHARE = "share_of_tokens"
SEED, MEAN = (f"datum.of == '{of}'" for of in ("seed", "mean"))
SEVERAL = f"{MEAN} && datum.num_seeds > 1"
SMALL = 190
"""Pixels of one of several panels side by side."""
LIMITS = (-0.5, 1.5)
"""Shares of a gap are drawn within these: the share of a gap near 0 can be any number."""


@dataclass(frozen=True)
class Table:
    """A table as its script writes it, and how its models look."""

    found: dict[str, Any]
    names: dict[str, str]
    """Model -> what charts call it."""
    look: Look

    @staticmethod
    def of(found: dict[str, Any]) -> "Table":
        """Colours are given to all models that were asked for, so that they stay as they are when
        models come later."""
        ahead = {row["model"] for row in found["rows"] if row.get("causal") is False}
        there = {model: model for model in _models(found["rows"])}
        look = Look.of({**{model: model for model in found.get("models", [])}, **there})
        names = {model: model + " (looks ahead)" * (model in ahead) for model in look.colours}
        by_name = [{names[m]: v for m, v in of.items()} for of in (look.colours, look.shapes)]
        return Table(found, names, Look(*by_name))

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.found["rows"]

    @property
    def corpus(self) -> str:
        """What the table was measured on."""
        return f"{self.rows[0]['corpus']}, {self.rows[0]['test_tokens'] or 0:,} test tokens"

    def absent(self, rows: Sequence[Row], why: str, but: Sequence[str] = ()) -> str:
        """A sentence of the models that a chart of these rows lacks; empty if it lacks none."""
        drawn = {row["series"] for row in rows}
        lacking = [m for m, name in self.names.items() if name not in drawn and m not in but]
        return f" Not drawn, for want of {why}: {', '.join(lacking)}." if lacking else ""


def figures(found: dict[str, Any], metrics: Path, stem: str) -> tuple[list[Figure], list[str]]:
    """The charts of a table, and what is to be told of what they lack."""
    if not found["rows"]:
        return [], ["no charts: the table has no rows."]
    table = Table.of(found)
    charts = {
        "frequency": frequency(table, stem),
        "cuts": cuts(table, stem),
        "training": training(table, metrics, stem),
    }
    if "base" in found:
        charts["closed"] = closed(table, stem)
    drawn, told = [], []
    for kind, (figure, absent) in charts.items():
        name = f"{stem}_{kind}.svg"
        if figure is None:
            told.append(f"{name} is not drawn.{absent}")
            continue
        drawn.append(figure)
        if absent:
            told.append(f"{name}:{absent}")
    return drawn, told


def draw(found: dict[str, Any], metrics: Path, out: Path, stem: str) -> list[Path]:
    """Write the charts of a table to a folder. Says what they lack."""
    drawn, told = figures(found, metrics, stem)
    paths = []
    for figure in drawn:
        paths.append(out / f"{figure.name}.svg")
        write_text(paths[-1], figure.svg())
    print("\n".join(told), end="\n" if told else "")
    return paths


def frequency(table: Table, stem: str) -> tuple[Figure | None, str]:
    """Loss by training frequency of the pair."""
    kinds = {
        "frequency_repeated": "pair repeated in context",
        "frequency_new": "pair new",
    }
    slices = [s for s in table.found.get("slices", []) if s["kind"] in kinds]
    slices = [s for s in slices if s["low"] is not None and s["model"] in table.names]
    rows = [
        _row(table, s, table.corpus, kinds[s["kind"]], s["slice"], s["loss_nats"])
        for s in sorted(slices, key=lambda s: s["low"])
    ]
    absent = table.absent(rows, "losses by slice")
    if not rows:
        return None, absent
    words, _ = BINS["frequency"]
    x = alt.X(
        "x:O",
        title=words,
        sort=list(dict.fromkeys(row["x"] for row in rows)),
        axis=alt.Axis(labelAngle=-40, labelLimit=110),
    )
    dash = alt.StrokeDash(
        "which:N", title=None, scale=alt.Scale(domain=list(kinds.values()), range=[[1, 0], [4, 3]])
    )
    caption = (
        "Mean loss by how often the pair that a token completes occurs in "
        "training. Solid: the pair occurred earlier in the context; dashed: it did not."
    )
    layers = _lines(table.look.within(rows), x, alt.Y("value:Q", title=LOSS), dash)
    title = "Loss by training frequency of the pair"
    figure = faceted(
        f"{stem}_frequency", title, caption, _with_means(rows), layers, 300, WIDE, pick=False
    )
    return _captioned(figure, WIDE, absent), absent


def cuts(table: Table, stem: str) -> tuple[Figure | None, str]:
    """Perplexity on both kinds of tokens at each cut, over the share of the gap in AR hits."""
    ordered = sorted(table.rows, key=lambda row: row["cut"])
    perplexity = [
        _row(table, one, _cut(one), which, 0, one[name])
        for one in ordered
        for which, name in ((HITS, "ppl_ar_hits"), (OTHER, "ppl_other"))
        if one[name] is not None
    ]
    absent = table.absent(perplexity, "sums")
    if not perplexity:
        return None, absent
    order = _by_mean(table, "ppl_overall")
    look = table.look.within(perplexity)
    x = alt.X(
        "value:Q",
        title="perplexity",
        scale=alt.Scale(type="log", nice=False, padding=12),
        axis=alt.Axis(
            values=[digit * 10**power for power in range(7) for digit in (1, 2, 5)],
            format="~s",
            labelOverlap="greedy",
            labelSeparation=5,
        ),
    )
    joined = alt.Chart().mark_line(color="#cbd2d9", strokeWidth=2).transform_filter(MEAN)
    y = _models_axis([name for name in order if name in look.colours])
    layers = [joined.encode(x=x, y=y, detail="series:N"), *_points(look, x, y, (HITS, OTHER))]
    upper = _panels(f"{stem}_cuts", perplexity, layers)
    caption = (
        f"On {table.corpus}. A token is an AR hit if its pair occurred earlier in the context and "
        f"at most so often in training as the panel says. Filled: {HITS}; hollow: {OTHER}. Models "
        f"are ordered by perplexity over all tokens."
    )
    parts = [upper]
    shares = [
        {**_row(table, one, _cut(one), HITS, 0, one["share_of_gap"]), "tokens": one[SHARE]}
        for one in ordered
        if (one.get("share_of_gap") or {"value": None})["value"] is not None
    ]
    here = {row["series"] for row in perplexity}
    lacking = [model for model, name in table.names.items() if name not in here]
    absent += table.absent(shares, "a share of the gap", (*lacking, table.found["reference"]))
    if shares:
        lower, cut_off = _shares(table, shares, order, f"{stem}_cuts")
        parts.append(lower)
        caption += (
            f" Below: share of the gap to {table.found['reference']} that lies in AR hits, with "
            f"95 % intervals over documents; the grey line is their share of tokens.{cut_off}"
        )
    title = "Perplexity by recall, and the share of the gap in AR hits"
    return _captioned(_stacked(f"{stem}_cuts", title, caption, parts), 0, absent), absent


def _shares(table: Table, rows: list[Row], order: list[str], name: str) -> tuple[Figure, str]:
    """The lower panels of `cuts`, and a sentence if they are cut off."""
    rows = _in_lanes(rows)
    look = table.look.within(rows)
    domain, cut_off = _limited(rows)
    x = alt.X(
        "value:Q",
        title=f"share of the gap to {table.found['reference']}",
        scale=alt.Scale(domain=domain, nice=False),
        axis=alt.Axis(format="%", tickCount=5),
    )
    y = _models_axis([one for one in order if one in look.colours])
    tokens = alt.Chart().mark_rule(color="#9aa5b1", strokeWidth=2).transform_filter(MEAN)
    layers = [
        tokens.encode(x=alt.X("mean(tokens):Q")),
        *_points(look, x, y, (HITS,)),
    ]
    return _panels(name, rows, layers), cut_off


def training(table: Table, metrics: Path, stem: str) -> tuple[Figure | None, str]:
    """Loss on AR hits and on other tokens of the validation split over training tokens."""
    kept, missing = [], []
    for one in {(row["model"], row["seed"]): row for row in table.rows}.values():
        job = Job(one["model"], one["learning_rate"], one["seed"]).name
        path = metrics / f"{job}.jsonl"
        if path.exists():
            kept.append((one, looks(path)))
        else:
            missing.append((one["model"], job))
    rows = []
    shown = sorted({row["cut"] for row in table.rows})
    for kind, name in ((HITS, "ar_hit"), (OTHER, "other")):
        for cut in shown:
            rows += [
                _row(table, one, f"{kind}; cut {cut:,}", kind, tokens, values[column])
                for one, lines in kept
                for tokens, values in lines
                if values.get(column := f"valid_{name}_{cut}_loss_nats") is not None
            ]
    absent = table.absent(rows, "metrics with losses by recall")
    drawn = {row["series"] for row in rows}
    seeds = [job for model, job in missing if table.names[model] in drawn]
    absent += f" Without metrics: {', '.join(seeds)}." if seeds else ""
    if not rows:
        return None, absent
    x = alt.X(
        "x:Q",
        title="training tokens",
        scale=alt.Scale(zero=True, nice=False),
        axis=alt.Axis(format="~s", tickCount=4),
    )
    caption = (
        "At each look at the validation split. Recall appears where the loss on AR hits drops and "
        "that on other tokens does not. A cut: the most training occurrences of an AR hit's pair."
    )
    y = alt.Y("value:Q", title=LOSS, scale=alt.Scale(zero=False))
    layers = _lines(table.look.within(rows), x, y, size=14)
    title = "Loss on AR hits and other tokens of the validation split, over training"
    figure = faceted(
        f"{stem}_training", title, caption, _with_means(rows), layers, 175, SMALL, pick=False
    )
    figure.spec["columns"] = len(shown)
    return _captioned(figure, len(shown) * (SMALL + 40), absent), absent


def looks(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Training tokens and values of each look at the validation split in a file of metrics, of
    which steps may have been left out."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    a_step = next((line["tokens"] // line["step"] for line in lines if "tokens" in line), 0)
    return [(a_step * line["step"], line) for line in lines if "valid_loss_nats" in line]


def closed(table: Table, stem: str) -> tuple[Figure | None, str]:
    """Gap between base and reference that each model closes, at each cut."""
    base, reference = table.found["base"], table.found["reference"]
    rows = [
        _row(table, one, _cut(one), which, 0, one[name])
        for one in sorted(table.rows, key=lambda row: row["cut"])
        for which, name in ((ALL, "gap_closed"), (HITS, "ar_gap_closed"))
        if (one.get(name) or {"value": None})["value"] is not None
    ]
    absent = table.absent(rows, "a gap closed", but=(base, reference))
    if not rows:
        return None, absent
    rows = _in_lanes(rows)
    domain, cut_off = _limited(rows)
    x = alt.X(
        "value:Q",
        title="gap closed",
        scale=alt.Scale(domain=domain, nice=False),
        axis=alt.Axis(format="%", tickCount=5),
    )
    look = table.look.within(rows)
    order = [one for one in _by_mean(table, "gap_closed", falling=True) if one in look.colours]
    ends = [alt.Chart().mark_rule(color=SOFT).encode(x=alt.datum(end)) for end in (0, 1)]
    layers = [*ends, *_points(look, x, _models_axis(order), (HITS, ALL))]
    caption = (
        f"Share of the gap in loss between {base} (0 %) and {reference} (100 %) that a model "
        f"closes, on {table.corpus}, with 95 % intervals over documents. Filled: on {HITS} at "
        f"the panel's cut; hollow: on {ALL}, the same in all panels.{cut_off}"
    )
    if any(row.get("causal") is False for row in table.rows):
        caption += " A model that looks ahead is no measure of a language model."
    figure = _panels(f"{stem}_closed", rows, layers)
    title = f"Gap from {base} to {reference} that is closed"
    return _captioned(_stacked(figure.name, title, caption, [figure]), 0, absent), absent


def _models(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _cut(row: dict[str, Any]) -> str:
    """The panel of a cut."""
    return f"at most {row['cut']:,} occurrences; {100 * row[SHARE]:.1f} % of tokens"


def _row(table: Table, one: dict[str, Any], panel: str, which: str, x: Any, value: Any) -> Row:
    """What is drawn of one model and seed. A value is a number, or one with its interval."""
    ends = value if isinstance(value, dict) else {"value": value, "low": None, "high": None}
    series = table.names[one["model"]]
    place = {"panel": panel, "series": series, "which": which, "x": x, "seed": one["seed"]}
    return {**place, **ends, "of": "seed", "lane": 0.0}


def _with_means(rows: list[Row]) -> list[Row]:
    """The rows and, of each place in the chart, the mean over its seeds."""
    places: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        place = tuple(row[name] for name in ("panel", "series", "which", "x"))
        places.setdefault(place, []).append(row)
    means = [
        {
            **several[0],
            "of": "mean",
            "seed": None,
            "low": None,
            "high": None,
            "value": fmean(row["value"] for row in several),
            "num_seeds": len({row["seed"] for row in several}),
            "lane": fmean(row["lane"] for row in several),
        }
        for several in places.values()
    ]
    return [*rows, *means]


def _in_lanes(rows: list[Row]) -> list[Row]:
    """Rows with a place between -1 and 1 within their model's band, its lane: one for each kind of
    tokens, and in it one for each seed, so that their intervals do not cover each other."""
    kinds = sorted({row["which"] for row in rows})
    seeds: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        seeds.setdefault((row["series"], row["which"]), set()).add(row["seed"])
    for row in rows:
        own = sorted(seeds[row["series"], row["which"]])
        within = (own.index(row["seed"]) + 0.5) / len(own)
        row["lane"] = 2 * (kinds.index(row["which"]) + within) / len(kinds) - 1
    return rows


def _limited(rows: Sequence[Row]) -> tuple[list[float], str]:
    """The domain of shares: what there is, within LIMITS; and a sentence if that is not all."""
    ends = [row[end] for row in rows for end in ("low", "value", "high")]
    known = [end for end in ends if end is not None]
    lowest, highest = min(known), max(known)
    domain = [min(0.0, max(LIMITS[0], lowest)), max(1.0, min(LIMITS[1], highest))]
    if lowest >= domain[0] and highest <= domain[1]:
        return domain, ""
    low, high = (100 * end for end in domain)
    return domain, f" Shares are drawn from {low:.0f} % to {high:.0f} %; the table has the rest."


def _by_mean(table: Table, name: str, falling: bool = False) -> list[str]:
    """The models in the order of their mean over rows."""
    values: dict[str, list[float]] = {}
    for row in table.rows:
        value = row.get(name)
        value = value["value"] if isinstance(value, dict) else value
        if value is not None:
            values.setdefault(table.names[row["model"]], []).append(value)
    return sorted(values, key=lambda series: fmean(values[series]), reverse=falling)


def _models_axis(order: list[str]) -> alt.Y:
    axis = alt.Axis(labelLimit=190, grid=True, domain=False, ticks=False)
    scale = alt.Scale(type="band", padding=0.2)
    return alt.Y("series:N", title=None, sort=order, axis=axis, scale=scale)


def _lines(
    look: Look, x: alt.X, y: alt.Y, dash: alt.StrokeDash | None = None, size: int = 36
) -> list[alt.Chart]:
    """Means as lines, seeds as points."""
    base = alt.Chart().encode(x=x, y=y, color=look.colour())
    line = base.mark_line(strokeWidth=2).transform_filter(MEAN)
    points = base.mark_point(filled=True, size=size, opacity=1).transform_filter(SEED)
    return [
        line if dash is None else line.encode(strokeDash=dash),
        points.encode(shape=look.shape()),
    ]


def _points(look: Look, x: alt.X, y: alt.Y, kinds: tuple[str, ...]) -> list[alt.Chart]:
    """Seeds as points with their intervals, filled for the first of the kinds of tokens; a tick
    for the mean of several."""
    lane = alt.YOffset("lane:Q", scale=alt.Scale(domain=[-1, 1]))
    base = alt.Chart().encode(y=y, yOffset=lane, color=look.colour(legend=False))
    colours = alt.Scale(domain=list(look.colours), range=list(look.colours.values()))
    scale = alt.Scale(domain=list(kinds), range=[1, 0][: len(kinds)])
    filled = alt.FillOpacity("which:N", scale=scale, legend=None)
    ends = base.mark_rule(strokeWidth=1.5, clip=True).transform_filter(SEED)
    points = (
        alt.Chart()
        .mark_point(clip=True, size=45, strokeWidth=1.7, opacity=1)
        .transform_filter(SEED)
    )
    ticks = base.mark_tick(thickness=2, size=18, opacity=1, clip=True).transform_filter(SEVERAL)
    return [
        ends.encode(x=alt.X("low:Q"), x2="high:Q"),
        points.encode(
            x=x,
            y=y,
            yOffset=lane,
            fill=alt.Fill("series:N", scale=colours, legend=None),
            stroke=alt.Stroke("series:N", scale=colours, legend=None),
            fillOpacity=filled,
        ),
        ticks.encode(x=x),
    ]


def _panels(name: str, rows: list[Row], layers: list[alt.Chart]) -> Figure:
    """Panels of which each row is a model."""
    lanes = Counter((row["panel"], row["series"]) for row in rows if row["low"] is not None)
    height = max(24, 8 + 9 * max(lanes.values(), default=0)) * len({row["series"] for row in rows})
    rows = _with_means(rows)
    return faceted(name, name, "", rows, layers, max(50, height), SMALL, pick=False)


def _stacked(name: str, title: str, caption: str, parts: list[Figure]) -> Figure:
    """Figures one above the other, as one chart."""
    whole = ("$schema", "config", "datasets")  # of a chart, not of its parts
    inner = [{k: v for k, v in one.spec.items() if k not in whole} for one in parts]
    rows = {k: v for one in parts for k, v in one.spec["datasets"].items()}
    wide = parts[0].spec["columns"] * (SMALL + 40)
    apart = {"resolve": {"scale": {"yOffset": "independent"}}}
    spec = {"$schema": parts[0].spec["$schema"], "concat": inner, "datasets": rows}
    return Figure(name, title, caption, {**spec, "columns": 1, "spacing": 30, **apart}, wide, 100)


def _captioned(figure: Figure, width: int, absent: str) -> Figure:
    """With its caption below the title, as the file stands alone."""
    width = max(width, figure.panel_width)
    figure.spec["title"] = {
        "text": figure.title,
        "subtitle": textwrap.wrap(figure.caption + absent, max(60, int(width / 5.6))),
        "subtitleColor": SOFT,
        "subtitleFontSize": 11,
        "subtitlePadding": 6,
    }
    return figure


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, required=True, help="results/table1.json or table2")
    parser.add_argument("--metrics", type=Path, required=True, help="OUT/metrics of the runs")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the charts")
    args = parser.parse_args(argv)
    for path in draw(read_json(args.table), args.metrics, args.out, args.table.stem):
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
