"""Language models trained on equal text and audited: what `table1.py` and `table2.py` share.

A job is a model, a learning rate and a seed: trained (`recallzoo pretrain`), exported and audited
(`recallzoo audit`) on the test split, in a process of its own, on a GPU of its own. Of each job
little is kept, so that jobs can be done on different days or machines and their results brought
together:

    OUT/sums/JOB.npz          loss and tokens by slice and document, and what the job was
    OUT/metrics/JOB.jsonl     the training, step by step, with its looks at the validation split

What is there is not done again. A model's learning rate is the one with the lowest validation
loss among the jobs that are there, and every row says which were tried.
"""

import argparse
import json
import math
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import children
import numpy as np
import torch

from recallzoo.evaluate.audit import audit
from recallzoo.evaluate.audit_options import AuditOptions
from recallzoo.evaluate.gap import LEVEL, Interval, bootstrap_sums
from recallzoo.evaluate.slices import SliceSums, partitions
from recallzoo.files import atomic_file, write_json, write_text
from recallzoo.mixers import mixer_class
from recallzoo.presets import Preset, preset, registry
from recallzoo.provenance import commit, environment
from recallzoo.text import open_data
from recallzoo.train._pretrain_log import METRICS
from recallzoo.train._pretrain_options import PretrainOptions
from recallzoo.train.pretrain import pretrain

REPOSITORY = Path(__file__).resolve().parents[1]
CUT_RATES = (1.25e-7, 1.25e-6, 1.25e-5, 1.25e-4)
TIME_IS_UP = 3
"""Exit code of a job that stopped for time, and goes on when it is given again."""
ROW = (
    "model",
    "preset",
    "parameters",
    "tokens",
    "learning_rate",
    "seed",
    "valid_loss_nats",
    "corpus",
    "context",
    "test_tokens",
    "pair_counts",
    "flops_per_token",
    "tokens_per_second",
    "train_seconds",
    "mfu",
    "peak_memory_gib",
    "commit",
    "device",
    "notes",
)
"""What rows of both tables say of a model."""


@dataclass(frozen=True)
class Job:
    """One training run and its audit."""

    model: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclass
class Kept:
    """What is kept of a job: its record, and tokens and losses of [slices, documents]."""

    about: dict[str, Any]
    num_tokens: np.ndarray
    losses: np.ndarray

    def mean(self) -> np.ndarray:
        """Loss in nats a token, by slice; NaN where a slice is empty."""
        totals = self.num_tokens.sum(1)
        empty = np.full(len(totals), np.nan)
        return np.divide(self.losses.sum(1), totals, out=empty, where=totals > 0)

    def slice_at(self, kind: str, cut: int | None) -> int:
        """The number of a slice, ar_hit or other at a cut."""
        return next(i for i, s in enumerate(self.about["slices"]) if s[0] == kind and s[4] == cut)


