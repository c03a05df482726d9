"""The paper's Table 1 on real text: six mixers on equal data in equal order, their loss by recall.

    python benchmarks/table1.py --data DATA --out runs/table1 --tokens 300e6
    python benchmarks/table1.py --data DATA --out runs/table1 --models attention hyena --minutes 9
    python benchmarks/table1.py --data DATA --out runs/table1 --table-only

Each model is trained (`recallzoo pretrain`), exported and audited (`recallzoo audit`) on the test
split, one after another; what is finished is not done again, and a run that --minutes interrupts
goes on when the same command is given once more. Learning rates of --check models are tried in
turn and chosen by validation loss; the others use --learning-rate.

What the table needs of an audit is kept in OUT/sums/MODEL.npz: loss and tokens by slice and
document. So models may be trained on different days or machines: bring the sums together, and
--table-only makes the table, with intervals by bootstrap over documents. Written to
results/table1.json: a row a model and cut.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from recallzoo.evaluate.audit import audit
from recallzoo.evaluate.audit_options import AuditOptions
from recallzoo.evaluate.gap import gap_by_slice
from recallzoo.evaluate.slices import SliceSums, partitions
from recallzoo.files import atomic_file, write_json
from recallzoo.presets import preset, registry
from recallzoo.provenance import commit
from recallzoo.text import open_data
from recallzoo.train._pretrain_options import PretrainOptions
from recallzoo.train.pretrain import pretrain

MODELS = ("attention", "long_conv", "h3", "hyena", "rwkv", "base_conv")
CUT_RATES = (1.25e-7, 1.25e-6, 1.25e-5, 1.25e-4)
CHECK = ["attention", "hyena"]
REPOSITORY = Path(__file__).resolve().parents[1]


def run_options(args: argparse.Namespace, model: str, rate: float) -> PretrainOptions:
    """One training run. `stop_after_minutes` is what is left of the time given."""
    left = None
    if args.minutes is not None:
        left = max(0.0, args.minutes - (time.monotonic() - args.started) / 60)
    return PretrainOptions(
        preset=model if model in registry else f"{model}-70m",
        data=args.data,
        out=args.out / f"{model}-lr{rate:g}",
        d_model=args.d_model,
        num_layers=args.num_layers,
        context=args.context,
        global_batch=args.global_batch,
        micro_batch=args.micro_batch,
        tokens=args.tokens,
        learning_rate=rate,
        seed=args.seed,
        device=args.device,
        precision=args.precision,
        compile=args.compile,
        cut_rates=CUT_RATES,
        save_minutes=args.save_minutes,
        keep_checkpoints=1,
        stop_after_minutes=left,
        verify_data=False,
    )


def train(args: argparse.Namespace, model: str) -> dict[str, Any] | None:
    """Train a model at its learning rates; the best one's summary, None if time ran out."""
    rates = args.learning_rates if model in args.check else [args.learning_rate]
    summaries = []
    for rate in rates:
        options = run_options(args, model, rate)
        summary = pretrain(options)
        if summary["status"] != "finished":
            return None
        summaries.append({**summary, "folder": str(options.out)})
    best = min(summaries, key=lambda one: one["valid"]["valid_loss_nats"])
    best["tried"] = {
        one["config"]["optimizer"]["learning_rate"]: one["valid"]["valid_loss_nats"]
        for one in summaries
    }
    return best


