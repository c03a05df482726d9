"""Where a language model loses: by cut, training frequency, distance, occurrence and domain."""

from typing import Any

import altair as alt
import polars as pl

from recallzoo.evaluate.audit_store import Audit
from recallzoo.report._charts import SOFT, Figure, Look, faceted, fading, tooltip
from recallzoo.report._entries import plain

WIDE = 540
"""Pixels of a panel with many bins, where it is the only one."""
BINS = {
    "frequency": (
        "training occurrences of the pair",
        "By how often the pair that a token completes occurs in training (arXiv:2312.04927, "
        "Figure 1). Solid: the pair occurred earlier in the context; dashed: it did not.",
    ),
    "distance": (
        "tokens back to the pair's last occurrence",
        "By the distance to the last occurrence of the token's pair in the context.",
    ),
    "occurrence": (
        "earlier occurrences of the pair in the context",
        "By how often the token's pair occurred before in the context.",
    ),
}
FIELDS = (
    ("series", "model"),
    ("panel", "compared"),
    ("which", "tokens"),
    ("slice", "slice"),
    ("num_tokens", "number of tokens", ","),
    ("share_of_tokens", "share of tokens", ".2%"),
    ("loss_nats", "loss, nats", ".4f"),
    ("gap_nats", "gap, nats", "+.4f"),
    ("gap_interval", "gap, interval"),
    ("share_of_gap", "share of gap", ".1%"),
    ("share_interval", "share, interval"),
)


def audit_figures(audit: Audit, summary: pl.DataFrame) -> list[Figure]:
    """All figures of an audit, in the order of the page. None without sliced models."""
    look = Look.of({name: name for name in audit.models})
    compared = audit.about["reference"] is not None
    figures = [
        _cuts(summary, look) if compared else None,
        _bins(summary, look, compared, "frequency"),
        _bins(summary, look, compared, "distance"),
        _distances(summary),
        _bins(summary, look, compared, "occurrence"),
        _domains(summary, look, compared),
    ]
    return [figure for figure in figures if figure is not None]


def _rows(summary: pl.DataFrame, kinds: dict[str, str], compared: bool) -> list[dict[str, Any]]:
    """Rows of some kinds, each kind with the word that tells it from the others."""
    chosen = summary.filter(pl.col("slice_kind").is_in(list(kinds)))
    if compared:
        chosen = chosen.filter(pl.col("gap_nats").is_not_null())
    else:
        chosen = chosen.unique(["model", "slice_kind", "slice", "cut"], maintain_order=True)
    return [
        {
            **row,
            "slice": plain(row["slice"]),
            "series": plain(row["model"]),
            "panel": f"against {plain(row['reference'])}" if compared else "loss of each model",
            "which": kinds[row["slice_kind"]],
            "gap_interval": interval(row["gap_low"], row["gap_high"], "{:+.4f}"),
            "share_interval": interval(row["low"], row["high"], "{:.1%}"),
        }
        for row in chosen.sort("slice_order", "slice_kind", "model").iter_rows(named=True)
    ]


def interval(low: float | None, high: float | None, form: str) -> str:
    """A confidence interval in words; a dash where there is none."""
    return "–" if low is None or high is None else f"{form.format(low)} to {form.format(high)}"


def _cuts(summary: pl.DataFrame, look: Look) -> Figure | None:
    """Share of the gap in AR hits over the cut, beside their share of tokens."""
    rows = [row for row in _rows(summary, {"ar_hit": "AR hits"}, True) if row["num_tokens"]]
    rows = [row for row in rows if row["share_of_gap"] is not None]
    if not rows:
        return None
    for row in rows:
        row["slice"] = f"{row['cut']:,}"
    ends = [row[end] for row in rows for end in ("low", "high", "share_of_gap", "share_of_tokens")]
    known = [end for end in ends if end is not None]
    domain = [min(0.0, max(-0.5, min(known))), max(1.0, min(1.5, max(known)))]
    y = alt.Y(
        "share_of_gap:Q",
        title="share",
        scale=alt.Scale(domain=domain),
        axis=alt.Axis(format="%", tickCount=6),
    )
    order = [f"{cut:,}" for cut in sorted({row["cut"] for row in rows})]
    x = alt.X(
        "slice:O",
        title="cut: training occurrences of an AR hit's pair, at most",
        sort=order,
        axis=alt.Axis(labelAngle=0 if len(order) <= 8 else -45),
    )
    base = alt.Chart().encode(x=x, opacity=fading(), color=look.within(rows).colour())
    layers = [
        alt.Chart()
        .mark_bar(color="#d5dae0", width={"band": 0.7}, clip=True)
        .encode(
            x=x, y=alt.Y("share_of_tokens:Q", title="share", stack=None), tooltip=tooltip(*FIELDS)
        ),
        base.mark_rule(strokeWidth=1.5, clip=True).encode(
            y=alt.Y("low:Q", title="share"), y2="high:Q"
        ),
        base.mark_line(strokeWidth=2, clip=True).encode(y=y),
        base.mark_point(filled=True, clip=True).encode(
            y=y, shape=look.within(rows).shape(), tooltip=tooltip(*FIELDS)
        ),
    ]
    caption = (
        "Share of the gap to the reference that lies in AR hits, uncapped, with its bootstrap "
        "interval over documents. Grey: their share of the tokens. What counts as an AR hit "
        "depends on the cut, so several are shown."
    )
    if min(known) < domain[0] or max(known) > domain[1]:
        caption += f" Drawn from {domain[0]:.0%} to {domain[1]:.0%}; the tables have the rest."
    return faceted(
        "audit_cuts", "Share of the gap in AR hits", caption, rows, layers, width=_wide(rows)
    )


