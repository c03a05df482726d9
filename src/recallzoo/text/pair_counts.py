"""How often each pair of adjacent tokens occurs in a training corpus.

    count(a, b) = number of positions t with (x[t-1], x[t]) = (a, b), both in one document

The table on disk is a folder:

    pairs.npy         uint64 [P], ascending, first << 32 | second
    counts.npy        uint32 or uint64 [P], at least 1
    pair_counts.json  tokenizer hash, vocabulary, corpus, split, totals, checksums

It is made by `count_pairs` (recallzoo.text.counting), exactly and out of core.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from recallzoo.errors import StoreError, UserError
from recallzoo.text._checksums import check_files, read_sealed_json
from recallzoo.text._hash_table import HashTable

FORMAT = "recallzoo pair counts"
FORMAT_VERSION = 1
MANIFEST = "pair_counts.json"
FILES = ("pairs.npy", "counts.npy")
_REMEDY = "Delete the folder and count again (recallzoo prepare with the same options does)."


@dataclass(frozen=True, eq=False)
class PairCounts:
    """Exact counts of adjacent token pairs, with the corpus and tokenizer they belong to."""

    pairs: Integer[np.ndarray, "P"] = field(repr=False)
    """Distinct pairs, ascending, `first << 32 | second`."""
    counts: Integer[np.ndarray, "P"] = field(repr=False)
    vocab_size: int
    tokenizer_hash: str | None
    """None for a table made from a dict."""
    corpus: str
    """The corpus and split the counts come from, to be named beside every number made of them."""
    num_tokens: int
    """Tokens counted, boundary tokens included: what the rate form of the cut is a share of."""
    num_documents: int
    _tables: dict[str, HashTable] = field(default_factory=dict, repr=False)

    @property
    def num_pairs(self) -> int:
        """Occurrences of all pairs together."""
        return int(self.counts.sum(dtype=np.uint64)) if len(self.counts) else 0

    @staticmethod
    def open(folder: str | Path, *, verify: bool = False) -> "PairCounts":
        """Open a table. Sizes are checked always, checksums and the sum with `verify`.

        Raises UserError if there is no table and StoreError if it is damaged.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"{folder} holds no finished pair counts ({MANIFEST} is missing). Run recallzoo "
                f"prepare on the corpus, or the same command again if it was interrupted."
            )
        about = read_sealed_json(folder / MANIFEST, "pair counts")
        if about.get("format") != FORMAT or about.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{folder} has format {about.get('format')!r} {about.get('format_version')}; "
                f"this version reads {FORMAT!r} {FORMAT_VERSION}. {_REMEDY}"
            )
        check_files(folder, about["files"].items(), verify=verify, remedy=_REMEDY)
        pairs, counts = (_load(folder / name) for name in FILES)
        wanted = (about["num_distinct"],)
        if pairs.dtype != np.uint64 or pairs.shape != wanted or counts.shape != wanted:
            raise StoreError(f"{folder} holds arrays of another shape than it says. {_REMEDY}")
        table = PairCounts(
            pairs=pairs,
            counts=counts,
            **{name: about[name] for name in _DESCRIBED},
        )
        if verify and table.num_pairs != about["num_pairs"]:
            raise StoreError(f"the counts in {folder} do not add up. {_REMEDY}")
        return table

    @staticmethod
    def from_dict(
        counts: Mapping[tuple[int, int], int], *, vocab_size: int = 2**31, corpus: str = "a dict"
    ) -> "PairCounts":
        """A table of `{(first, second): count}`; `num_tokens` is then the number of pairs."""
        ordered = sorted(counts.items())
        if any(min(*pair, count) < 0 or max(pair) >= vocab_size for pair, count in ordered):
            raise UserError(f"pair counts want ids in [0, {vocab_size}) and counts of 0 or more.")
        pairs = [first << 32 | second for (first, second), _ in ordered]
        return PairCounts(
            pairs=np.array(pairs, dtype=np.uint64),
            counts=np.array([count for _, count in ordered], dtype=np.uint64),
            vocab_size=vocab_size,
            tokenizer_hash=None,
            corpus=corpus,
            num_tokens=sum(counts.values()),
            num_documents=1,
        )

    def to(self, device: torch.device | str) -> "PairCounts":
        """Build the lookup table on a device (about 20 bytes a distinct pair), once; returns
        this very table, whose lookups then follow the device of what is looked up."""
        self._table(torch.device(device))
        return self

    def lookup(self, first: Int[Tensor, "*N"], second: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """Training occurrences of each pair, int64, 0 for a pair never seen.

        Ids must lie in [0, vocab_size): see `require_ids_below_vocab`.
        """
        pairs = (first.long() << 32) | second.long()
        return self._table(pairs.device).lookup(pairs.reshape(-1)).view(pairs.shape)

    def require_tokenizer(self, tokenizer_hash: str, owner: str) -> None:
        """Raise UserError unless the counts were made with the tokenizer of `owner`."""
        if self.tokenizer_hash != tokenizer_hash:
            made_with = (self.tokenizer_hash or "an unknown tokenizer")[:12]
            raise UserError(
                f"the pair counts of {self.corpus} were made with tokenizer {made_with}, "
                f"{owner} has {tokenizer_hash[:12]}: their ids mean different text. Prepare the "
                f"corpus again with the tokenizer of {owner} and count its pairs."
            )

    def require_ids_below_vocab(self, largest: int) -> None:
        """Raise UserError for a token id that the counted corpus's tokenizer does not have."""
        if largest >= self.vocab_size:
            raise UserError(
                f"token id {largest} is past the vocabulary of the pair counts of {self.corpus} "
                f"({self.vocab_size:,} ids). Were these tokens made with another tokenizer?"
            )

    def as_dict(self) -> dict[tuple[int, int], int]:
        """`{(first, second): count}`, for small tables."""
        pairs = self.pairs.tolist()
        return {
            (pair >> 32, pair & 0xFFFFFFFF): count
            for pair, count in zip(pairs, self.counts.tolist(), strict=True)
        }

    def describe(self) -> dict[str, Any]:
        """What a result made with these counts must name."""
        return {name: getattr(self, name) for name in _DESCRIBED}

    def _table(self, device: torch.device) -> HashTable:
        if "cpu" not in self._tables:
            self._tables["cpu"] = HashTable.build(self.pairs, self.counts)
        if str(device) not in self._tables:
            self._tables[str(device)] = self._tables["cpu"].to(device)
        return self._tables[str(device)]


_DESCRIBED = ("vocab_size", "tokenizer_hash", "corpus", "num_tokens", "num_documents")


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise StoreError(f"{path} is not a numpy array ({error}). {_REMEDY}") from error
