"""What is printed of an audit: models, AR hits and other tokens, and the other slices."""

import json
from collections.abc import Iterable
from typing import Any, TextIO

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recallzoo.evaluate.audit_store import Audit

TABLE_WIDTH = 110
"""Of a table that is not printed to a terminal."""
KINDS = {
    "frequency": "by training frequency of the pair",
    "distance": "by tokens back to the pair's last occurrence",
    "occurrence": "by earlier occurrences of the pair in context",
    "domain": "by domain",
}


def print_tables(audit: Audit, stream: TextIO) -> None:
    """Tables for a terminal, and every note."""
    console = Console(file=stream, width=None if stream.isatty() else TABLE_WIDTH)
    about = audit.about
    console.print(_models(about))
    if audit.sliced_models:
        summary = audit.full_summary()
        console.print(_hits(about, summary))
        if about["references"]:
            for kind, title in KINDS.items():
                console.print(_slices(about, summary, kind, title))
        console.print(Text(about["pair_counts"]["label"] + "."))
    stride = about["stride"]
    contexts = "disjoint" if stride == about["context"] else f"sliding by {stride:,}"
    console.print(
        Text(
            f"contexts: {about['context']:,} tokens, {contexts}, documents {about['documents']}, "
            f"BOS {about['bos']}. Intervals: {about['bootstrap']['level']:.0%}, bootstrap over "
            f"{about['data']['num_documents']:,} documents."
        )
    )
    for note in about["notes"]:
        console.print(Text(f"note: {note}"))
    console.print(Text(f"audit: {audit.folder}"))


def print_json(audit: Audit, stream: TextIO) -> None:
    """audit.json with the summary's rows under `summary`."""
    json.dump({**audit.about, "summary": audit.full_summary().to_dicts()}, stream, indent=2)
    stream.write("\n")


def _models(about: dict[str, Any]) -> Table:
    data = about["data"]
    table = _table(f"{data['name']}/{data['split']}", "model", "parameters", "dtype", "tokens",
                   "loss (nats)", "perplexity", "bits per byte")  # fmt: skip
    for model in about["models"]:
        table.add_row(
            Text(model["name"] + (" (reference)" if model["role"] == "reference" else "")),
            f"{model['num_parameters']:,}",
            Text(model["dtype"]),
            f"{model['num_tokens']:,}",
            f"{model['loss_nats']:.4f}",
            f"{model['ppl']:.2f}",
            f"{model['bits_per_byte']:.4f}",
        )
    return table


def _hits(about: dict[str, Any], summary: pl.DataFrame) -> Table:
    columns = ["model", "cut", "AR hits", "ppl AR hits", "ppl other"]
    if about["references"]:
        columns += ["reference", "share of gap in AR hits"]
    table = _table("AR hits", *columns)
    kinds = {"ar_hit": "other", "repeated": "new"}
    for row in summary.filter(pl.col("slice_kind").is_in(list(kinds))).iter_rows(named=True):
        other = summary.filter(
            (pl.col("model") == row["model"])
            & pl.col("reference").eq_missing(pl.lit(row["reference"]))
            & (pl.col("slice_kind") == kinds[row["slice_kind"]])
            & pl.col("cut").eq_missing(pl.lit(row["cut"], dtype=pl.Int64))
        )
        cut = "none: all repeats" if row["cut"] is None else f"at most {row['cut']:,}"
        cells = [
            Text(row["model"]),
            cut,
            f"{row['share_of_tokens']:.2%}",
            f"{row['ppl']:.2f}",
            f"{other['ppl'][0]:.2f}" if len(other) else "-",
        ]
        if about["references"]:
            cells += [Text(row["reference"] or "-"), _share(row)]
        table.add_row(*cells)
    return table


def _slices(about: dict[str, Any], summary: pl.DataFrame, kind: str, title: str) -> Table:
    rows = summary.filter((pl.col("slice_kind") == kind) & pl.col("reference").is_not_null())
    table = _table(title, "model", "slice", "tokens", "gap (nats)", "share of gap")
    for row in rows.iter_rows(named=True):
        name = row["model"]
        if len(about["references"]) > 1:
            name += f" vs {row['reference']}"
        table.add_row(
            Text(name),
            Text(row["slice"]),
            f"{row['share_of_tokens']:.2%}",
            f"{row['gap_nats']:+.4f}",
            _share(row),
        )
    return table


def _share(row: dict[str, Any]) -> str:
    if row["share_of_gap"] is None:
        return "-"
    interval = "" if row["low"] is None else f" ({row['low']:.1%} to {row['high']:.1%})"
    return f"{row['share_of_gap']:.1%}{interval}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    words: Iterable[str] = ("model", "slice", "cut", "reference", "dtype")
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", overflow="fold")
    return table