def _bins(summary: pl.DataFrame, look: Look, compared: bool, kind: str) -> Figure | None:
    """Mean gap to the reference, or loss where there is none, by bins of a quantity."""
    words, caption = BINS[kind]
    by_repeat = {f"{kind}_repeated": "pair repeated in context", f"{kind}_new": "pair new"}
    rows = _rows(summary, by_repeat, compared) or _rows(summary, {kind: "all"}, compared)
    if not rows:
        return None
    value = "gap_nats" if compared else "loss_nats"
    title = "gap, nats a token" if compared else "loss, nats a token"
    look = look.within(rows)
    kinds = sorted({row["which"] for row in rows}, reverse=True)  # repeated pairs first: solid
    x = alt.X(
        "slice:O",
        title=words,
        sort=list(dict.fromkeys(row["slice"] for row in rows)),
        axis=alt.Axis(labelAngle=-40, labelLimit=110),
    )
    y = alt.Y(f"{value}:Q", title=title, axis=alt.Axis(grid=True))
    base = alt.Chart().encode(x=x, opacity=fading(), color=look.colour())
    dash = alt.StrokeDash(
        "which:N",
        title=None,
        scale=alt.Scale(domain=kinds, range=[[1, 0], [4, 3]][: len(kinds)]),
        legend=alt.Legend() if len(kinds) > 1 else None,
    )
    line = base.mark_line(strokeWidth=2).encode(y=y, strokeDash=dash)
    layers = [line]
    if compared:
        zero = alt.Chart().mark_rule(color=SOFT, strokeWidth=1).encode(y=alt.datum(0, title=title))
        ends = base.mark_rule(strokeWidth=1.2).encode(
            y=alt.Y("gap_low:Q", title=title), y2="gap_high:Q"
        )
        layers = [zero, ends, line]
    layers.append(
        base.mark_point(filled=True).encode(y=y, shape=look.shape(), tooltip=tooltip(*FIELDS))
    )
    what = "gap to the reference" if compared else "loss"
    bars = " Bars: bootstrap intervals over documents." if compared else ""
    return faceted(
        f"audit_{kind}",
        f"{what.capitalize()} by {words}",
        f"Mean {what} in nats a token. {caption}{bars}",
        rows,
        layers,
        width=_wide(rows),
    )


def _distances(summary: pl.DataFrame) -> Figure | None:
    """How far back pairs occurred: the same for all models, which share their tokens."""
    rows = _rows(summary, {"distance": "all"}, False)
    rows = [row for row in rows if row["model"] == rows[0]["model"] and row["slice_low"]]
    if not rows:
        return None
    for row in rows:
        row["panel"], row["series"] = "tokens whose pair occurred earlier", "tokens"
    bars = (
        alt.Chart()
        .mark_bar(color="#7b8794")
        .encode(
            x=alt.X(
                "slice:O",
                title="tokens back to the pair's last occurrence",
                sort=[row["slice"] for row in rows],
                axis=alt.Axis(labelAngle=-40),
            ),
            y=alt.Y("share_of_tokens:Q", title="share of all tokens", axis=alt.Axis(format="%")),
            tooltip=tooltip(
                ("slice", "distance"),
                ("num_tokens", "number of tokens", ","),
                ("share_of_tokens", "share of tokens", ".2%"),
            ),
        )
    )
    caption = (
        "How far back the pairs of repeated tokens occurred last (arXiv:2312.04927, Figure 3). "
        "Each bin is twice as wide as the one before it."
    )
    return faceted(
        "audit_distance_tokens",
        "Distances",
        caption,
        rows,
        [bars],
        width=WIDE,
        height=200,
        pick=False,
    )


def _domains(summary: pl.DataFrame, look: Look, compared: bool) -> Figure | None:
    """Gap, or loss, by domain, where there is more than one."""
    rows = _rows(summary, {"domain": "all"}, compared)
    domains = list(dict.fromkeys(row["slice"] for row in rows))
    if len(domains) < 2:
        return None
    value, low, high = ("gap_nats", "gap_low", "gap_high") if compared else ("loss_nats",) * 3
    title = "gap, nats a token" if compared else "loss, nats a token"
    look = look.within(rows)
    y = alt.Y("slice:N", title=None, sort=domains, axis=alt.Axis(labelLimit=170, grid=True))
    base = alt.Chart().encode(y=y, color=look.colour(), opacity=fading())
    layers = [
        base.mark_rule(strokeWidth=1.5).encode(x=alt.X(f"{low}:Q", title=title), x2=f"{high}:Q"),
        base.mark_point(filled=True).encode(
            x=alt.X(
                f"{value}:Q",
                title=title,
                scale=alt.Scale(zero=compared),
                axis=alt.Axis(tickCount=5),
            ),
            shape=look.shape(),
            tooltip=tooltip(*FIELDS),
        ),
    ]
    what = "gap to the reference" if compared else "loss"
    bars = ", with bootstrap intervals over documents" if compared else ""
    return faceted(
        "audit_domain",
        f"{what.capitalize()} by domain",
        f"Mean {what} in nats a token{bars}.",
        rows,
        layers,
        height=max(80, 22 * len(domains)),
        width=None if _wide(rows) is None else 440,
    )


def _wide(rows: list[dict[str, Any]]) -> int | None:
    """A wide panel where there is one, so that the labels of its bins have room."""
    return WIDE if len({row["panel"] for row in rows}) == 1 else None
