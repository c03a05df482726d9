"""Time and peak memory of drawing examples, each measurement in a process of its own.

    python benchmarks/task_speed.py                       100,000 examples of every task
    python benchmarks/task_speed.py --tasks mqar --repeats 9

Length 64, 8,192 words, as in the paper's Figure 2. `seconds` is the time of drawing alone, from
row numbers to tensors; `splits_seconds` that of a whole data set, training examples with 3,000 for
validation and 3,000 for the test, kept disjoint. `peak_mb` is the largest resident size of the
process, Python and PyTorch included; `idle_mb` what it held before. Medians, on one thread and on
two: where other work keeps the cores busy, two threads wait for each other, and one is faster.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from recallzoo.files import write_json
from recallzoo.provenance import environment
from recallzoo.tasks import Data, make_splits, registry, task

SEQ_LEN, VOCAB_SIZE = 64, 8192
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"task": name} for name in registry},
    "mqar, 16 pairs": {"task": "mqar", "num_pairs": 16},
    "mqar, random filler": {"task": "mqar", "filler": "random"},
}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(variant: str, num_examples: int, num_threads: int) -> dict[str, float]:
    """One measurement, in this process."""
    torch.set_num_threads(num_threads)
    options = {**VARIANTS[variant], "seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE}
    of = task(options.pop("task"), **options)
    of.sample(torch.arange(64), seed=0)
    idle = peak_mb()
    start, cpu_start = time.perf_counter(), time.process_time()
    batch = of.sample(torch.arange(num_examples), seed=0)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    assert batch.tokens.shape[:2] == (num_examples, SEQ_LEN)
    peak = peak_mb()
    del batch
    start = time.perf_counter()
    make_splits(Data.of(of, train=num_examples))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "splits_seconds": time.perf_counter() - start,
        "idle_mb": idle,
        "peak_mb": peak,
        "splits_peak_mb": peak_mb(),
    }


def in_fresh_process(variant: str, num_examples: int, num_threads: int) -> dict[str, float]:
    arguments = ["--measure", variant, "--examples", num_examples, "--threads", num_threads]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def medians(variant: str, options: argparse.Namespace, num_threads: int) -> dict[str, Any]:
    runs = [
        in_fresh_process(variant, options.examples, num_threads) for _ in range(options.repeats)
    ]
    return {
        **{name: round(statistics.median(r[name] for r in runs), 3) for name in runs[0]},
        "all_seconds": sorted(round(run["seconds"], 3) for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("results/task_speed_cpu.json"))
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.examples, options.threads[0])))
        return
    measured: dict[str, Any] = {}
    for variant in options.tasks:
        measured[variant] = {}
        for num_threads in options.threads:
            found = medians(variant, options, num_threads)
            measured[variant][f"threads={num_threads}"] = found
            print(f"{variant:<22} threads={num_threads} {json.dumps(found)}", flush=True)
    content = {
        "command": " ".join(["python", "benchmarks/task_speed.py", *sys.argv[1:]]),
        "environment": environment(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "num_examples": options.examples,
        "seq_len": SEQ_LEN,
        "vocab_size": VOCAB_SIZE,
        "tasks": measured,
    }
    write_json(options.out, content)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
