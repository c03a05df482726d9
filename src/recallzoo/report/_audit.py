"""From an audit's folder to a page: perplexities, shares of the gap, and the token view."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from recallzoo.evaluate.audit_store import Audit
from recallzoo.files import require_folder, write_text
from recallzoo.report._audit_charts import audit_figures, interval
from recallzoo.report._entries import plain
from recallzoo.report._page import chart_data, page
from recallzoo.report._tokens import token_view
from recallzoo.report._write import FORMATS, write_figures


def write_audit_report(
    audit_folder: Path, out_folder: Path, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write `audit.html` and each of its charts as SVG and PNG; return their paths.

    Raises UserError for a folder that holds no finished audit, StoreError for a damaged one or
    where the report cannot be written. Equal audits give equal files.
    """
    require_folder(out_folder, "a folder for the report")
    audit = Audit.open(audit_folder)
    summary, view = audit.full_summary(), token_view(audit)
    figures = audit_figures(audit, summary) if audit.sliced_models else []
    written = write_figures(figures, out_folder, formats)
    if "html" in formats:
        about = audit.about
        text = page(
            "audit.html.j2",
            about=about,
            notes=[plain(note) for note in _notes(about)],
            figures={figure.name: figure for figure in figures},
            chart_data=chart_data(figures),
            tables={
                "models": _models_table(about, summary),
                "cuts": _cuts_table(about, summary),
                "slices": _slices_table(summary),
            },
            view=view,
            how_made=_how_made(about),
        )
        write_text(out_folder / "audit.html", text)
        written.insert(0, out_folder / "audit.html")
    return written


def _notes(about: dict[str, Any]) -> list[str]:
    lines = []
    counts = about["pair_counts"]
    if counts is not None and counts["stand_in"]:
        lines.append(
            f"Training frequencies are of a stand-in corpus, not of what the models were trained "
            f"on: {counts['label']}."
        )
    if len({model["tokenizer_hash"] for model in about["models"]}) > 1:
        lines.append(
            "The models have different tokenizers. Compare them in bits per byte: their "
            "perplexities are of different tokens."
        )
    return [*lines, *about["notes"]]


def _models_table(about: dict[str, Any], summary: pl.DataFrame) -> dict[str, Any]:
    """One row a model: perplexity overall, of AR hits and of other tokens at the first cut."""
    main = about["cuts"][0]["max_count"] if about["cuts"] else None
    rows = []
    for model in about["models"]:
        hit, other = (_ppl(summary, model["name"], kind, main) for kind in ("ar_hit", "other"))
        rows.append(
            [
                plain(model["name"]),
                model["role"],
                model["bits_per_byte"],
                model["ppl"],
                hit,
                other,
                model["loss_nats"],
                model["num_tokens"],
                model["num_parameters"],
                model["dtype"],
                str(model["model_type"]),
                model["tokenizer_hash"][:8],
                model["model_hash"][:8],
            ]
        )
    return {
        "columns": [
            {"title": "model", "kind": "text"},
            {"title": "role", "kind": "text"},
            {"title": "bits per byte", "kind": "nats"},
            {"title": "perplexity", "kind": "ppl"},
            {"title": "of AR hits", "kind": "ppl"},
            {"title": "of other tokens", "kind": "ppl"},
            {"title": "loss, nats", "kind": "nats"},
            {"title": "tokens", "kind": "int"},
            {"title": "parameters", "kind": "int"},
            {"title": "dtype", "kind": "text"},
            {"title": "type", "kind": "text"},
            {"title": "tokenizer", "kind": "hash"},
            {"title": "weights", "kind": "hash"},
        ],
        "rows": rows,
    }


def _ppl(summary: pl.DataFrame, model: str, kind: str, cut: int | None) -> float | None:
    if cut is None:
        return None
    found = summary.filter(pl.col("model") == model, slice_kind=kind, cut=cut)
    return None if found.is_empty() else found["ppl"][0]


