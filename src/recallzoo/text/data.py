"""Reading a prepared data folder: tokens, documents, and contexts cut from them.

Tokens stay on disk, memory-mapped. Sizes and the small checksums (manifest, tokenizer) are
compared whenever a folder is opened; `verify=True` reads every shard as well, which an audit
and a pretraining run should do once at their start. The layout is in `recallzoo.text`.
"""

import bisect
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from recallzoo.errors import InvalidConfig, StoreError, UnknownName, UserError
from recallzoo.text._checksums import check_files, digest_of, read_sealed_json
from recallzoo.text.pair_counts import PairCounts

if TYPE_CHECKING:
    import polars
    import tokenizers

FORMAT = "recallzoo tokens"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "valid", "test")
_REMEDY = "Delete the folder and run recallzoo prepare again."


@dataclass(frozen=True)
class Boundary:
    """What separates documents in the token stream."""

    position: Literal["end", "start", "none"]
    """Whether each document's tokens end or start with the boundary token, or have none."""
    token: str | None
    id: int | None


def open_data(folder: str | Path, *, verify: bool = False) -> "TokenData":
    """Open what `recallzoo prepare` made.

    verify  read every byte and compare it with its checksum, and every token id with the
            vocabulary (1 to 2 GB/s); otherwise sizes, the manifest and the tokenizer.

    Raises UserError for a folder that is not prepared, or not to its end; StoreError for a
    shard that is missing, cut short or changed, or a tokenizer that is not the one used.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        unfinished = (folder / "prepare.work").exists()
        why = (
            "was not finished. Run the same recallzoo prepare command again: it continues"
            if unfinished
            else f"is no prepared data ({MANIFEST} is missing). Make some with recallzoo prepare"
        )
        raise UserError(f"{folder} {why}.")
    manifest = read_sealed_json(folder / MANIFEST, "data")
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder} is of format {manifest.get('format')!r} {manifest.get('format_version')}, "
            f"this version reads {FORMAT!r} {FORMAT_VERSION}. Prepare the corpus again."
        )
    check_files(
        folder / "tokenizer",
        manifest["tokenizer"]["files"].items(),
        verify=True,
        remedy="The tokenizer was changed after the text was tokenised with it, so the ids may "
        f"mean other text. {_REMEDY}",
    )
    data = TokenData(folder, manifest)
    for name, split in manifest["splits"].items():
        check_files(folder / name, split["files"].items(), verify=verify, remedy=_REMEDY)
        if verify:
            _check_ids(data.split(name))
    return data


@dataclass(frozen=True, eq=False)
class TokenData:
    """A prepared corpus: its splits, tokenizer, domains and pair counts."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def tokenizer_hash(self) -> str:
        """See `recallzoo.text.tokenizer_hash`: equal for tokenizers that give equal ids."""
        return self.manifest["tokenizer"]["hash"]

    @property
    def vocab_size(self) -> int:
        """Every token id is below this."""
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def boundary(self) -> Boundary:
        return Boundary(**self.manifest["tokenizer"]["boundary"])

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order of `Split.document_domains`."""
        return tuple(self.manifest["domains"])

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest["splits"])

    @property
    def tokenizer_folder(self) -> Path:
        """For `transformers.AutoTokenizer.from_pretrained`."""
        return self.folder / "tokenizer"

    def tokenizer(self) -> "tokenizers.Tokenizer":
        """The tokenizer the data was made with (needs the `tokenizers` library)."""
        from recallzoo.text.tokenizer import read_tokenizer_file

        return read_tokenizer_file(self.tokenizer_folder / "tokenizer.json")

    def split(self, name: str) -> "Split":
        """A split by name; UnknownName if the data has none of that name."""
        if name not in self.manifest["splits"]:
            raise UnknownName(f"split of {self.folder}", name, self.splits)
        return Split(self, name)

    def pair_counts(self, *, verify: bool = False) -> PairCounts:
        """Counts of the training split's pairs; UserError if they were not made."""
        return PairCounts.open(self.folder / "pair_counts", verify=verify)


