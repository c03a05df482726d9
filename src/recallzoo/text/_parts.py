"""The first half of `prepare`: sources in, tokenised parts on disk.

A part is a folder that appears whole: the tokens of some 32 MB of text in the order of the
sources, its documents, and where the next part begins. After a kill the parts there are kept
and reading goes on where they end.
"""

import heapq
import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from recallzoo.errors import UserError
from recallzoo.files import atomic_folder, read_json, remove_leftovers, write_json
from recallzoo.text._arrays import NpyWriter
from recallzoo.text._progress import bar
from recallzoo.text.corpus import (
    Document,
    Fields,
    Problem,
    SourceFile,
    TextDocuments,
    read_documents,
)
from recallzoo.text.data import Boundary
from recallzoo.text.tokenizer import Encoder

PART_BYTES = 32_000_000
_BATCH_BYTES = 4_000_000
"""Text encoded at once: an encoding takes many times the memory of its text."""
_PIECE_CHARACTERS = 8_000_000
"""Longer documents are encoded in pieces: an encoding takes some 450 bytes a token."""
_EXAMPLES = 5


@dataclass(frozen=True)
class Input:
    """One file of a corpus and the split it was given for; None is by hash of document id."""

    split: str | None
    file: SourceFile


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How inputs become documents of splits."""

    inputs: Sequence[Input]
    fields: Fields
    text_documents: TextDocuments
    skip_problems: bool
    seed: int
    valid_fraction: float
    test_fraction: float

    def split_of(self, given: str | None, document_id: str) -> str:
        """The split of a document, by hash of its id and the seed if none is given."""
        if given is not None:
            return given
        place = key_of("split", self.seed, document_id)[0] / 2**64
        if place < self.test_fraction:
            return "test"
        return "valid" if place < self.test_fraction + self.valid_fraction else "train"

    def records(
        self, at: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[tuple[int, int], str | None, Document | Problem]]:
        """Every record from (input, record) `at` on: where the next is, its split, itself.

        Raises UserError at the first problem unless `skip_problems`. Empty documents are no
        problem: they are passed on as such, to be counted.
        """
        for index in range(at[0], len(self.inputs)):
            given, file = self.inputs[index].split, self.inputs[index].file
            read = read_documents(
                file,
                self.fields,
                text_documents=self.text_documents,
                skip=at[1] if index == at[0] else 0,
            )
            for number, record in read:
                if isinstance(record, Problem):
                    if record.kind != "empty" and not self.skip_problems:
                        raise UserError(
                            f"{record.message}. Mend the corpus, or leave such records out with "
                            f"--on-error skip, which counts them in the manifest."
                        )
                    yield (index, number + 1), None, record
                else:
                    split = self.split_of(given, record.id)
                    yield (index, number + 1), split, record


def key_of(purpose: str, seed: int, document_id: str) -> tuple[int, int]:
    """128 bits, evenly spread, that depend on nothing but purpose, seed and id."""
    digest = blake2b(f"{purpose}\0{seed}\0{document_id}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def sample_texts(reading: Reading, sample_bytes: int, progress: bool) -> list[str]:
    """Training documents with the smallest hashes of ids, up to `sample_bytes` (and the one that
    reaches it): the same sample whatever the order of the corpus."""
    chosen: list[tuple[int, int, int, str]] = []
    total = 0
    records = bar(reading.records(), what="sampling text", unit="doc", progress=progress)
    for number, (_, split, record) in enumerate(records):
        if isinstance(record, Problem) or split != "train":
            continue
        order = key_of("tokenizer", reading.seed, record.id)[0]
        if total >= sample_bytes and order >= -chosen[0][0]:
            continue
        heapq.heappush(chosen, (-order, -number, record.num_bytes, record.text))
        total += record.num_bytes
        while total - chosen[0][2] >= sample_bytes:
            total -= heapq.heappop(chosen)[2]
    return [text for *_, text in sorted(chosen, reverse=True)]


@dataclass
class _Part:
    documents: list[tuple[str, Document]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Records left out, by kind. Counted, not kept: a corpus may have any number of them."""
    examples: list[str] = field(default_factory=list)
    num_bytes: int = 0
    next: tuple[int, int] = (0, 0)

    def leave_out(self, problem: Problem) -> None:
        """Count a record that is no document."""
        self.skipped[problem.kind] += 1
        if problem.kind != "empty" and len(self.examples) < _EXAMPLES:
            self.examples.append(problem.message)


