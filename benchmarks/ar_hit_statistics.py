"""How many tokens of real text are AR hits, at several cuts, how far back, and in which domains.

    recallzoo prepare ... --out DIR
    python benchmarks/ar_hit_statistics.py --data DIR

Contexts are disjoint and packed, pairs stay within documents. Writes
results/ar_hits_<corpus>.json and two charts beside it. Intervals are 95 % by bootstrap over
documents.

A power law d^-a is fitted to the distances from xmin on, by maximum likelihood. A token can only
have distances that reach no further back than its document and its context, so each hit's law is
cut off there; without this the end of the context reads as a steeper law. KS is the largest
difference between the cumulative distribution seen and the fitted laws' mean.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recallzoo.files import write_json, write_text
from recallzoo.provenance import environment
from recallzoo.text import (
    PAPER_RATE,
    Labels,
    PairCounts,
    Split,
    label_pairs,
    max_count_from_rate,
    open_data,
)

PAPER_SHARE = 0.064
"""AR hits among the tokens of the Pile's validation split (arXiv:2312.04927, section 3.1)."""
CUTS = (0, 1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000)
XMINS = (1, 2, 5, 10, 20, 50)
CHARTED_XMIN = 20
RESAMPLES = 1_000


def label_split(split: Split, table: PairCounts, seq_len: int) -> dict[str, np.ndarray]:
    """Labels of every token of a split, with its document; padding left out."""
    contexts = split.contexts(seq_len)
    columns: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(contexts), 256):
        batch = contexts.batch(range(start, min(start + 256, len(contexts))))
        labels: Labels = label_pairs(
            batch.tokens, table, document_ids=batch.document_ids, look_up="repeats"
        )
        real = batch.document_ids >= 0
        for name in ("is_repeat", "distance", "occurrence", "train_count"):
            columns.setdefault(name, []).append(getattr(labels, name)[real])
        columns.setdefault("document", []).append(batch.document_ids[real])
        columns.setdefault("longest", []).append(longest_distance(batch.document_ids)[real])
    return {name: torch.cat(parts).numpy() for name, parts in columns.items()}


def longest_distance(document_ids: torch.Tensor) -> torch.Tensor:
    """For each token, how far back a pair of its document in its context could end."""
    position = torch.arange(document_ids.shape[1]).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return position - torch.where(starts, position, 0).cummax(dim=1).values - 1