def add_options(parser: argparse.ArgumentParser, models: tuple[str, ...], check: list[str]) -> None:
    """The options of both tables."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder made by recallzoo prepare")
    add("--out", type=Path, required=True, help="folder for runs, audits and sums")
    add("--models", nargs="+", default=list(models), help="mixers at 70m, or names of presets")
    add("--reference", default="attention", help="what gaps are measured against")
    add("--tokens", type=float, default=300e6, help="training tokens of each model")
    add("--repeat-data", action="store_true", help="let --tokens exceed the data")
    add("--learning-rate", type=float, default=8e-4)
    add("--check", nargs="*", default=check, help="models tried at --learning-rates")
    add("--learning-rates", type=float, nargs="+", default=[4e-4, 8e-4, 1.6e-3])
    add("--seeds", type=int, nargs="+", default=[0], help="of initial weights and order of data")
    add("--context", type=int, default=1024)
    add("--global-batch", type=int, default=128)
    add("--micro-batch", type=int)
    add("--d-model", type=int, help="for all models alike")
    add("--num-layers", type=int, help="for all models alike")
    add("--split", default="test")
    add("--max-test-tokens", type=int, help="audit the first documents of the split alone")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--gpus", type=int, nargs="+", help="a job at a time on each; all there are if not given")
    add("--precision", default="bf16", choices=["bf16", "fp32"])
    add("--compile", default="auto", choices=["auto", "blocks", "model", "none"])
    add("--save-minutes", type=float, default=5.0)
    add("--minutes", type=float, help="stop after this time; the same command goes on")
    add("--table-only", action="store_true", help="make the table of the sums that are there")
    add("--job", nargs=3, metavar=("MODEL", "RATE", "SEED"), help="do this one here, and no table")


def main(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, int]:
    """Do the jobs that are left, if any are wanted. Returns the options and an exit code."""
    args = parser.parse_args(argv)
    args.started = time.monotonic()
    for model in args.models:
        preset_of(model)
    if args.job is not None:
        job = Job(args.job[0], float(args.job[1]), int(args.job[2]))
        raise SystemExit(0 if do_job(args, job) else TIME_IS_UP)
    children.end_with_children()
    return args, 0 if args.table_only else do_jobs(args, argv)


def preset_of(model: str) -> Preset:
    """A preset by name, or the one of a mixer at 70m. UnknownName if there is none."""
    return preset(model if model in registry else f"{model}-70m")


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """All jobs, those at a single learning rate first, as every model needs one."""
    first = [Job(model, args.learning_rate, args.seeds[0]) for model in args.models]
    every = [
        Job(model, rate, seed)
        for seed in args.seeds
        for model in args.models
        for rate in (args.learning_rates if model in args.check else [args.learning_rate])
    ]
    return [*(job for job in first if job in every), *(job for job in every if job not in first)]


def do_jobs(args: argparse.Namespace, argv: list[str]) -> int:
    """Do all jobs whose sums are not there, each in a child, one at a time on each GPU."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs_of(args):
        if (args.out / "sums" / f"{job.name}.npz").exists():
            print(f"{job.name}: done before")
        else:
            waiting.put(job)
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    gpus = [None] if on_cpu else args.gpus or list(range(torch.cuda.device_count()))
    open_data(args.data, verify=True)  # once, instead of in each job
    codes: list[int] = []

    def work(gpu: int | None) -> None:
        while (left := minutes_left(args)) is None or left > 0:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            codes.append(run_child(args, argv, job, gpu))

    threads = [threading.Thread(target=work, args=(gpu,), daemon=True) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not waiting.empty():
        codes.append(TIME_IS_UP)
    if TIME_IS_UP in codes:
        print("time is up; the same command goes on")
    return max((code for code in codes if code != TIME_IS_UP), default=0)


def minutes_left(args: argparse.Namespace) -> float | None:
    """Of the time given; None if none is."""
    if args.minutes is None:
        return None
    return max(0.0, args.minutes - (time.monotonic() - args.started) / 60)


def run_child(args: argparse.Namespace, argv: list[str], job: Job, gpu: int | None) -> int:
    """One job in a process of its own; its exit code."""
    words = [sys.executable, str(Path(sys.argv[0]).resolve()), *argv]
    words += ["--job", job.model, repr(job.learning_rate), str(job.seed)]
    if (left := minutes_left(args)) is not None:
        words += ["--minutes", str(left)]
    changed = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    print(f"{job.name}: started" + ("" if gpu is None else f" on GPU {gpu}"), flush=True)
    log = args.out / "logs" / f"{job.name}.log"
    end = children.run(words, log, {**os.environ, **changed}, math.inf)
    last = end.last_lines(12 if end.exit_code not in (0, TIME_IS_UP) else 1)
    print("\n".join([f"{job.name}: exit code {end.exit_code}, {end.seconds:.0f} s", *last]))
    sys.stdout.flush()
    return 1 if end.exit_code is None else end.exit_code


def do_job(args: argparse.Namespace, job: Job) -> bool:
    """Train, audit and keep. False if time ran out."""
    options = PretrainOptions(
        preset=preset_of(job.model).name,
        data=args.data,
        out=args.out / "runs" / job.name,
        d_model=args.d_model,
        num_layers=args.num_layers,
        context=args.context,
        global_batch=args.global_batch,
        micro_batch=args.micro_batch,
        tokens=args.tokens,
        repeat_data=args.repeat_data,
        learning_rate=job.learning_rate,
        seed=job.seed,
        device=args.device,
        precision=args.precision,
        compile=args.compile,
        cut_rates=CUT_RATES,
        save_minutes=args.save_minutes,
        keep_checkpoints=1,
        stop_after_minutes=minutes_left(args),
        verify_data=False,
    )
    summary = pretrain(options)
    if summary["status"] != "finished":
        return False
    if summary["valid"] is None:
        raise SystemExit("the data has no validation split, by which learning rates are chosen.")
    write_text(args.out / "metrics" / f"{job.name}.jsonl", (options.out / METRICS).read_text())
    keep_sums(args, job, summary, options.out / "model")
    shutil.rmtree(options.out / "checkpoints", ignore_errors=True)
    rate = summary["tokens_per_second"]
    loss = summary["valid"]["valid_loss_nats"]
    print(f"{job.name}: validation loss {loss:.4f} nats, {rate:,.0f} tokens/s")
    return True


def keep_sums(args: argparse.Namespace, job: Job, summary: dict[str, Any], model: Path) -> None:
    """Audit a trained model and keep its loss by slice and document."""
    context = summary["config"]["order"]["context"]
    found = audit(
        AuditOptions(
            models=(f"{job.model}={model}",),
            data=args.data,
            split=args.split,
            context=context,
            max_tokens=args.max_test_tokens,
            dtype="fp32",
            cut_rates=CUT_RATES,
            out=args.out / "audits" / f"{job.name}-{summary['hash']}",
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
    sums = SliceSums(ways, about["data"]["num_documents"], [job.model])
    sums.add(columns, {job.model: found.losses(job.model)["loss_nats"].to_numpy()})
    chosen = preset_of(job.model).resized(args.d_model, args.num_layers, context)
    mixers = chosen.model.layer_mixers()
    record = {
        **{name: summary[name] for name in ROW if name in summary},
        "model": job.model,
        "learning_rate": job.learning_rate,
        "seed": job.seed,
        "valid_loss_nats": summary["valid"]["valid_loss_nats"],
        "context": context,
        "corpus": about["data"]["name"],
        "split_checksum": about["data"]["checksum"],
        "order": summary["config"]["order"],
        "train_checksum": summary["config"]["data"]["train_checksum"],
        "test_tokens": about["num_tokens"],
        "cuts": about["cuts"],
        "pair_counts": about["pair_counts"]["label"],
        "commit": commit(),
        "versions": environment(),
        "notes": [*summary["notes"], *about["notes"]],
        "causal": all(getattr(mixer_class(one.name), "causal", True) for one in mixers),
        "special": mixers[chosen.special_layers[0]].name if chosen.special_layers else None,
        "share_of_layers": len(chosen.special_layers) / len(mixers),
        "slices": [[s.kind, s.label, s.low, s.high, s.cut] for s in sums.slices],
    }
    (args.out / "sums").mkdir(parents=True, exist_ok=True)
    with atomic_file(args.out / "sums" / f"{job.name}.npz") as path, path.open("wb") as file:
        np.savez_compressed(
            file,
            about=np.array(json.dumps(record)),
            num_tokens=sums.num_tokens.astype(np.float32),
            losses=sums.losses[job.model].astype(np.float32),
        )


def read_sums(folder: Path, models: list[str]) -> dict[tuple[str, int], Kept]:
    """By model and seed, the job of the learning rate with the lowest validation loss.

    SystemExit with a message if jobs were done on other data, in another order of it, or audited
    on other tokens.
    """
    found: dict[tuple[str, int], list[Kept]] = {}
    first: Kept | None = None
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as kept:
            tokens, losses = kept["num_tokens"].astype(float), kept["losses"].astype(float)
            one = Kept(json.loads(str(kept["about"])), tokens, losses)
        if one.about["model"] not in models:
            continue
        first = first or one
        for name in ("split_checksum", "train_checksum", "order", "test_tokens", "slices"):
            mine, others = (_without_seed(some.about[name]) for some in (one, first))
            if mine != others:
                raise SystemExit(
                    f"{path.stem} and {name_of(first)} in {folder} differ in {name}: one table "
                    f"is of models trained and audited alike. Move one of them away."
                )
        found.setdefault((one.about["model"], one.about["seed"]), []).append(one)
    best = {}
    for key, several in found.items():
        several.sort(key=lambda one: one.about["valid_loss_nats"])
        best[key] = several[0]
        several[0].about["tried_learning_rates"] = {
            f"{one.about['learning_rate']:g}": one.about["valid_loss_nats"] for one in several
        }
    return best


def name_of(kept: Kept) -> str:
    """The name of its job."""
    return Job(*(kept.about[name] for name in ("model", "learning_rate", "seed"))).name


def _without_seed(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "seed"} if isinstance(value, dict) else value


def of_seed(kept: dict[tuple[str, int], Kept], model: str, seed: int) -> Kept:
    """A model at a seed, or at its lowest if it was not trained at that one. SystemExit if it is
    not there at all."""
    seeds = sorted(of for name, of in kept if name == model)
    if not seeds:
        raise SystemExit(f"no sums of {model}, which others are compared with.")
    return kept[model, seed if seed in seeds else seeds[0]]


def row_at(kept: Kept, cut: dict[str, Any]) -> dict[str, Any]:
    """The columns of one model at one cut."""
    mean = kept.mean()
    hit, other = (kept.slice_at(kind, cut["max_count"]) for kind in ("ar_hit", "other"))
    return {
        **{name: kept.about.get(name) for name in ROW},
        "tried_learning_rates": kept.about["tried_learning_rates"],
        "cut_rate": cut["rate"],
        "cut": cut["max_count"],
        "share_of_tokens": cut["share_of_tokens"],
        "ppl_overall": ppl(mean[0]),
        "ppl_ar_hits": ppl(mean[hit]),
        "ppl_other": ppl(mean[other]),
    }


def slice_rows(
    kept: Kept, gap: Interval | None, kinds: tuple[str, ...] | None = None
) -> list[dict[str, Any]]:
    """Loss, and gap if there is one, of each slice that has tokens. All kinds but domains, if none
    are given."""
    mean, totals = kept.mean(), kept.num_tokens.sum(1)
    return [
        {
            "model": kept.about["model"],
            "seed": kept.about["seed"],
            "kind": kind,
            "slice": label,
            "low": low,
            "high": high,
            "cut": cut,
            "num_tokens": int(totals[i]),
            "loss_nats": float(mean[i]),
            "gap_nats": None if gap is None else interval(gap, i),
        }
        for i, (kind, label, low, high, cut) in enumerate(kept.about["slices"])
        if totals[i] and (kind != "domain" if kinds is None else kind in kinds)
    ]


def ppl(loss: float) -> float | None:
    """Perplexity; None for an empty slice."""
    return math.exp(loss) if math.isfinite(loss) else None


def interval(values: Any, place: int) -> dict[str, float | None]:
    """A value and the bounds of its interval, None where there is none."""
    return named(*(float(getattr(values, name)[place]) for name in ("value", "low", "high")))


def named(value: float, low: float, high: float) -> dict[str, float | None]:
    """The same of three numbers."""
    found = {"value": value, "low": low, "high": high}
    return {n: v if math.isfinite(v) else None for n, v in found.items()}


def ratio(above: np.ndarray, below: np.ndarray) -> dict[str, float | None]:
    """Of two sums over documents, with the interval of a paired bootstrap over documents."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = above.sum() / below.sum()
        if len(above) < 2:
            return named(value, math.nan, math.nan)
        drawn = bootstrap_sums(np.stack([above, below]))
        values = drawn[:, 0] / drawn[:, 1]
    values = values[np.isfinite(values)]
    if not len(values):
        return named(value, math.nan, math.nan)
    edge = (1 - LEVEL) / 2
    return named(value, *np.quantile(values, [edge, 1 - edge]))


def publish(
    args: argparse.Namespace, found: dict[str, Any], show: Callable[[dict[str, Any]], None]
) -> None:
    """Write a table, print it with `show`, and draw its charts beside it."""
    import table_charts  # here, so that machines that do a --job need no charts

    write_json(args.results, found)
    show(found)
    folder, stem = args.results.parent, args.results.stem
    charts = table_charts.draw(found, args.out / "metrics", folder, stem)
    print("\nwritten to", *[args.results, *charts])


def command_of(script: str, args: argparse.Namespace) -> str:
    """The command line, without places of this machine and what changes no result."""
    words = [f"python benchmarks/{script} --data DATA --out OUT"]
    for name in ("tokens", "context", "global_batch", "learning_rate", "learning_rates", "seeds",
                 "check", "models", "d_model", "num_layers"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value != []:
            text = " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}"
            words.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(words)