def _cuts_table(about: dict[str, Any], summary: pl.DataFrame) -> dict[str, Any]:
    """One row a model, reference and cut; last, all repeated pairs, however frequent."""
    rates = {cut["max_count"]: cut["rate"] for cut in about["cuts"]}
    rows = []
    of_hits = summary.filter(pl.col("slice_kind").is_in(["ar_hit", "repeated"]))
    for row in of_hits.iter_rows(named=True):
        is_hit = row["slice_kind"] == "ar_hit"
        others = summary.filter(
            (pl.col("model") == row["model"])
            & (pl.col("slice_kind") == ("other" if is_hit else "new"))
            & pl.col("cut").eq_missing(pl.lit(row["cut"], dtype=pl.Int64))
        )
        rows.append(
            [
                plain(row["model"]),
                plain(row["reference"]) if row["reference"] else None,
                f"at most {row['cut']:,} in training" if is_hit else "all repeated pairs",
                rates.get(row["cut"]) if is_hit else None,
                row["share_of_tokens"],
                row["ppl"],
                None if others.is_empty() else others["ppl"][0],
                row["gap_nats"],
                row["share_of_gap"],
                _interval(row["low"], row["high"], "{:.1%}"),
            ]
        )
    return {
        "columns": [
            {"title": "model", "kind": "text", "choose": True},
            {"title": "reference", "kind": "text", "choose": True},
            {"title": "AR hits", "kind": "text", "choose": True},
            {"title": "cut, rate", "kind": "rate"},
            {"title": "share of tokens", "kind": "percent"},
            {"title": "perplexity of hits", "kind": "ppl"},
            {"title": "of other tokens", "kind": "ppl"},
            {"title": "gap of hits, nats", "kind": "nats"},
            {"title": "share of gap", "kind": "percent"},
            {"title": f"interval, {about['bootstrap']['level']:.0%}", "kind": "text"},
        ],
        "rows": rows,
    }


def _slices_table(summary: pl.DataFrame) -> dict[str, Any]:
    """Every row of the summary."""
    columns = {
        "model": "text",
        "reference": "text",
        "slice_kind": "text",
        "slice": "text",
        "cut": "int",
        "num_tokens": "int",
        "share_of_tokens": "percent",
        "loss_nats": "nats",
        "ppl": "ppl",
        "gap_nats": "nats",
        "share_of_gap": "percent",
    }
    words = {"slice_kind": "sliced by", "num_tokens": "tokens", "ppl": "perplexity"}
    chosen = ("model", "reference", "slice_kind", "cut")
    rows = [
        [
            *(
                plain(row[c]) if kind == "text" and row[c] else row[c]
                for c, kind in columns.items()
            ),
            _interval(row["low"], row["high"], "{:.1%}"),
            _interval(row["gap_low"], row["gap_high"], "{:+.4f}"),
        ]
        for row in summary.iter_rows(named=True)
    ]
    described = [
        {
            "title": words.get(name, name.replace("_", " ").replace(" nats", ", nats")),
            "kind": kind,
            "choose": name in chosen,
        }
        for name, kind in columns.items()
    ]
    intervals = [{"title": f"interval of {what}", "kind": "text"} for what in ("share", "gap")]
    return {"columns": [*described, *intervals], "rows": rows}


def _interval(low: float | None, high: float | None, form: str) -> str | None:
    return None if low is None or high is None else interval(low, high, form)


def _how_made(about: dict[str, Any]) -> list[tuple[str, list[str]]]:
    data, context = about["data"], about["context"]
    cut_short = "" if data["max_tokens"] is None else f" (of {data['split_num_tokens']:,})"
    contexts = "disjoint" if about["stride"] == context else f"one every {about['stride']:,} tokens"
    rows = [
        (
            "data",
            [
                f"{data['name']}, {data['split']} split: {data['num_documents']:,} documents, "
                f"{data['num_tokens']:,} tokens{cut_short}; checksum {data['checksum'][:16]}"
            ],
        ),
        (
            "contexts",
            [f"{context:,} tokens, {contexts}; documents {about['documents']}; BOS {about['bos']}"],
        ),
        (
            "models",
            [f"{m['name']}: {m['path']} ({', '.join(m['devices'])})" for m in about["models"]],
        ),
        (
            "intervals",
            [
                f"{about['bootstrap']['level']:.0%}, bootstrap over documents, "
                f"{about['bootstrap']['resamples']:,} resamples, seed {about['bootstrap']['seed']}"
            ],
        ),
    ]
    if about["pair_counts"] is not None:
        rows.insert(2, ("pair counts", [about["pair_counts"]["label"]]))
    facts = {"recallzoo": "recallzoo", "commit": "commit", "PyTorch": "torch", "Python": "python"}
    made = about["provenance"]
    return rows + [(title, [str(made[key])]) for title, key in facts.items() if made.get(key)]
