"""The second half of `prepare`: tokenised parts in, shuffled shards out.

Documents of a split are put in the order of a hash of their ids (sources are often sorted by
domain), whatever the order and the files they came in. Each file appears whole; those a killed
process had finished are kept.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recallzoo.errors import UserError
from recallzoo.files import atomic_file, remove_leftovers
from recallzoo.text._arrays import NpyWriter
from recallzoo.text._checksums import describe_file
from recallzoo.text._parts import write_table
from recallzoo.text._progress import bar

if TYPE_CHECKING:
    import polars


def read_part_documents(parts: Sequence[Path], *, drop_repeated_ids: bool) -> "polars.DataFrame":
    """All documents of all parts, in the order they are to have, with their place in the parts.

    Of documents with one id the first is kept, or UserError raised.
    """
    import polars

    tables = []
    for number, part in enumerate(parts):
        table = polars.read_parquet(part / "documents.parquet", glob=False)
        offset = polars.col("num_tokens").cum_sum() - polars.col("num_tokens")
        tables.append(table.with_columns(offset.alias("offset"), polars.lit(number).alias("part")))
    documents = polars.concat(tables) if tables else polars.DataFrame()
    if documents.is_empty():
        raise UserError("the corpus holds no document with any text in it.")
    first = documents.unique(["key_high", "key_low"], keep="first", maintain_order=True)
    if len(first) < len(documents) and not drop_repeated_ids:
        repeated = documents.filter(polars.struct("key_high", "key_low").is_duplicated())
        id_ = repeated["id"][0]
        splits = Counter(repeated.filter(polars.col("id") == id_)["split"].to_list())
        places = ", ".join(f"{number:,} times in {split}" for split, number in splits.items())
        raise UserError(
            f"{len(documents) - len(first):,} documents have an id that another has: {id_!r} "
            f"stands {places}. Ids decide order and split, so each must be there "
            f"once. Name another field with --id-field, or keep the first of each with "
            f"--on-error skip."
        )
    return first.sort("key_high", "key_low")


def write_split(
    folder: Path,
    documents: "polars.DataFrame",
    domains: Sequence[str],
    parts: Sequence[Path],
    shard_tokens: int,
    dtype: np.dtype,
    progress: bool,
) -> dict[str, Any]:
    """Write one split; returns its entry in the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    lengths = documents["num_tokens"].to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    sources = [np.load(part / "tokens.npy", mmap_mode="r") for part in parts]
    places = (documents["part"].to_list(), documents["offset"].to_list(), lengths.tolist())
    edges = _shard_edges(lengths, shard_tokens)
    shards = []
    told = bar(
        list(itertools.pairwise(edges)),
        what=f"writing {folder.name}",
        unit="shard",
        progress=progress,
    )
    for number, (low, high) in enumerate(told):
        path = folder / f"tokens-{number:05d}.npy"
        num_tokens = int(offsets[high] - offsets[low])
        if not path.exists():
            tokens = np.empty(num_tokens, dtype=dtype)
            end = 0
            for part, start, length in zip(*(column[low:high] for column in places), strict=True):
                tokens[end : end + length] = sources[part][start : start + length]
                end += length
            _write_array(path, tokens)
        shards.append({"file": path.name, "num_tokens": num_tokens})
    index = {name: number for number, name in enumerate(domains)}
    _write_array(folder / "document_offsets.npy", offsets.astype(np.int64))
    domain_ids = np.array([index[name] for name in documents["domain"]], dtype=np.uint16)
    _write_array(folder / "document_domains.npy", domain_ids)
    _write_array(folder / "document_bytes.npy", documents["num_bytes"].to_numpy())
    columns = ("id", "domain", "source", "num_tokens", "num_bytes")
    with atomic_file(folder / "documents.parquet") as temporary:
        write_table(temporary, documents.select(columns))
    names = ("document_offsets.npy", "document_domains.npy", "document_bytes.npy")
    files = [*(shard["file"] for shard in shards), *names, "documents.parquet"]
    return {
        "num_documents": len(documents),
        "num_tokens": int(offsets[-1]),
        "num_bytes": int(documents["num_bytes"].sum()),
        "one_token_documents": int(documents["one_token"].sum()),
        "domains": _totals(documents),
        "shards": shards,
        "files": {name: describe_file(folder / name) for name in files},
    }


def _totals(documents: "polars.DataFrame") -> dict[str, dict[str, int]]:
    import polars

    totals = documents.group_by("domain").agg(
        polars.len().alias("num_documents"),
        polars.col("num_tokens").sum(),
        polars.col("num_bytes").sum(),
    )
    return {row.pop("domain"): row for row in totals.sort("domain").to_dicts()}


def _shard_edges(lengths: np.ndarray, shard_tokens: int) -> list[int]:
    """Where shards begin, in documents: each is as full as whole documents make it."""
    edges, held = [0], 0
    for number, length in enumerate(lengths.tolist()):
        if held and held + length > shard_tokens:
            edges.append(number)
            held = 0
        held += length
    return [*edges, len(lengths)]


def _write_array(path: Path, values: np.ndarray) -> None:
    with atomic_file(path) as temporary, NpyWriter(temporary, values.dtype) as file:
        file.append(values)
