"""The paper's Table 1 on real text: six mixers on equal data in equal order, their loss by recall.

    python benchmarks/table1.py --data DATA --out runs/table1 --tokens 300e6
    python benchmarks/table1.py --data DATA --out runs/table1 --gpus 0 1 --minutes 9
    python benchmarks/table1.py --data DATA --out runs/table1 --table-only

Each model is trained, exported and audited on the test split, one at a time on each GPU; what is
finished is not done again, and a run that --minutes interrupts goes on when the same command is
given once more. Models of --check are trained at every one of --learning-rates, the others at
--learning-rate; the rate of a row has the lowest validation loss of those tried.

OUT/sums has what the table needs of each run, so models may be trained on different days or
machines: bring the sums together, and --table-only makes the table, with intervals by bootstrap
over documents. Written to results/table1.json: a row a model, seed and cut; and its charts beside
it, of which OUT/metrics gives those over training.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import text_models
from text_models import CUT_RATES, REPOSITORY, interval

from recallzoo.evaluate.gap import gap_by_slice

MODELS = ("attention", "long_conv", "h3", "hyena", "rwkv", "base_conv")
CHECK = ["attention", "hyena"]


def table(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of all models whose sums are there, against the reference."""
    kept = text_models.read_sums(args.out / "sums", [*args.models, args.reference])
    rows, slices = [], []
    for (model, seed), one in kept.items():
        reference = text_models.of_seed(kept, args.reference, seed)
        gap, share = gap_by_slice(one.losses - reference.losses, one.num_tokens, 0)
        is_reference = model == args.reference
        for cut in one.about["cuts"]:
            row = text_models.row_at(one, cut)
            if not is_reference:
                hit, other = (one.slice_at(kind, cut["max_count"]) for kind in ("ar_hit", "other"))
                row |= {
                    "reference_seed": reference.about["seed"],
                    "gap_nats": interval(gap, 0),
                    "gap_nats_ar_hits": interval(gap, hit),
                    "gap_nats_other": interval(gap, other),
                    "share_of_gap": interval(share, hit),
                }
            rows.append(row)
        compared = None if is_reference else gap
        slices += text_models.slice_rows(one, compared)
    return {
        "command": text_models.command_of("table1.py", args),
        "reference": args.reference,
        "models": args.models,
        "share_of_gap": "sum over AR hits of (loss - reference loss) / the same sum over all",
        "bootstrap": "95 % intervals, 1,000 resamples of test documents",
        "rows": rows,
        "slices": slices,
    }


def show(found: dict[str, Any]) -> None:
    """Print the table at each cut."""
    for rate in CUT_RATES:
        rows = [row for row in found["rows"] if row["cut_rate"] == rate]
        if not rows:
            continue
        hits = f"{100 * rows[0]['share_of_tokens']:.1f} % of tokens are AR hits"
        print(f"\ncut {rate:g} of training tokens ({rows[0]['cut']} occurrences; {hits})")
        print(f"{'model':16}{'params':>8}{'ppl':>9}{'AR hits':>9}{'other':>9}   share of gap")
        for row in sorted(rows, key=lambda row: row["ppl_overall"]):
            share = row.get("share_of_gap")
            text = ""
            if share is not None and share["low"] is not None:
                text = "{value:.2f} ({low:.2f} to {high:.2f})".format(**share)
            numbers = [row[n] or math.nan for n in ("ppl_overall", "ppl_ar_hits", "ppl_other")]
            print(
                f"{row['model']:16}{row['parameters'] / 1e6:7.1f}M"
                + "".join(f"{n:9.2f}" for n in numbers)
                + f"   {text}"
            )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text_models.add_options(parser, MODELS, CHECK)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "results" / "table1.json")
    args, code = text_models.main(parser, argv)
    if list((args.out / "sums").glob(f"{args.reference}-lr*.npz")):
        text_models.publish(args, table(args), show)
    else:
        print(f"no table yet: {args.reference} is not finished")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