def keep_sums(args: argparse.Namespace, model: str, summary: dict[str, Any]) -> None:
    """Audit a trained model and keep its loss by slice and document."""
    context = summary["config"]["order"]["context"]
    folder = args.out / "audits" / f"{model}-{summary['hash']}"
    found = audit(
        AuditOptions(
            models=(f"{model}={summary['folder']}/model",),
            data=args.data,
            split=args.split,
            context=context,
            max_tokens=args.max_test_tokens,
            dtype="fp32",
            cut_rates=CUT_RATES,
            out=folder,
            device=args.device,
            batch_size=16,
            passages=0,
        )
    )
    split = open_data(args.data).split(args.split)
    about = found.about
    columns = {name: series.to_numpy() for name, series in found.tokens().to_dict().items()}
    domains = np.asarray(split.document_domains)
    columns["domain"] = domains[columns["document"]]
    counted = np.bincount(columns["domain"], minlength=len(split.data.domains))
    ways = partitions([c["max_count"] for c in about["cuts"]], split.data.domains, counted.tolist())
    sums = SliceSums(ways, about["data"]["num_documents"], [model])
    sums.add(columns, {model: found.losses(model)["loss_nats"].to_numpy()})
    record = {
        "model": model,
        "parameters": summary["parameters"],
        "tokens": summary["tokens"],
        "learning_rate": summary["config"]["optimizer"]["learning_rate"],
        "tried_learning_rates": summary["tried"],
        "seed": args.seed,
        "context": context,
        "corpus": about["data"]["name"],
        "split_checksum": about["data"]["checksum"],
        "order": summary["config"]["order"],
        "train_checksum": summary["config"]["data"]["train_checksum"],
        "test_tokens": about["num_tokens"],
        "cuts": about["cuts"],
        "pair_counts": about["pair_counts"]["label"],
        "tokens_per_second": summary["tokens_per_second"],
        "mfu": summary["mfu"],
        "peak_memory_gib": summary["peak_memory_gib"],
        "device": summary["device"],
        "commit": commit(),
        "notes": [*summary["notes"], *about["notes"]],
        "slices": [[s.kind, s.label, s.low, s.high, s.cut] for s in sums.slices],
    }
    (args.out / "sums").mkdir(parents=True, exist_ok=True)
    with atomic_file(args.out / "sums" / f"{model}.npz") as path, path.open("wb") as file:
        np.savez_compressed(
            file,
            about=np.array(json.dumps(record)),
            num_tokens=sums.num_tokens.astype(np.float32),
            losses=sums.losses[model].astype(np.float32),
        )