@dataclass(frozen=True, eq=False)
class Split:
    """One split's documents and their tokens, as one stream over all shards."""

    data: TokenData
    name: str

    @property
    def about(self) -> dict[str, Any]:
        """The manifest's entry: totals, by domain too, and files."""
        return self.data.manifest["splits"][self.name]

    @property
    def folder(self) -> Path:
        return self.data.folder / self.name

    @property
    def num_tokens(self) -> int:
        return self.about["num_tokens"]

    @property
    def num_documents(self) -> int:
        return self.about["num_documents"]

    @property
    def checksum(self) -> str:
        """Equal for equal tokens in equal documents: what results about them are keyed by."""
        return digest_of(
            [
                (name, entry["sha256"])
                for name, entry in sorted(self.about["files"].items())
                if name.startswith("tokens-") or name == "document_offsets.npy"
            ]
        )

    @functools.cached_property
    def document_offsets(self) -> Integer[np.ndarray, "offsets"]:
        """Document i is tokens [offsets[i], offsets[i+1]) of the stream."""
        return self._array("document_offsets.npy")

    @functools.cached_property
    def document_domains(self) -> Integer[np.ndarray, "N"]:
        """Index into `data.domains` of each document."""
        return self._array("document_domains.npy")

    @functools.cached_property
    def document_bytes(self) -> Integer[np.ndarray, "N"]:
        """UTF-8 bytes of each document's text, boundary tokens not counted."""
        return self._array("document_bytes.npy")

    def documents(self) -> "polars.DataFrame":
        """id, domain, source, num_tokens, num_bytes of each document, in the split's order."""
        import polars

        return polars.read_parquet(self.folder / "documents.parquet", glob=False)

    def document(self, index: int) -> Integer[np.ndarray, "T"]:
        """The tokens of one document, boundary token included."""
        if not 0 <= index < self.num_documents:
            raise InvalidConfig(
                f"document {index} of {self.name}: there are {self.num_documents:,}, from 0."
            )
        return self.read(int(self.document_offsets[index]), int(self.document_offsets[index + 1]))

    def read(self, start: int, stop: int) -> Integer[np.ndarray, "T"]:
        """Tokens [start, stop) of the stream; a view of the file where one shard has them all."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise InvalidConfig(
                f"tokens [{start}, {stop}) of {self.name}: there are {self.num_tokens:,}, from 0."
            )
        firsts, shards = self._shards
        at = bisect.bisect_right(firsts, start) - 1
        pieces = []
        while start < stop:
            end = min(stop, firsts[at] + len(shards[at]))
            pieces.append(shards[at][start - firsts[at] : end - firsts[at]])
            start, at = end, at + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, self.data.manifest["dtype"])

    def shards(self) -> Iterator[tuple[Path, int, int]]:
        """File, first token and end of each shard in the stream."""
        first = 0
        for shard in self.about["shards"]:
            yield self.folder / shard["file"], first, first + shard["num_tokens"]
            first += shard["num_tokens"]

    def contexts(
        self,
        seq_len: int,
        *,
        stride: int | None = None,
        document_aligned: bool = False,
        partial: Literal["pad", "drop"] = "pad",
    ) -> "Contexts":
        """Cut the stream into contexts of `seq_len` tokens; see `Contexts`."""
        return Contexts.cut(self, seq_len, stride, document_aligned, partial)

    @functools.cached_property
    def _shards(self) -> tuple[list[int], list[np.ndarray]]:
        placed = [(first, self._array(path.name)) for path, first, _ in self.shards()]
        return [first for first, _ in placed], [array for _, array in placed]

    def _array(self, name: str) -> np.ndarray:
        try:
            return np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise StoreError(f"could not read {self.folder / name}: {error}. {_REMEDY}") from error


@runtime_checkable
class TokenStream(Protocol):
    """Documents' tokens, one after another: a `Split`, or what else contexts are cut from."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def document_offsets(self) -> Any: ...  # [documents + 1]; typed, no cached_property would do
    def read(self, start: int, stop: int) -> Integer[np.ndarray, "T"]: ...


