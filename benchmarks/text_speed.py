"""Speed of labelling AR hits and of counting pairs, beside a loop over dictionaries.

    python benchmarks/text_speed.py                               on the CPU
    python benchmarks/text_speed.py --data DIR                    labels of real text too
    python benchmarks/text_speed.py --device cuda                 labelling on the GPU
    python benchmarks/text_speed.py --count 1e7 1e8 1e9           larger counts (22 bytes a token)

Synthetic text is Zipfian and independent from token to token: it repeats fewer pairs in a
context and has far more distinct pairs than real text, so counting it is the harder case.
Nothing is timed before labels and counts have equalled the loop's. Medians of several runs;
the first one is not counted. Needs numpy and torch alone.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recallzoo.files import write_json
from recallzoo.provenance import environment
from recallzoo.text import PairCounts, TokenData, label_ar_hits, label_pairs, open_data
from recallzoo.text._arrays import NpyWriter
from recallzoo.text._checksums import describe_file, write_sealed_json
from recallzoo.text.counting import count_pairs
from recallzoo.text.data import FORMAT, FORMAT_VERSION, MANIFEST

VOCAB_SIZE = 16_384
SEQ_LEN = 2_048
DOCUMENT_TOKENS = 1_500
SHARD_DOCUMENTS = 40_000
LEVELS = 1 << 20


def zipf_tokens(num_tokens: int, seed: int) -> np.ndarray:
    """Independent ids, id i with probability in proportion to 1 / (i + 1), in 2^20 levels."""
    cumulative = np.cumsum(1 / np.arange(1, VOCAB_SIZE + 1))
    levels = (np.arange(LEVELS) + 0.5) / LEVELS * cumulative[-1]
    quantiles = np.searchsorted(cumulative, levels).astype(np.uint16)
    return quantiles[np.random.default_rng(seed).integers(0, LEVELS, num_tokens, dtype=np.int32)]


def zipf_data(folder: Path, num_tokens: int) -> TokenData:
    """A data folder of synthetic text, as `prepare` would leave it."""
    train = folder / "train"
    train.mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    num_documents = num_tokens // DOCUMENT_TOKENS
    shards = []
    for number, first in enumerate(range(0, num_documents, SHARD_DOCUMENTS)):
        tokens = min(SHARD_DOCUMENTS, num_documents - first) * DOCUMENT_TOKENS
        name = f"tokens-{number:05d}.npy"
        with NpyWriter(train / name, np.dtype(np.uint16)) as file:
            file.append(zipf_tokens(tokens, number))
        shards.append({"file": name, "num_tokens": tokens})
    offsets = np.arange(num_documents + 1, dtype=np.int64) * DOCUMENT_TOKENS
    with NpyWriter(train / "document_offsets.npy", offsets.dtype) as file:
        file.append(offsets)
    names = [*(shard["file"] for shard in shards), "document_offsets.npy"]
    boundary = {"position": "none", "token": None, "id": None}
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": "zipf",
        "dtype": "uint16",
        "tokenizer": {"hash": "zipf", "vocab_size": VOCAB_SIZE, "boundary": boundary, "files": {}},
        "domains": [],
        "splits": {
            "train": {
                "num_documents": num_documents,
                "num_tokens": int(offsets[-1]),
                "shards": shards,
                "files": {name: describe_file(train / name) for name in names},
            }
        },
    }
    write_sealed_json(folder / MANIFEST, about)
    return open_data(folder)


def loop_counts(documents: list[list[int]]) -> Counter[tuple[int, int]]:
    """Counting as one would write it down."""
    counts: Counter[tuple[int, int]] = Counter()
    for tokens in documents:
        for pair in itertools.pairwise(tokens):
            counts[pair] += 1
    return counts


def loop_hits(
    rows: list[list[int]], train: dict[tuple[int, int], int], most: int
) -> list[list[bool]]:
    """Labelling as one would write it down."""
    hits = []
    for tokens in rows:
        seen: set[tuple[int, int]] = set()
        row = [False]
        for pair in itertools.pairwise(tokens):
            row.append(pair in seen and train.get(pair, 0) <= most)
            seen.add(pair)
        hits.append(row)
    return hits


Seconds = list[tuple[float, float]]
"""Of each run: by the clock, and of all CPUs together."""


def timed(work: Callable[[], Any], repeats: int, device: str = "cpu") -> Seconds:
    """Seconds of each run after a first that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start, cpu = time.perf_counter(), time.process_time()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start, time.process_time() - cpu))
    return seconds[1:]


def speed(seconds: Seconds, num_tokens: int) -> dict[str, Any]:
    clock, cpu = ([one[i] for one in seconds] for i in (0, 1))
    return {
        "tokens": num_tokens,
        "seconds": [round(one, 5) for one in clock],
        "cpu_seconds": [round(one, 5) for one in cpu],
        "million_tokens_per_second": round(num_tokens / statistics.median(clock) / 1e6, 3),
    }


