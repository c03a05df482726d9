"""Counting adjacent token pairs, exactly, in bounded memory.

    chunk of tokens -> pairs as integers -> sort -> (pair, count) run on disk     many at once
    range of pairs  -> that slice of every run -> sort -> add up -> table         many at once

A chunk's pairs are two ids side by side in one integer, sorted in place; a run is its distinct
pairs with their counts, packed into 64 bits as `pair << count_bits | count`, ascending. Ranges
are cut by regular samples of all runs so that none exceeds its share of the memory. A pair's
second token decides its chunk, so pairs over a chunk's edge are counted, once; pairs over a
document's edge are dropped.

Finished runs stay on disk until the table is whole: a killed count continues with them. With
`executor="ray"` the same two functions run as Ray tasks, on machines that share the data
folder; the table is the same, byte for byte.
"""

import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt64

from recallzoo.cluster import connected
from recallzoo.errors import InvalidConfig, StoreError, UserError
from recallzoo.files import (
    atomic_file,
    atomic_folder,
    exclusive,
    read_json,
    remove_leftovers,
    write_json,
)
from recallzoo.text._arrays import NpyWriter, npy_layout
from recallzoo.text._checksums import describe_file, write_sealed_json
from recallzoo.text._progress import bar
from recallzoo.text.data import Split, TokenData
from recallzoo.text.pair_counts import FORMAT, FORMAT_VERSION, MANIFEST, PairCounts

Executor = Literal["threads", "ray"]
_LOCK = "lock"

_CHUNK_BYTES_PER_TOKEN = 88
"""Ids, pairs and, where all differ, their run are 33 bytes; resident memory, which includes
what the allocator keeps between arrays, was measured at up to 80."""
_MERGE_BYTES_PER_ENTRY = 88
"""35 bytes, and those of the range before that is being written; resident up to 80."""
_MOST_TOKENS_A_CHUNK = 1 << 24
_LEAST_TOKENS_A_CHUNK = 1 << 10


def count_pairs(
    data: TokenData,
    *,
    split: str = "train",
    folder: str | Path | None = None,
    memory_mib: float = 1024,
    workers: int | None = None,
    executor: Executor = "threads",
    progress: bool = True,
) -> PairCounts:
    """Count the adjacent pairs of a split into a table on disk, and open it.

    folder      where the table goes; `DATA/pair_counts` for the training split. One that is
                there and belongs to the same tokens is opened instead.
    memory_mib  bound on what all workers together hold, besides the process itself (Python and
                its libraries, some 300 MiB). The result does not depend on it.
    workers     threads, or Ray tasks at once; the number of CPUs by default.

    Boundary tokens are tokens of their document, so the pair of a document's last word and
    its end is counted; no pair joins two documents. Needs up to 8 bytes of disk a token.

    Raises UserError for memory too small for the corpus and while another process counts into
    the same folder, StoreError for a full disk or runs that do not add up. What a killed or failed
    count had finished is kept and used.
    """
    folder = Path(folder) if folder is not None else data.folder / f"pair_counts{_suffix(split)}"
    tokens = data.split(split)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if executor not in ("threads", "ray"):
        raise InvalidConfig(f"executor is 'threads' or 'ray', got {executor!r}.")
    if workers < 1 or memory_mib <= 0:
        raise InvalidConfig(f"workers={workers} and memory_mib={memory_mib} must be positive.")
    if not folder.exists():
        plan = _Plan.make(data, tokens, memory_mib, workers)
        work = folder.with_name(f"{folder.name}.work")
        busy = (
            f"another process is counting pairs into {folder} right now. Wait for it, or choose "
            f"another folder."
        )
        with exclusive(work / _LOCK, busy):
            if not folder.exists():  # it may have been made just before the lock was free
                _count(data, tokens, plan, folder, work, workers, executor, progress)
            shutil.rmtree(work)
    return _same_tokens(PairCounts.open(folder), folder, data, tokens)