@dataclass(frozen=True)
class ContextBatch:
    """Contexts side by side."""

    tokens: Int[Tensor, "B T"]
    """int64; 0 where padded."""
    document_ids: Int[Tensor, "B T"]
    """The document of each token, by its number in the split; -1 where padded. int64."""
    is_new: Bool[Tensor, "B T"]
    """Tokens that no earlier context of the split has: each token is new exactly once."""


@dataclass(frozen=True, eq=False)
class Contexts:
    """Contexts of T tokens cut from a split, in an order fixed by the data.

    Packed (the default), a context starts every `stride` tokens of the stream and may hold
    several documents. Document-aligned, every document is cut on its own, from its first token.
    With a stride below `seq_len` contexts overlap (sliding); `ContextBatch.is_new` then marks
    the tokens to score. The last context of the stream, or of each document, may be shorter:
    it is padded, or dropped with `partial="drop"` (packed only).

    To train on next tokens take `contexts(seq_len + 1, stride=seq_len, partial="drop")`.
    """

    split: TokenStream
    seq_len: int
    starts: Integer[np.ndarray, "N"]
    stops: Integer[np.ndarray, "N"]
    new_from: Integer[np.ndarray, "N"]
    """First token of the stream that no earlier context has."""

    @staticmethod
    def cut(
        split: TokenStream, seq_len: int, stride: int | None, document_aligned: bool, partial: str
    ) -> "Contexts":
        stride = seq_len if stride is None else stride
        if seq_len < 1 or not 1 <= stride <= seq_len:
            raise InvalidConfig(
                f"contexts want seq_len >= 1 and 1 <= stride <= seq_len, got seq_len={seq_len}, "
                f"stride={stride}."
            )
        if partial not in ("pad", "drop") or (document_aligned and partial == "drop"):
            raise InvalidConfig(
                f"partial={partial!r}: 'pad', or for packed contexts 'drop' (document-aligned, "
                f"dropping would lose the end of every document)."
            )
        if document_aligned:
            offsets = np.asarray(split.document_offsets)
            first, lengths = offsets[:-1], np.diff(offsets)
        else:
            first, lengths = np.array([0]), np.array([split.num_tokens])
        beyond = np.maximum(lengths - seq_len, 0)
        number = 1 + (beyond // stride if partial == "drop" else -(-beyond // stride))
        if partial == "drop":
            number = np.where(lengths < seq_len, 0, number)
        number = np.where(lengths == 0, 0, number)
        place = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
        starts = np.repeat(first, number) + place * stride
        stops = np.minimum(starts + seq_len, np.repeat(first + lengths, number))
        new_from = np.where(place == 0, starts, starts - stride + seq_len)
        return Contexts(split, seq_len, starts, stops, new_from)

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, indices: Sequence[int] | np.ndarray) -> ContextBatch:
        """The contexts of these numbers, in this order, on the CPU."""
        tokens = np.zeros((len(indices), self.seq_len), dtype=np.int64)
        documents = np.full((len(indices), self.seq_len), -1, dtype=np.int64)
        is_new = np.zeros((len(indices), self.seq_len), dtype=bool)
        offsets = self.split.document_offsets
        for row, index in enumerate(indices):
            start, stop = int(self.starts[index]), int(self.stops[index])
            tokens[row, : stop - start] = self.split.read(start, stop)
            low = int(np.searchsorted(offsets, start, side="right")) - 1
            high = int(np.searchsorted(offsets, stop, side="left"))
            edges = np.clip(offsets[low : high + 1], start, stop)
            documents[row, : stop - start] = np.repeat(np.arange(low, high), np.diff(edges))
            is_new[row, int(self.new_from[index]) - start : stop - start] = True
        return ContextBatch(
            torch.from_numpy(tokens), torch.from_numpy(documents), torch.from_numpy(is_new)
        )


def _check_ids(split: Split) -> None:
    for path, start, stop in split.shards():
        step = 1 << 24
        most = max(
            (int(split.read(at, min(at + step, stop)).max()) for at in range(start, stop, step)),
            default=0,
        )
        if most >= split.data.vocab_size:
            raise StoreError(
                f"{path} holds token id {most}, past the vocabulary of "
                f"{split.data.vocab_size:,}. {_REMEDY}"
            )