def read_sums(path: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """What `keep_sums` kept: the record, tokens and losses, [slices, documents]."""
    with np.load(path, allow_pickle=False) as kept:
        tokens, losses = kept["num_tokens"].astype(float), kept["losses"].astype(float)
        return json.loads(str(kept["about"])), tokens, losses


def table(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of all models whose sums are there, against the reference."""
    kept = {path.stem: read_sums(path) for path in sorted((args.out / "sums").glob("*.npz"))}
    if args.reference not in kept:
        raise SystemExit(f"no sums of the reference {args.reference} in {args.out / 'sums'}.")
    reference, _, reference_losses = kept[args.reference]
    rows, slices = [], []
    for about, tokens, losses in kept.values():
        for name in ("split_checksum", "train_checksum", "order", "test_tokens", "slices"):
            if about[name] != reference[name]:
                raise SystemExit(f"{about['model']} and {args.reference} differ in {name}.")
        gap, share = gap_by_slice(losses - reference_losses, tokens, 0)
        totals = tokens.sum(1)
        mean = np.divide(losses.sum(1), totals, out=np.full(len(totals), np.nan), where=totals > 0)
        is_reference = about["model"] == args.reference

        def at(kind: str, cut: int | None, about: dict[str, Any] = about) -> int:
            return next(i for i, s in enumerate(about["slices"]) if s[0] == kind and s[4] == cut)

        for cut in about["cuts"]:
            hit, other = at("ar_hit", cut["max_count"]), at("other", cut["max_count"])
            row = {name: about[name] for name in _ROW}
            row |= {
                "cut_rate": cut["rate"],
                "cut": cut["max_count"],
                "share_of_tokens": cut["share_of_tokens"],
                "ppl_overall": _ppl(mean[0]),
                "ppl_ar_hits": _ppl(mean[hit]),
                "ppl_other": _ppl(mean[other]),
            }
            if not is_reference:
                row |= {
                    "gap_nats": _interval(gap, 0),
                    "gap_nats_ar_hits": _interval(gap, hit),
                    "gap_nats_other": _interval(gap, other),
                    "share_of_gap": _interval(share, hit),
                }
            rows.append(row)
        for i, (kind, label, low, high, cut) in enumerate(about["slices"]):
            if totals[i] and kind != "domain":
                slices.append(
                    {
                        "model": about["model"],
                        "kind": kind,
                        "slice": label,
                        "low": low,
                        "high": high,
                        "cut": cut,
                        "num_tokens": int(totals[i]),
                        "loss_nats": float(mean[i]),
                        "gap_nats": None if is_reference else _interval(gap, i),
                    }
                )
    return {
        "command": args.command,
        "reference": args.reference,
        "bootstrap": "95 % intervals, 1,000 resamples of test documents; one training seed",
        "rows": rows,
        "slices": slices,
    }


_ROW = (
    "model",
    "parameters",
    "tokens",
    "learning_rate",
    "tried_learning_rates",
    "seed",
    "corpus",
    "context",
    "test_tokens",
    "pair_counts",
    "tokens_per_second",
    "mfu",
    "peak_memory_gib",
    "commit",
    "device",
    "notes",
)


def _ppl(loss: float) -> float | None:
    return math.exp(loss) if math.isfinite(loss) else None


def _interval(values: Any, place: int) -> dict[str, float | None]:
    found = {n: float(getattr(values, n)[place]) for n in ("value", "low", "high")}
    return {n: v if math.isfinite(v) else None for n, v in found.items()}


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder made by recallzoo prepare")
    add("--out", type=Path, required=True, help="folder for runs, audits and sums")
    add("--models", nargs="+", default=list(MODELS), help="mixers at 70m, or names of presets")
    add("--reference", default="attention", help="what gaps are measured against")
    add("--tokens", type=float, default=300e6, help="training tokens of each model")
    add("--learning-rate", type=float, default=8e-4)
    add("--check", nargs="*", default=CHECK, help="tried at --learning-rates")
    add("--learning-rates", type=float, nargs="+", default=[4e-4, 8e-4, 1.6e-3])
    add("--context", type=int, default=1024)
    add("--global-batch", type=int, default=128)
    add("--micro-batch", type=int)
    add("--d-model", type=int, help="for all models alike")
    add("--num-layers", type=int, help="for all models alike")
    add("--seed", type=int, default=0)
    add("--split", default="test")
    add("--max-test-tokens", type=int, help="audit the first documents of the split alone")
    add("--device", default="auto")
    add("--precision", default="bf16", choices=["bf16", "fp32"])
    add("--compile", default="auto", choices=["auto", "blocks", "model", "none"])
    add("--save-minutes", type=float, default=5.0)
    add("--minutes", type=float, help="stop after this time; the same command goes on")
    add("--table-only", action="store_true", help="make the table of the sums that are there")
    add("--results", type=Path, default=REPOSITORY / "results" / "table1.json")
    args = parser.parse_args()
    unknown = sorted(set(args.check) - set(args.models)) if args.check != CHECK else []
    if unknown:
        parser.error(f"--check names {', '.join(unknown)}, which --models does not.")
    args.started = time.monotonic()
    args.command = "python benchmarks/table1.py" + "".join(
        f" --{name.replace('_', '-')} {value}"
        for name, value in vars(args).items()
        if name in ("tokens", "context", "global_batch", "learning_rates", "check", "seed")
    )
    for model in args.models:
        preset(model if model in registry else f"{model}-70m")
    for model in () if args.table_only else args.models:
        done = args.out / "sums" / f"{model}.npz"
        if done.exists():
            print(f"{model}: done before")
            continue
        summary = train(args, model)
        if summary is None:
            print(f"{model}: time is up; the same command goes on")
            raise SystemExit(0)
        write_json(args.out / "summaries" / f"{model}.json", summary)
        keep_sums(args, model, summary)
        print(f"{model}: validation loss {summary['valid']['valid_loss_nats']:.4f} nats")
    if (args.out / "sums" / f"{args.reference}.npz").exists():
        found = table(args)
        write_json(args.results, found)
        show(found)
        print(f"\nwritten to {args.results}")


if __name__ == "__main__":
    main()