def share(hit: np.ndarray, document: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Share of tokens that are hits, with its interval."""
    _, document = np.unique(document, return_inverse=True)
    tokens = np.bincount(document)
    hits = np.bincount(document, weights=hit, minlength=len(tokens))
    drawn = np.random.default_rng(seed).multinomial(
        len(tokens), np.full(len(tokens), 1 / len(tokens)), size=RESAMPLES
    )
    low, high = np.quantile(drawn @ hits / (drawn @ tokens), [0.025, 0.975])
    return {"share": round(float(hit.mean()), 5), "interval": [round(low, 5), round(high, 5)]}


def power_law(distance: np.ndarray, longest: np.ndarray, xmin: int) -> dict[str, Any]:
    """Exponent of d^-a on [xmin, longest of each hit], and how well it fits."""
    chosen = distance >= xmin
    distance, longest = distance[chosen], longest[chosen]
    support = np.arange(xmin, longest.max() + 1, dtype=float)
    logs, at = np.log(support), longest - xmin

    def moments(exponent: float) -> tuple[float, float]:
        weights = support**-exponent
        total = np.cumsum(weights)[at]
        mean = np.cumsum(weights * logs)[at] / total
        square = np.cumsum(weights * logs**2)[at] / total
        return float(mean.mean()), float((square - mean**2).sum())

    mean_log = float(np.log(distance).mean())
    low, high = -2.0, 10.0
    for _ in range(50):  # the model's mean log falls as its exponent grows
        middle = (low + high) / 2
        low, high = (middle, high) if moments(middle)[0] > mean_log else (low, middle)
    model = mean_law(low, longest, xmin)
    seen = np.bincount(distance - xmin, minlength=len(support)) / len(distance)
    return {
        "xmin": xmin,
        "num_distances": len(distance),
        "exponent": round(low, 4),
        "standard_error": round(moments(low)[1] ** -0.5, 4),
        "ks": round(float(np.abs(np.cumsum(model) - np.cumsum(seen)).max()), 4),
        "density": [
            [int(d), float(model[d - xmin] * len(distance))]
            for d in np.unique(np.geomspace(xmin, longest.max(), 40).astype(int))
        ],
    }


def mean_law(exponent: float, longest: np.ndarray, xmin: int) -> np.ndarray:
    """The distribution of distances if each hit's is the power law up to its own longest."""
    weights = np.arange(xmin, longest.max() + 1, dtype=float) ** -exponent
    share_of_each = np.bincount(
        longest - xmin, weights=1 / np.cumsum(weights)[longest - xmin], minlength=len(weights)
    )
    return weights * np.cumsum(share_of_each[::-1])[::-1] / len(longest)


def distances(hit: np.ndarray, labels: dict[str, np.ndarray], seq_len: int) -> dict[str, Any]:
    """Distribution of the distance to the pair's last occurrence, over hits."""
    distance, longest = labels["distance"][hit], labels["longest"][hit]
    if len(distance) < 100:
        return {"num_hits": len(distance), "why_nothing_more": "fewer than 100 hits"}
    edges = np.unique(np.geomspace(1, seq_len, 28).astype(int))
    counted, _ = np.histogram(distance, np.append(edges, seq_len + 1))
    widths = np.diff(np.append(edges, seq_len + 1))
    return {
        "num_hits": len(distance),
        "quantiles": {
            str(q): float(np.quantile(distance, q)) for q in (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
        },
        "below_100_tokens": round(float((distance < 100).mean()), 4),
        "density": [
            [int(edge), float(n / width / len(distance))]
            for edge, n, width in zip(edges, counted, widths, strict=True)
        ],
        "power_law": [power_law(distance, longest, xmin) for xmin in XMINS],
    }


def statistics(split: Split, table: PairCounts, seq_len: int) -> dict[str, Any]:
    """Everything about one split."""
    labels = label_split(split, table, seq_len)
    document, repeat, count = (labels[name] for name in ("document", "is_repeat", "train_count"))
    domain = np.asarray(split.document_domains)[document]
    paper_cut = max_count_from_rate(PAPER_RATE, table.num_tokens)
    cuts: list[tuple[str, int | None]] = [(f"rate {PAPER_RATE:g}", paper_cut)]
    cuts += [(str(cut), cut) for cut in CUTS] + [("none: every repeated pair", None)]
    shares, by_distance = [], {}
    for name, cut in cuts:
        hit = repeat if cut is None else repeat & (count <= cut)
        entry: dict[str, Any] = {"cut": name, "max_count": cut, **share(hit, document)}
        entry["rate"] = None if cut is None else cut / table.num_tokens
        entry["by_domain"] = {
            split.data.domains[i]: share(hit[domain == i], document[domain == i])
            for i in np.unique(domain)
        }
        shares.append(entry)
        if cut in (paper_cut, 30, 300, None):
            by_distance[name] = distances(hit, labels, seq_len)
    return {
        "num_tokens": len(document),
        "num_documents": split.num_documents,
        "tokens_by_domain": {
            split.data.domains[i]: int((domain == i).sum()) for i in np.unique(domain)
        },
        "repeated_by_occurrence": {
            str(n): round(float((labels["occurrence"][repeat] == n).mean()), 4) for n in range(1, 6)
        },
        "paper": {"share": PAPER_SHARE, "max_count": 1250, "num_train_tokens": 10**10},
        "shares": shares,
        "distances": by_distance,
    }


def charts(result: dict[str, Any], folder: Path, stem: str) -> None:
    """Distance distributions with their fits, and shares by domain, as SVG."""
    import altair
    import polars
    import vl_convert

    points, fits = [], []
    for cut, about in result["distances"].items():
        if "density" not in about:
            continue
        points += [{"cut": cut, "distance": d, "density": p} for d, p in about["density"] if p > 0]
        fit = next(one for one in about["power_law"] if one["xmin"] == CHARTED_XMIN)
        fits += [
            {"cut": cut, "distance": d, "density": n / about["num_hits"]} for d, n in fit["density"]
        ]
    cuts = list(result["distances"])
    log = altair.Scale(type="log", nice=False)
    colour = altair.Color("cut:N", title="cut (training occurrences)", sort=cuts)
    x = altair.X("distance:Q", scale=log, title="tokens back to the last occurrence")
    y = altair.Y("density:Q", scale=log, title="share of hits", axis=altair.Axis(format="e"))
    dots = altair.Chart(polars.DataFrame(points)).mark_point(filled=True)
    lines = altair.Chart(polars.DataFrame(fits)).mark_line(strokeDash=[4, 3])
    layers = [layer.encode(x=x, y=y, color=colour) for layer in (dots, lines)]
    title = f"{result['corpus']}: distance of AR hits, with power laws from {CHARTED_XMIN} on"
    distance_chart = altair.layer(*layers).properties(width=520, height=320, title=title)
    rows = [
        {"domain": domain, "cut": entry["cut"], "share": 100 * about["share"]}
        for entry in result["shares"]
        if entry["max_count"] in (result["shares"][0]["max_count"], 30, 300, None)
        for domain, about in {"all": entry, **entry["by_domain"]}.items()
    ]
    by_domain = (
        altair.Chart(polars.DataFrame(rows))
        .mark_bar()
        .encode(
            x=altair.X("domain:N", title=None, sort=None),
            xOffset=altair.XOffset("cut:N", sort=cuts),
            y=altair.Y("share:Q", title="AR hits, % of tokens"),
            color=colour,
        )
    )
    paper = (
        altair.Chart(polars.DataFrame({"share": [100 * PAPER_SHARE]}))
        .mark_rule(strokeDash=[4, 3])
        .encode(y="share:Q")
    )
    title = f"{result['corpus']}: AR hits by domain (dashed: 6.4 % of the Pile in the paper)"
    domain_chart = (by_domain + paper).properties(width=620, height=300, title=title)
    for name, chart in (("distance", distance_chart), ("domain", domain_chart)):
        svg = vl_convert.vegalite_to_svg(chart.to_json())
        write_text(folder / f"{stem}_{name}.svg", svg)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of recallzoo prepare")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seq-len", type=int, default=2_048)
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    data = open_data(options.data, verify=True)
    table = data.pair_counts(verify=True)
    result = {
        "command": f"python benchmarks/ar_hit_statistics.py --data {data.name} "
        f"--split {options.split} --seq-len {options.seq_len}",
        "environment": environment(),
        "corpus": f"{data.name}/{options.split}",
        "seq_len": options.seq_len,
        "contexts": "packed, disjoint; pairs within documents",
        "tokenizer": data.manifest["tokenizer"]["origin"],
        "pair_counts": table.describe(),
        **statistics(data.split(options.split), table, options.seq_len),
    }
    stem = f"ar_hits_{data.name}"
    write_json(options.out / f"{stem}.json", result)
    charts(result, options.out, stem)
    print(f"{result['corpus']}: {result['num_tokens']:,} tokens")
    for entry in result["shares"]:
        low, high = entry["interval"]
        print(f"  cut {entry['cut']:>26}  {entry['share']:7.2%}  [{low:.2%}, {high:.2%}]")
    for cut, about in result["distances"].items():
        for fit in about.get("power_law", []):
            print(
                f"  cut {cut}: below 100 tokens {about['below_100_tokens']:.1%}; from "
                f"{fit['xmin']} on exponent {fit['exponent']:.3f} (KS {fit['ks']:.3f})"
            )


if __name__ == "__main__":
    main()