def labelling(
    rows: torch.Tensor, table: PairCounts, max_count: int, repeats: int, device: str
) -> dict[str, Any]:
    """Speeds of the labels of `rows`, after comparing some with the loop's."""
    few = rows[:64]
    train = table.as_dict()
    expected = loop_hits(few.tolist(), train, max_count)
    loop = speed(timed(lambda: loop_hits(few.tolist(), train, max_count), repeats), few.numel())
    del train
    rows = rows.to(device)
    table.to(device)
    got = label_ar_hits(rows, table, max_count)
    assert got[:64].tolist() == expected, "labels differ from the loop's: nothing was timed"
    cases: dict[str, Callable[[], Any]] = {
        "label_ar_hits": lambda: label_ar_hits(rows, table, max_count),
        "label_pairs without counts": lambda: label_pairs(rows),
        "label_pairs, counts of repeats": lambda: label_pairs(rows, table, look_up="repeats"),
        "label_pairs, counts of all pairs": lambda: label_pairs(rows, table),
    }
    repeated = label_pairs(rows).is_repeat.float().mean().item()
    out: dict[str, Any] = {
        "contexts": list(rows.shape),
        "repeated_pairs": round(repeated, 4),
        "distinct_pairs_in_table": len(table.pairs),
        "dictionary loop": loop,
    }
    for name, work in cases.items():
        out[name] = speed(timed(work, repeats, device), rows.numel())
        ratio = out[name]["million_tokens_per_second"] / loop["million_tokens_per_second"]
        out[name]["times_the_loop"] = round(ratio, 1)
        print(
            f"{name}: {out[name]['million_tokens_per_second']:.1f} M tokens/s, {ratio:.0f} x loop"
        )
    return out


def counting(sizes: list[int], memory_mib: float, repeats: int, scratch: Path) -> dict[str, Any]:
    """Speed and peak memory of counting at several sizes, after one compared with the loop."""
    small = zipf_data(scratch / "small", 3_000_000)
    train = small.split("train")
    documents = [train.document(i).tolist() for i in range(train.num_documents)]
    expected = loop_counts(documents)
    loop = speed(timed(lambda: loop_counts(documents), 1), train.num_tokens)
    table = count_pairs(small, memory_mib=8, progress=False)
    assert table.as_dict() == expected, "counts differ from the loop's: nothing was timed"
    del documents, expected
    out: dict[str, Any] = {"memory_mib": memory_mib, "dictionary loop": loop, "sizes": []}
    for size in sizes:
        data = zipf_data(scratch / str(size), size)
        num_tokens = data.split("train").num_tokens
        runs = [_one_count(data, memory_mib, scratch) for _ in range(repeats if size < 5e8 else 1)]
        entry = speed([(run["seconds"], run["cpu_seconds"]) for run in runs], num_tokens)
        entry["distinct_pairs"] = runs[0]["distinct_pairs"]
        entry["peak_memory_beyond_process_mib"] = max(run["peak_mib"] for run in runs)
        ratio = entry["million_tokens_per_second"] / loop["million_tokens_per_second"]
        entry["times_the_loop"] = round(ratio, 1)
        out["sizes"].append(entry)
        print(f"counting {num_tokens:,}: {json.dumps(entry)}")
        _remove(data.folder)
    if len(sizes) > 1:
        tokens = np.log([entry["tokens"] for entry in out["sizes"]])
        seconds = np.log([statistics.median(entry["seconds"]) for entry in out["sizes"]])
        out["exponent_of_seconds_in_tokens"] = round(float(np.polyfit(tokens, seconds, 1)[0]), 3)
    return out


def _one_count(data: TokenData, memory_mib: float, scratch: Path) -> dict[str, Any]:
    """In a process of its own, so that its peak memory is its own."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
        before = _peak_mib()
        start, cpu = time.perf_counter(), time.process_time()
        table = count_pairs(data, folder=scratch / "table", memory_mib=memory_mib, progress=False)
        seconds = time.perf_counter() - start
        told = {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - cpu,
            "distinct_pairs": len(table.pairs),
            "peak_mib": round(_peak_mib() - before, 1),
        }
        os.write(write_end, json.dumps(told).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    _remove(scratch / "table")
    return json.loads(told)


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path, help="prepared text to label as well")
    parser.add_argument("--count", type=float, nargs="*", default=[1e7, 3e7, 1e8])
    parser.add_argument("--memory-mib", type=float, default=1024)
    parser.add_argument("--rows", type=int, help="contexts of 2,048 tokens to label")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder for synthetic text")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = options.rows or (4_096 if options.device == "cpu" else 65_536)
    result: dict[str, Any] = {"command": _command(options), "environment": environment()}
    result["load_average"] = os.getloadavg()
    result["cpus"] = len(os.sched_getaffinity(0))
    if options.device == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        train = zipf_data(folder / "train", 30_000_000)
        table = count_pairs(train, progress=False)
        zipf = torch.from_numpy(zipf_tokens(rows * SEQ_LEN, 10**6)).long().view(rows, SEQ_LEN)
        result["labels, synthetic"] = labelling(zipf, table, 3, options.repeats, options.device)
        if options.data:
            data = open_data(options.data)
            contexts = data.split("train").contexts(SEQ_LEN, partial="drop")
            some = range(min(rows, len(contexts)))
            real = torch.from_numpy(
                data.split("train").read(0, len(some) * SEQ_LEN).astype(np.int64)
            ).view(-1, SEQ_LEN)
            result[f"labels, {data.name}"] = labelling(
                real, data.pair_counts(), 30, options.repeats, options.device
            )
        if options.device == "cpu" and options.count:
            sizes = [int(size) for size in options.count]
            result["counting"] = counting(
                sizes, options.memory_mib, min(3, options.repeats), folder
            )
    name = "cpu" if options.device == "cpu" else _short(torch.cuda.get_device_name())
    write_json(options.out or Path("results") / f"text_speed_{name}.json", result)


def _command(options: argparse.Namespace) -> str:
    """The command that repeats this, with names in place of this machine's folders."""
    words = ["python benchmarks/text_speed.py", f"--device {options.device}"]
    words += [f"--data {options.data.name}"] if options.data else []
    words += ["--count", *(f"{size:g}" for size in options.count)] if options.count else []
    words += [f"--memory-mib {options.memory_mib:g}", f"--repeats {options.repeats}"]
    return " ".join(words)


def _short(gpu: str) -> str:
    """ "NVIDIA H200" -> "h200"."""
    return gpu.lower().replace("nvidia", "").split()[0]


if __name__ == "__main__":
    main()