def write_parts(
    reading: Reading,
    encoder: Encoder,
    boundary: Boundary,
    dtype: np.dtype,
    folder: Path,
    progress: bool,
) -> list[Path]:
    """Tokenise whatever is not tokenised yet; returns all parts in order."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    parts: list[Path] = []
    at, num_done = (0, 0), 0
    while (part := folder / f"part-{len(parts):06d}").exists():
        about = read_json(part / "part.json")
        at, num_done = tuple(about["next"]), num_done + about["num_documents"]
        parts.append(part)
    with bar(what="tokenising", unit="doc", progress=progress, initial=num_done) as told:
        for content in _ahead(_collect(reading, at)):
            part = folder / f"part-{len(parts):06d}"
            with atomic_folder(part) as unfinished:
                _write_part(unfinished, content, reading, encoder, boundary, dtype)
            parts.append(part)
            told.update(len(content.documents))
    return parts


def problems_of(parts: Sequence[Path]) -> tuple[dict[str, int], list[str]]:
    """Records left out, by kind, and the first few of them in words."""
    counts: Counter[str] = Counter()
    examples: list[str] = []
    for part in parts:
        about = read_json(part / "part.json")
        counts.update(about["skipped"])
        examples += about["examples"]
    return dict(sorted(counts.items())), examples[:_EXAMPLES]


def encoded_in_pieces(parts: Sequence[Path]) -> int:
    """Documents too long to be encoded at once."""
    return sum(read_json(part / "part.json")["in_pieces"] for part in parts)


def _collect(reading: Reading, at: tuple[int, int]) -> Iterator[_Part]:
    part = _Part(next=at)
    for part.next, split, record in reading.records(at):
        if isinstance(record, Problem):
            part.leave_out(record)
        else:
            assert split is not None
            part.documents.append((split, record))
            part.num_bytes += record.num_bytes
        if part.num_bytes >= PART_BYTES:
            yield part
            part = _Part(next=part.next)
    if part.documents or part.skipped:
        yield part


def _ahead(items: Iterator[_Part]) -> Iterator[_Part]:
    """Read the next part while this one is tokenised."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _write_part(
    folder: Path,
    part: _Part,
    reading: Reading,
    encoder: Encoder,
    boundary: Boundary,
    dtype: np.dtype,
) -> None:
    import polars

    rows: list[dict[str, Any]] = []
    skipped = Counter(part.skipped)
    in_pieces = 0
    with NpyWriter(folder / "tokens.npy", dtype) as tokens:
        for batch in _batches(part.documents, lambda document: document[1].num_bytes):
            encoded = _encode(encoder, [document.text for _, document in batch])
            for (split, document), (ids, num_pieces) in zip(batch, encoded, strict=True):
                in_pieces += num_pieces > 1
                if not len(ids):  # a tokenizer may drop every character of a text
                    skipped["empty"] += 1
                    continue
                start = [boundary.id] if boundary.position == "start" else []
                end = [boundary.id] if boundary.position == "end" else []
                tokens.append(np.array([*start, *ids, *end], dtype=dtype))
                key_high, key_low = key_of("order", reading.seed, document.id)
                rows.append(
                    {
                        "split": split,
                        "key_high": key_high,
                        "key_low": key_low,
                        "id": document.id,
                        "domain": document.domain,
                        "source": document.source,
                        "num_tokens": len(ids) + len(start) + len(end),
                        "num_bytes": document.num_bytes,
                        "one_token": len(ids) == 1,
                    }
                )
    write_table(folder / "documents.parquet", polars.DataFrame(rows, schema=_schema()))
    write_json(
        folder / "part.json",
        {
            "next": list(part.next),
            "num_documents": len(rows),
            "in_pieces": in_pieces,
            "skipped": dict(skipped),
            "examples": part.examples,
        },
    )


def _encode(encoder: Encoder, texts: Sequence[str]) -> Iterator[tuple[Sequence[int], int]]:
    """Ids of each text, and in how many pieces it was encoded."""
    pieces = [_pieces(text) for text in texts]
    if all(len(one) == 1 for one in pieces):
        yield from ((ids, 1) for ids in encoder.encode(texts))
        return
    for one in pieces:
        yield list(itertools.chain(*(encoder.encode([piece])[0] for piece in one))), len(one)


def _pieces(text: str) -> list[str]:
    """A long text cut between a letter or digit and the space or line end after it, where
    byte-level tokenizers separate words anyway: how they share out several spaces, or take a line
    end to what stands before it, depends on both sides."""
    pieces, start = [], 0
    while len(text) - start > _PIECE_CHARACTERS:
        latest = start + _PIECE_CHARACTERS
        end = next(
            (
                at
                for at in range(latest, start, -1)
                if text[at] in " \n\r\t" and text[at - 1].isalnum()
            ),
            latest,
        )
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _schema() -> dict[str, Any]:
    import polars

    return {
        "split": polars.String,
        "key_high": polars.UInt64,
        "key_low": polars.UInt64,
        "id": polars.String,
        "domain": polars.String,
        "source": polars.String,
        "num_tokens": polars.Int64,
        "num_bytes": polars.Int64,
        "one_token": polars.Boolean,
    }


def write_table(path: Path, table: Any) -> None:
    """Write a polars table as Parquet through a plain file, whose errors say what failed."""
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    with path.open("wb") as file:
        file.write(buffer.getbuffer())


def _batches(
    items: Iterable[tuple[str, Document]], size: Callable[[tuple[str, Document]], int]
) -> Iterator[list[tuple[str, Document]]]:
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= _BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