def _count(
    data: TokenData,
    tokens: Split,
    plan: "_Plan",
    folder: Path,
    work: Path,
    workers: int,
    executor: Executor,
    progress: bool,
) -> None:
    _begin(work, plan)
    with _mapper(executor, workers) as in_order:
        chunks = _chunks(tokens, plan, work)
        missing = [chunk for chunk in chunks if not chunk.run.exists()]
        counted = in_order(_count_chunk, missing)
        for _ in bar(
            counted, what="counting pairs", unit="chunk", progress=progress, total=len(missing)
        ):
            pass
        runs = [chunk.run for chunk in chunks]
        ranges = _cut_ranges(runs, plan, workers)
        merged = in_order(functools.partial(_merge_range, runs, plan), ranges)
        with atomic_folder(folder) as unfinished:
            told = bar(
                merged, what="merging counts", unit="range", progress=progress, total=len(ranges)
            )
            _write_table(unfinished, told, data, tokens, work)


@dataclass(frozen=True)
class _Plan:
    """What the runs depend on; runs of another plan are of no use."""

    tokens: str
    """Checksum over the split's shards."""
    vocab_size: int
    chunk_tokens: int
    merge_entries: int

    @staticmethod
    def make(data: TokenData, tokens: Split, memory_mib: float, workers: int) -> "_Plan":
        share = int(memory_mib * 2**20 / workers)
        chunk = min(share // _CHUNK_BYTES_PER_TOKEN, _MOST_TOKENS_A_CHUNK)
        if chunk < _LEAST_TOKENS_A_CHUNK:
            least = _LEAST_TOKENS_A_CHUNK * _CHUNK_BYTES_PER_TOKEN * workers / 2**20
            raise UserError(
                f"memory_mib={memory_mib:g} is too little for {workers} workers: they need at "
                f"least {least:.2f} MiB together."
            )
        plan = _Plan(
            tokens.checksum, data.vocab_size, chunk, max(1, share // _MERGE_BYTES_PER_ENTRY)
        )
        if 2 * plan.token_bits + plan.count_bits > 64:
            raise UserError(f"a vocabulary of {data.vocab_size:,} ids is too large to count pairs.")
        return plan

    @property
    def token_bits(self) -> int:
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def count_bits(self) -> int:
        """Bits for a count within one chunk."""
        return _MOST_TOKENS_A_CHUNK.bit_length()

    @property
    def pair_dtype(self) -> type[np.unsignedinteger[Any]]:
        return np.uint32 if 2 * self.token_bits <= 32 else np.uint64


@dataclass(frozen=True)
class _Chunk:
    shard: Path
    start: int
    """First token of the chunk within its shard; the pair that ends in it starts before."""
    stop: int
    boundaries: np.ndarray
    """Documents' first tokens within the chunk, counted from `start`: they end no pair."""
    plan: _Plan
    run: Path


def _chunks(tokens: Split, plan: _Plan, work: Path) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    for shard, first, last in tokens.shards():
        for start in range(first, last, plan.chunk_tokens):
            stop = min(start + plan.chunk_tokens, last)
            low, high = np.searchsorted(tokens.document_offsets[:-1], [start, stop])
            boundaries = np.array(tokens.document_offsets[low:high]) - start
            run = work / f"run-{len(chunks):06d}.bin"
            chunks.append(_Chunk(shard, start - first, stop - first, boundaries, plan, run))
    return chunks


def _count_chunk(chunk: _Chunk) -> None:
    plan = chunk.plan
    dtype, offset, _ = npy_layout(chunk.shard)
    before = min(chunk.start, 1)
    ids = np.fromfile(
        chunk.shard,
        dtype=dtype,
        count=chunk.stop - chunk.start + before,
        offset=offset + (chunk.start - before) * dtype.itemsize,
    )
    if len(ids) and int(ids.max()) >= plan.vocab_size:
        raise StoreError(
            f"{chunk.shard} holds token id {int(ids.max())}, past the vocabulary of "
            f"{plan.vocab_size:,}: it is damaged. Prepare the corpus again."
        )
    pairs = ids[:-1].astype(plan.pair_dtype)
    pairs <<= plan.token_bits
    pairs |= ids[1:]
    del ids
    # pairs[i] ends at token start + 1 - before + i. Those at a boundary are set to the largest
    # value and cut off after sorting: if a real pair has that value too, one is like the other.
    dropped = chunk.boundaries - (1 - before)
    dropped = dropped[dropped >= 0]
    pairs[dropped] = np.iinfo(plan.pair_dtype).max
    pairs.sort()
    pairs = pairs[: len(pairs) - len(dropped)]
    distinct, counts = _run_lengths(pairs)
    packed = distinct.astype(np.uint64)
    packed <<= np.uint64(plan.count_bits)
    packed |= counts.astype(np.uint64)
    with atomic_file(chunk.run) as temporary, temporary.open("wb") as file:
        file.write(packed.data)


def _run_lengths(ascending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    firsts = _first_of_each(ascending)
    return ascending[firsts], np.diff(firsts, append=len(ascending))


def _first_of_each(ascending: np.ndarray) -> np.ndarray:
    is_first = np.ones(len(ascending), dtype=bool)
    np.not_equal(ascending[1:], ascending[:-1], out=is_first[1:])
    return np.flatnonzero(is_first)


def _cut_ranges(runs: list[Path], plan: _Plan, workers: int) -> list[np.ndarray]:
    """For each range of pairs, where it starts and ends in every run: int64 [runs, 2].

    With samples every `stride` entries of each run, the entries between two samples of all runs
    together are at most (samples between + runs) * stride.
    """
    lengths = [run.stat().st_size // 8 for run in runs]
    if not sum(lengths):
        return []
    most = min(plan.merge_entries, max(sum(lengths) // workers, 8 * len(runs)))
    stride = max(1, most // (4 * len(runs)))
    samples_a_range = most // stride - len(runs)
    if samples_a_range < 1:
        raise UserError(
            f"the memory for counting pairs is too little to merge {len(runs):,} runs of this "
            f"corpus. Give at least four times as much, or fewer workers."
        )
    samples = [_every(run, stride, plan) for run in runs]
    together = np.sort(np.concatenate(samples))
    cuts = together[samples_a_range::samples_a_range] >> np.uint64(plan.count_bits)
    cuts = np.unique(cuts) << np.uint64(plan.count_bits)
    edges = np.zeros((len(runs), len(cuts) + 2), dtype=np.int64)
    edges[:, -1] = lengths
    for row, run in enumerate(runs):
        for column, after in enumerate(np.searchsorted(samples[row], cuts).tolist()):
            if after:
                start = (after - 1) * stride
                block = np.fromfile(run, dtype=np.uint64, count=stride, offset=start * 8)
                edges[row, column + 1] = start + np.searchsorted(block, cuts[column])
    return [edges[:, i : i + 2] for i in range(len(cuts) + 1)]


def _every(run: Path, stride: int, plan: _Plan) -> np.ndarray:
    """Every `stride`-th entry of a run. Not through a memory map, whose pages would count."""
    num_entries = run.stat().st_size // 8
    at_once = stride * max(1, min(1 << 16, plan.merge_entries // 4) // stride)
    pieces = [
        np.fromfile(
            run,
            dtype=np.uint64,
            count=1 if at_once == stride else min(at_once, num_entries - start),
            offset=start * 8,
        )[::stride]
        for start in range(0, num_entries, at_once)
    ]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.uint64)


def _merge_range(
    runs: list[Path], plan: _Plan, where: np.ndarray
) -> tuple[UInt64[np.ndarray, "P"], UInt64[np.ndarray, "P"]]:
    slices = [
        np.fromfile(run, dtype=np.uint64, count=stop - start, offset=start * 8)
        for run, (start, stop) in zip(runs, where.tolist(), strict=True)
        if stop > start
    ]
    packed = np.concatenate(slices) if slices else np.zeros(0, np.uint64)
    del slices
    packed.sort(kind="stable")  # timsort, which merges the ascending slices it is made of
    pairs = packed >> np.uint64(plan.count_bits)
    packed &= np.uint64((1 << plan.count_bits) - 1)
    firsts = _first_of_each(pairs)
    counts = np.add.reduceat(packed, firsts) if len(firsts) else packed
    pairs = pairs[firsts]
    first = pairs >> np.uint64(plan.token_bits)
    pairs &= np.uint64((1 << plan.token_bits) - 1)
    return (first << np.uint64(32)) | pairs, counts


def _write_table(
    folder: Path,
    merged: Iterable[tuple[np.ndarray, np.ndarray]],
    data: TokenData,
    tokens: Split,
    work: Path,
) -> None:
    num_pairs = tokens.num_tokens - tokens.num_documents
    narrow = np.dtype(np.uint32 if num_pairs < 2**32 else np.uint64)
    counted = 0
    with (
        NpyWriter(folder / "pairs.npy", np.dtype(np.uint64)) as pairs_file,
        NpyWriter(folder / "counts.npy", narrow) as counts_file,
    ):
        for pairs, counts in merged:
            pairs_file.append(pairs)
            counts_file.append(counts.astype(narrow))
            counted += int(counts.sum(dtype=np.uint64))
    if counted != num_pairs:
        shutil.rmtree(work)
        raise StoreError(
            f"counted {counted:,} pairs where {tokens.num_tokens:,} tokens in "
            f"{tokens.num_documents:,} documents have {num_pairs:,}: a run on disk was damaged. "
            f"The runs were deleted; run the same command again."
        )
    write_sealed_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "corpus": f"{data.name}/{tokens.name}",
            "tokenizer_hash": data.tokenizer_hash,
            "vocab_size": data.vocab_size,
            "tokens": tokens.checksum,
            "num_tokens": tokens.num_tokens,
            "num_documents": tokens.num_documents,
            "num_pairs": num_pairs,
            "num_distinct": pairs_file.num_values,
            "files": {name: describe_file(folder / name) for name in ("pairs.npy", "counts.npy")},
        },
    )


def _same_tokens(table: PairCounts, folder: Path, data: TokenData, tokens: Split) -> PairCounts:
    if read_json(folder / MANIFEST)["tokens"] != tokens.checksum:
        raise UserError(
            f"{folder} holds pair counts of other tokens than {data.folder}/{tokens.name}. "
            f"Delete it or count into another folder."
        )
    return table


def _begin(work: Path, plan: _Plan) -> None:
    """Keep the runs that belong to this plan; drop those of another."""
    described = {"plan": repr(plan)}
    if not ((work / "plan.json").exists() and read_json(work / "plan.json") == described):
        for file in work.iterdir():
            if file.name != _LOCK:
                file.unlink()
    write_json(work / "plan.json", described)
    remove_leftovers(work)


def _suffix(split: str) -> str:
    return "" if split == "train" else f"_{split}"


@contextmanager
def _mapper(executor: Executor, workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` that keeps order and has at most `workers` results in the making or waiting."""
    if executor == "threads":
        pool = ThreadPoolExecutor(workers)
        submit, result = pool.submit, lambda future: future.result()
        close = functools.partial(pool.shutdown, cancel_futures=True)
    else:
        stack = ExitStack()
        submit, result = _ray_submit(stack)
        close = stack.close

    def in_order(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        waiting = []
        for item in items:
            waiting.append(submit(function, item))
            if len(waiting) >= workers:
                yield result(waiting.pop(0))
        while waiting:
            yield result(waiting.pop(0))

    try:
        yield in_order
    finally:
        close()


def _ray_submit(stack: ExitStack) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    instead = ", or use executor='threads' on one machine"
    ray = stack.enter_context(connected(instead=instead))
    run = ray.remote(lambda function, item: function(item))

    def result(reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error

    return run.remote, result
