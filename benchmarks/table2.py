"""The paper's Table 2 on real text: which input-dependent layer closes BaseConv's gap to attention?

    python benchmarks/table2.py --data DATA --out runs/table1 --tokens 300e6
    python benchmarks/table2.py --data DATA --out runs/table1 --gpus 0 1 --minutes 9
    python benchmarks/table2.py --data DATA --out runs/table1 --seeds 0 1 2 \\
        --models base_conv attention base_conv_lookup base_conv_repeated
    python benchmarks/table2.py --data DATA --out runs/table1 --table-only

BaseConv; BaseConv with one special mixer at 1 of its 12 layers (8 %); attention. As table1.py, with
which it shares data, order, tokens, options and, in one OUT, the runs that both tables have.

    gap_closed     = (L_base - L) / (L_base - L_reference),  L in nats a token over all tokens
    ar_gap_closed  = the same over AR hits
    gap_closed_ppl = the same of perplexities, as the paper computes its 97.4 %

1 is attention's loss, 0 BaseConv's; above 1 is better than attention. Intervals are by bootstrap
over test documents, paired. base_conv_topk selects rows with a view of the whole sequence, so the
future takes part in its loss: its rows say causal: false, and are no measure of a language model.
Written to results/table2.json: a row a model, seed and cut, and what seeds do to each model;
and its charts beside it, of which OUT/metrics gives those over training.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import text_models
from text_models import CUT_RATES, REPOSITORY, Kept, interval, ratio

from recallzoo.evaluate.gap import gap_by_slice

SPECIAL = ("random", "sliding", "repeated", "topk", "learned", "lookup", "shift", "attention")
MODELS = ("base_conv", "attention", *(f"base_conv_{name}" for name in SPECIAL))
FORMULAS = {
    "gap_closed": "(L_base - L) / (L_base - L_reference), L in nats a token over all tokens",
    "ar_gap_closed": "the same over AR hits",
    "gap_closed_ppl": "the same of perplexities over all tokens",
}


def closed(one: Kept, base: Kept, reference: Kept, cut: int) -> dict[str, Any]:
    """Shares of the gap between base and reference that a model closes."""
    hit = one.slice_at("ar_hit", cut)
    gained, gap = base.losses - one.losses, base.losses - reference.losses
    perplexities = [math.exp(some.mean()[0]) for some in (base, one, reference)]
    whole = perplexities[0] - perplexities[2]
    return {
        "gap_closed": ratio(gained[0], gap[0]),
        "ar_gap_closed": ratio(gained[hit], gap[hit]),
        "gap_closed_ppl": (perplexities[0] - perplexities[1]) / whole if whole else None,
    }


def table(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of all models whose sums are there."""
    kept = text_models.read_sums(args.out / "sums", [*args.models, args.reference, args.base])
    rows, slices = [], []
    for (model, seed), one in kept.items():
        reference = text_models.of_seed(kept, args.reference, seed)
        base = text_models.of_seed(kept, args.base, seed)
        gap, share = gap_by_slice(one.losses - reference.losses, one.num_tokens, 0)
        compared = None if model == args.reference else gap
        slices += text_models.slice_rows(one, compared, ("frequency_repeated", "frequency_new"))
        for cut in one.about["cuts"]:
            hit = one.slice_at("ar_hit", cut["max_count"])
            row = {
                **text_models.row_at(one, cut),
                "causal": one.about["causal"],
                "special": one.about["special"],
                "share_of_layers": one.about["share_of_layers"],
                "reference_seed": reference.about["seed"],
                "base_seed": base.about["seed"],
            }
            if model != args.reference:
                row |= {
                    "gap_nats": interval(gap, 0),
                    "gap_nats_ar_hits": interval(gap, hit),
                    "share_of_gap": interval(share, hit),
                }
            if model not in (args.reference, args.base):
                row |= closed(one, base, reference, cut["max_count"])
            rows.append(row)
    return {
        "command": text_models.command_of("table2.py", args),
        "reference": args.reference,
        "base": args.base,
        "models": args.models,
        "formulas": FORMULAS,
        "bootstrap": "95 % intervals, 1,000 resamples of test documents",
        "rows": rows,
        "seeds": over_seeds(rows),
        "slices": slices,
    }


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, lowest and highest over a model's seeds, at each cut, where it has several."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["cut_rate"]), []).append(row)
    found = []
    for (model, rate), several in groups.items():
        if len(several) < 2:
            continue
        about: dict[str, Any] = {
            "model": model,
            "cut_rate": rate,
            "seeds": [row["seed"] for row in several],
        }
        for name in ("ppl_overall", "ppl_ar_hits", "ppl_other", "gap_closed", "ar_gap_closed"):
            values = [row[name] for row in several if row.get(name) is not None]
            values = [v["value"] if isinstance(v, dict) else v for v in values]
            if values and None not in values:
                mean = sum(values) / len(values)
                about[name] = {"mean": mean, "lowest": min(values), "highest": max(values)}
        found.append(about)
    return found


def show(found: dict[str, Any]) -> None:
    """Print the table at each cut."""
    for rate in CUT_RATES:
        rows = [row for row in found["rows"] if row["cut_rate"] == rate]
        if not rows:
            continue
        print(f"\ncut {rate:g} of training tokens ({rows[0]['cut']} occurrences)")
        print(
            f"{'model':22}{'seed':>5}{'params':>8}{'GFLOP':>7}{'ktok/s':>8}{'ppl':>8}"
            f"{'AR hits':>9}{'other':>8}   closed, AR closed"
        )
        for row in sorted(rows, key=lambda row: row["ppl_overall"]):
            shares = [row.get(name) for name in ("gap_closed", "ar_gap_closed")]
            texts = [
                "{value:.2f} ({low:.2f} to {high:.2f})".format(**one)
                for one in shares
                if one is not None and one["low"] is not None
            ]
            numbers = [row[n] or math.nan for n in ("ppl_overall", "ppl_ar_hits", "ppl_other")]
            flops = (row["flops_per_token"] or math.nan) / 1e9
            print(
                f"{row['model']:22}{row['seed']:5}{row['parameters'] / 1e6:7.1f}M{flops:7.3f}"
                f"{row['tokens_per_second'] / 1e3:8.0f}{numbers[0]:8.2f}{numbers[1]:9.2f}"
                f"{numbers[2]:8.2f}   {', '.join(texts)}"
                + ("" if row["causal"] else " looks ahead")
            )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text_models.add_options(parser, MODELS, [])
    parser.add_argument("--base", default="base_conv", help="whose gap is to be closed")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "results" / "table2.json")
    args, code = text_models.main(parser, argv)
    there = [list((args.out / "sums").glob(f"{m}-lr*.npz")) for m in (args.reference, args.base)]
    if all(there):
        text_models.publish(args, table(args), show)
    else:
        print(f"no table yet: {args.reference} and {args.base} are wanted first")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
