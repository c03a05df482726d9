"""What an audit reads: documents under one tokenizer, cut into contexts, in parts.

A context is what a model sees at once, at most `context` tokens, a prepended BOS among them.

    bos none      windows of context + 1 tokens: all but the last are read, all but the first
                  are predicted. The very first token of the text (documents separate: of each
                  document) has nothing before it and is not scored.
    bos prepend   windows of context tokens, after the BOS: each token is predicted.

Windows begin every `stride` tokens. With stride = context (disjoint) each window scores what it
predicts; with less (sliding) only its last `stride` tokens, which thereby see at least
context - stride tokens. Either way each token is scored once. Documents are packed one after
another, or separate: then a context begins with its document and holds no other.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from recallzoo.errors import UserError
from recallzoo.evaluate.audit_options import Bos, Documents
from recallzoo.evaluate.token_text import TokenText
from recallzoo.text import Boundary, Contexts, PairCounts, Split, TokenStream, label_pairs
from recallzoo.text.tokenizer import Encoder

_ENCODED_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class AuditText:
    """Documents of a split under one tokenizer; a stream that contexts are cut from."""

    stream: TokenStream
    document_offsets: Integer[np.ndarray, "offsets"]
    document_bytes: Integer[np.ndarray, "N"]
    boundary: Boundary
    tokenizer_hash: str
    token_text: TokenText
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.document_offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.document_bytes)

    def read(self, start: int, stop: int) -> Integer[np.ndarray, "T"]:
        """Tokens [start, stop) of the stream."""
        return self.stream.read(start, stop)

    def is_boundary(
        self, document: Integer[np.ndarray, "N"], position: Integer[np.ndarray, "N"]
    ) -> Bool[np.ndarray, "N"]:
        """Whether these tokens are boundary tokens and no text: by their place, as a text may hold
        the same id."""
        if self.boundary.position == "none":
            return np.zeros(len(position), dtype=bool)
        if self.boundary.position == "start":
            return position == 0
        offsets = self.document_offsets
        return position == offsets[document + 1] - offsets[document] - 1

    @functools.cached_property
    def largest_id(self) -> int:
        """The largest token id there is."""
        step = 1 << 24
        starts = range(0, self.num_tokens, step)
        return max(int(self.read(s, min(s + step, self.num_tokens)).max()) for s in starts)


@dataclass(frozen=True, eq=False)
class _Array:
    tokens: np.ndarray
    document_offsets: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


def as_prepared(split: Split, max_tokens: int | None = None) -> AuditText:
    """A split's first documents, whole ones, of at most `max_tokens` tokens together (but one).

    Documents stand in an order drawn by hash, so the first are a sample.
    """
    offsets = np.array(split.document_offsets, dtype=np.int64)  # in memory: torch warns of views
    number = split.num_documents
    notes = []
    if max_tokens is not None and max_tokens < split.num_tokens:
        number = max(int(np.searchsorted(offsets, max_tokens, side="right")) - 1, 1)
        notes.append(
            f"only the first {number:,} of {split.num_documents:,} documents were audited "
            f"({int(offsets[number]):,} of {split.num_tokens:,} tokens), as --max-tokens asks."
        )
    return AuditText(
        stream=split,
        document_offsets=offsets[: number + 1],
        document_bytes=np.asarray(split.document_bytes, dtype=np.int64)[:number],
        boundary=split.data.boundary,
        tokenizer_hash=split.data.tokenizer_hash,
        token_text=TokenText.load(split.data.tokenizer_folder),
        notes=tuple(notes),
    )


def retokenised(text: AuditText, encoder: Encoder, token_text: TokenText, owner: str) -> AuditText:
    """The same documents under another tokenizer, in memory.

    They are decoded with the data's tokenizer. A document that this does not give back whole (by
    its bytes) is counted in a note.
    """
    place = text.boundary.position
    token = None if place == "none" else encoder.default_boundary(place)
    id_ = None if token is None else encoder.id_of(token)
    boundary = Boundary("none", None, None) if id_ is None else replace(text.boundary, token=token,
                                                                        id=id_)  # fmt: skip
    notes = []
    if place != "none" and id_ is None:
        notes.append(
            f"the tokenizer of {owner} names no token that ends (or begins) a text, so nothing "
            f"separates documents in its contexts."
        )
    pieces, lengths, changed = [], [], 0
    for start in range(0, text.num_documents, _ENCODED_AT_ONCE):
        stop = min(start + _ENCODED_AT_ONCE, text.num_documents)
        texts = [_text_of(text, i) for i in range(start, stop)]
        sizes = [len(one.encode(errors="surrogatepass")) for one in texts]
        changed += int((np.array(sizes) != text.document_bytes[start:stop]).sum())
        for ids in encoder.encode(texts):
            ids = np.asarray(ids, dtype=np.int64)
            if id_ is not None:
                ids = np.append(ids, id_) if place == "end" else np.insert(ids, 0, id_)
            pieces.append(ids)
            lengths.append(len(ids))
    if changed:
        notes.append(
            f"{changed:,} of {text.num_documents:,} documents were changed by the data's tokenizer "
            f"(they do not decode to what they were), so {owner} saw another text there."
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return AuditText(
        stream=_Array(np.concatenate(pieces), offsets),
        document_offsets=offsets,
        document_bytes=text.document_bytes,
        boundary=boundary,
        tokenizer_hash=encoder.hash,
        token_text=token_text,
        notes=(*text.notes, *notes),
    )


def _text_of(text: AuditText, document: int) -> str:
    start, stop = (int(at) for at in text.document_offsets[document : document + 2])
    tokens = text.read(start, stop)
    if text.boundary.position == "end":
        tokens = tokens[:-1]
    elif text.boundary.position == "start":
        tokens = tokens[1:]
    return text.token_text.decode(tokens.tolist())


@dataclass(frozen=True)
class Part:
    """Some neighbouring windows, and which of their tokens are scored."""

    tokens: Int[Tensor, "N W"]
    lengths: Int[Tensor, "N"]
    """Tokens of each window; the rest is padding."""
    document_ids: Int[Tensor, "N W"]
    is_scored: Bool[Tensor, "N W"]
    keys: dict[str, np.ndarray]
    """document, position and token of each scored token, in the order of the text."""

    def labels(self, pair_counts: PairCounts) -> dict[str, np.ndarray]:
        """distance, occurrence and train_count of each scored token, as seen in its window."""
        found = label_pairs(self.tokens, pair_counts, document_ids=self.document_ids)
        columns = {
            "distance": found.distance,
            "occurrence": found.occurrence,
            "train_count": found.train_count,
        }
        return {n: c[self.is_scored].numpy() for n, c in columns.items() if c is not None}


class Windows:
    """The windows of a text, in parts of about `part_tokens` scored tokens."""

    def __init__(
        self,
        text: AuditText,
        *,
        context: int,
        stride: int,
        bos: Bos,
        documents: Documents,
        part_tokens: int,
    ) -> None:
        self.text, self.bos = text, bos
        length = context + 1 if bos == "none" else context
        self.contexts = Contexts.cut(text, length, stride, documents == "separate", "pad")
        new = np.cumsum(self.contexts.stops - self.contexts.new_from)
        edges = np.searchsorted(new, np.arange(part_tokens, text.num_tokens, part_tokens)) + 1
        self._edges = np.unique([0, *edges, len(self.contexts)])
        if self.num_scored == 0:
            raise UserError(
                f"no token of the {text.num_tokens:,} to audit has another before it in its "
                f"context, so none can be scored. Use --bos prepend, or longer documents."
            )

    @property
    def num_parts(self) -> int:
        return len(self._edges) - 1

    @functools.cached_property
    def unscored(self) -> Integer[np.ndarray, "U"]:
        """Places in the stream of the tokens that nothing comes before."""
        if self.bos == "prepend":
            return np.zeros(0, dtype=np.int64)
        is_first = self.contexts.new_from == self.contexts.starts
        return self.contexts.starts[is_first]

    @property
    def num_scored(self) -> int:
        return self.text.num_tokens - len(self.unscored)

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes of the text of scored tokens; boundary tokens are no text."""
        total = int(self.text.document_bytes.sum())
        offsets = self.text.document_offsets
        document = np.searchsorted(offsets, self.unscored, side="right") - 1
        is_text = ~self.text.is_boundary(document, self.unscored - offsets[document])
        for at in self.unscored[is_text].tolist():
            total -= len(self.text.token_text.bytes_of(int(self.text.read(at, at + 1)[0])))
        return total

    def part(self, number: int) -> Part:
        """Read a part."""
        indices = np.arange(self._edges[number], self._edges[number + 1])
        batch = self.contexts.batch(indices)
        is_scored = batch.is_new.clone()
        if self.bos == "none":
            is_scored[:, 0] = False
        starts = self.contexts.starts[indices]
        place = torch.from_numpy(starts)[:, None] + torch.arange(batch.tokens.shape[1])
        offsets = torch.from_numpy(self.text.document_offsets)
        document = batch.document_ids[is_scored]
        return Part(
            tokens=batch.tokens,
            lengths=torch.from_numpy(self.contexts.stops[indices] - starts),
            document_ids=batch.document_ids,
            is_scored=is_scored,
            keys={
                "document": document.numpy().astype(np.uint32),
                "position": (place[is_scored] - offsets[document]).numpy().astype(np.uint32),
                "token": batch.tokens[is_scored].numpy().astype(np.uint32),
            },
        )

    def scored_in(self, parts: Sequence[int]) -> int:
        """Scored tokens of these parts together."""
        new = self.contexts.stops - self.contexts.new_from
        if self.bos == "none":
            new = new - (self.contexts.new_from == self.contexts.starts)
        return sum(int(new[self._edges[p] : self._edges[p + 1]].sum()) for p in parts)
