"""Which tokens of a context are recall: AR hits, and what surrounds them.

    t is a repeat   (x[t-1], x[t]) = (x[s-1], x[s]) for some s < t of the same context
    t is an AR hit  t is a repeat, and its pair occurs at most `max_count` times in training

A repeat can be had from the context; a pair that is rare in training cannot have been learnt.
Both together mark the tokens whose loss shows recall.

Source   Arora et al. 2023, arXiv:2312.04927, section 3.1. The paper cuts at 1,250 occurrences
         in 10B training tokens, which is the rate PAPER_RATE; on other corpora the rate is kept.
Differs  the paper says nothing of contexts that hold several documents: here a pair, and its
         repetition, stay within one document wherever `document_ids` are given.
Method   one sort a row of (pair, position) packed into an int64: equal pairs come out as
         neighbours in order of position, so the previous entry is the last occurrence.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from recallzoo.errors import UserError
from recallzoo.text.pair_counts import PairCounts

PAPER_RATE = 1.25e-7
"""1,250 occurrences in 10B training tokens, the cut of arXiv:2312.04927, section 3.1."""

_BLOCK_TOKENS_CPU = 1 << 15
"""Small enough to stay in the second-level cache, and for torch not to start threads of its own."""
_BLOCK_TOKENS_CUDA = 1 << 25


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What is known of each token of a batch of contexts; every tensor has the tokens' shape."""

    is_repeat: Bool[Tensor, "*B T"]
    """The pair that ends here occurred earlier in the context."""
    distance: Int[Tensor, "*B T"]
    """Tokens back to the pair's last occurrence, at least 1; 0 where there is none. int32."""
    occurrence: Int[Tensor, "*B T"]
    """How often the pair occurred earlier in the context; 0 where not. int32."""
    train_count: Int[Tensor, "*B T"] | None
    """Occurrences of the pair in training, int64; -1 where there is no pair or it was not looked
    up (see `label_pairs`); None without pair counts."""

    def hits(self, max_count: int) -> Bool[Tensor, "*B T"]:
        """AR hits at a cut: repeats whose pair occurs at most `max_count` times in training."""
        _require_cut(max_count)
        if self.train_count is None:
            raise UserError(
                "these labels were made without pair counts, so there is no training frequency "
                "to cut at. Pass pair_counts to label_pairs."
            )
        return self.is_repeat & (self.train_count <= max_count)


def max_count_from_rate(rate: float, num_train_tokens: int) -> int:
    """The cut of `rate` occurrences a training token, in occurrences, rounded down.

    The decimal digits of `rate` are taken at their word, so 1.25e-7 of 10B is 1,250.

    >>> max_count_from_rate(PAPER_RATE, 10_000_000_000)
    1250
    """
    if not 0 <= rate < 1:
        raise UserError(f"the rate of the cut is a share of training tokens in [0, 1), got {rate}.")
    if num_train_tokens < 1:
        raise UserError(f"the cut needs a number of training tokens, got {num_train_tokens}.")
    return int(Fraction(repr(float(rate))) * num_train_tokens)


def label_ar_hits(
    tokens: Integer[Tensor, "*B T"],
    pair_counts: PairCounts | Mapping[tuple[int, int], int],
    max_count: int,
    *,
    document_ids: Integer[Tensor, "*B T"] | None = None,
) -> Bool[Tensor, "*B T"]:
    """Mark the AR hits: token t of a context is one when the pair (x[t-1], x[t]) occurred
    earlier in that context and at most `max_count` times in the training data.

    tokens        token ids of any integer type, one context a row; any number of leading axes,
                  or none. On CPU or CUDA; the answer is on the same device.
    pair_counts   the package's table, or a dict {(a, b): occurrences in training}. A pair that
                  is absent occurred 0 times.
    max_count     the cut in occurrences, inclusive; see `max_count_from_rate`.
    document_ids  for contexts that hold several documents: equal neighbours are one document,
                  and no pair reaches into another or repeats one of another. -1 is padding,
                  which is in no pair and may hold any value. Without it a row is one document.

    Edges         t = 0 is never a hit: it ends no pair; nor is a document's first token.
                  Pairs may overlap, so in `a a a` the last token is a hit, and in `a b a b`
                  too. The first occurrence of a pair in a context is never a hit. Rows know
                  nothing of each other. Contexts of 0 or 1 tokens have no hit.
    Raises        UserError for tokens that are no integers, negative ids, ids past the table's
                  vocabulary, a negative cut, or `document_ids` of another shape.

    >>> label_ar_hits(torch.tensor([5, 9, 2, 5, 9]), {}, 0).int().tolist()
    [0, 0, 0, 0, 1]
    >>> label_ar_hits(torch.tensor([5, 9, 2, 5, 9]), {(5, 9): 4}, 3).any().item()
    False
    """
    _require_cut(max_count)
    labels = label_pairs(tokens, pair_counts, document_ids=document_ids, look_up="repeats")
    return labels.hits(max_count)


def label_pairs(
    tokens: Integer[Tensor, "*B T"],
    pair_counts: PairCounts | Mapping[tuple[int, int], int] | None = None,
    *,
    document_ids: Integer[Tensor, "*B T"] | None = None,
    look_up: str = "all",
) -> Labels:
    """Repeats, their distance, their number, and the training count of each token's pair.

    look_up  "all" looks up the training count of every pair, "repeats" only of pairs that
             repeat (a quarter of English text; all that AR hits need), which is quicker.

    Other arguments, edge cases and errors as in `label_ar_hits`. On the CPU, rows are shared
    between `torch.get_num_threads()` threads.
    """
    if look_up not in ("all", "repeats"):
        raise UserError(f"look_up is 'all' or 'repeats', got {look_up!r}.")
    rows, documents = _as_rows(tokens, document_ids)
    token_bits = _token_bits(rows, pair_counts)
    shape, device = rows.shape, rows.device
    is_repeat = torch.zeros(shape, dtype=torch.bool, device=device)
    distance = torch.zeros(shape, dtype=torch.int32, device=device)
    occurrence = torch.zeros(shape, dtype=torch.int32, device=device)
    train_count = None
    if pair_counts is not None:
        train_count = torch.full(shape, -1, dtype=torch.int64, device=device)
    table = pair_counts.to(device) if isinstance(pair_counts, PairCounts) else pair_counts

    def label(block: slice) -> None:
        in_document = None if documents is None else documents[block]
        found = _repeats(rows[block], in_document, token_bits)
        is_repeat[block].view(-1).index_fill_(0, found.at, True)
        distance[block].view(-1).index_copy_(0, found.at, found.distance.to(torch.int32))
        occurrence[block].view(-1).index_copy_(0, found.at, found.occurrence.to(torch.int32))
        if table is None or train_count is None:
            return
        at = found.at
        if look_up == "all":
            at = _has_pair(rows[block], in_document).view(-1).nonzero().view(-1)
        flat = rows[block].view(-1)
        first, second = flat.index_select(0, at - 1), flat.index_select(0, at)
        counts = _counts(table, first.long(), second.long())
        train_count[block].view(-1).index_copy_(0, at, counts)

    if shape[1] >= 2 and shape[0] >= 1:
        _for_each_block(label, shape[0], shape[1], device)
    as_given = tokens.shape
    return Labels(
        is_repeat=is_repeat.view(as_given),
        distance=distance.view(as_given),
        occurrence=occurrence.view(as_given),
        train_count=None if train_count is None else train_count.view(as_given),
    )


@dataclass(frozen=True)
class _Repeats:
    at: Tensor
    """Index into the block's flattened tokens."""
    distance: Tensor
    occurrence: Tensor


def _repeats(rows: Tensor, documents: Tensor | None, token_bits: int) -> _Repeats:
    T = rows.shape[1]
    # On CUDA the radix sort of 32-bit pairs takes half the passes, and returns indices anyway;
    # on the CPU numpy sorts values far faster than torch sorts with indices.
    narrow = rows.device.type == "cuda" and 2 * token_bits <= 32
    index, at, distance = (_sort_pairs if narrow else _sort_packed)(rows, token_bits)
    at += index.div(T - 1, rounding_mode="floor") * T
    if documents is not None:
        # A token without a pair (a document's first, padding) never stands between two of one
        # document that have the same pair; so it is enough to look at the two.
        starts = documents[:, 1:] != documents[:, :-1]
        document = torch.nn.functional.pad(starts.cumsum(1, dtype=torch.int32), (1, 0)).view(-1)
        has_pair = _has_pair(rows, documents).view(-1)
        before = at - distance
        inside = document.index_select(0, at) == document.index_select(0, before)
        inside = (inside & has_pair.index_select(0, before)).nonzero().view(-1)
        index, at, distance = (part.index_select(0, inside) for part in (index, at, distance))
    return _Repeats(at, distance, _place_in_run(index))


def _sort_packed(rows: Tensor, token_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where sorted neighbours have one pair: index of the latter in the flattened sorted rows,
    its position in its row, and the distance between the two."""
    T = rows.shape[1]
    position_bits = T.bit_length()
    key = rows[:, :-1].long() << (token_bits + position_bits)
    key |= rows[:, 1:].long() << position_bits
    key |= torch.arange(1, T, device=rows.device)
    if key.device.type == "cpu":
        key.numpy().sort(axis=-1)
    else:
        key = torch.sort(key, dim=-1).values
    same = torch.zeros_like(key, dtype=torch.bool)
    torch.eq(key[:, 1:] >> position_bits, key[:, :-1] >> position_bits, out=same[:, 1:])
    index = same.view(-1).nonzero().view(-1)
    key = key.view(-1)
    found = key.index_select(0, index)
    distance = found - key.index_select(
        0, index - 1
    )  # their pairs are equal: only positions differ
    return index, found & ((1 << position_bits) - 1), distance


def _sort_pairs(rows: Tensor, token_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_sort_packed`, for pairs that fit in 32 bits (the order of pairs does not matter)."""
    pair = (rows[:, :-1].int() << token_bits) | rows[:, 1:].int()
    pair, order = torch.sort(pair, dim=-1, stable=True)
    same = torch.zeros_like(pair, dtype=torch.bool)
    torch.eq(pair[:, 1:], pair[:, :-1], out=same[:, 1:])
    index = same.view(-1).nonzero().view(-1)
    order = order.view(-1)
    found = order.index_select(0, index)
    return index, found + 1, found - order.index_select(0, index - 1)


def _place_in_run(index: Tensor) -> Tensor:
    """1, 2, 3, ... along each stretch of consecutive numbers."""
    if not len(index):
        return index
    breaks = torch.ones_like(index, dtype=torch.bool)
    torch.ne(index[1:], index[:-1] + 1, out=breaks[1:])
    starts = breaks.nonzero().view(-1)
    lengths = torch.diff(starts, append=starts.new_tensor([len(index)]))
    first = torch.repeat_interleave(starts, lengths, output_size=len(index))
    return torch.arange(1, len(index) + 1, device=index.device) - first


def _has_pair(rows: Tensor, documents: Tensor | None) -> Tensor:
    has_pair = torch.ones_like(rows, dtype=torch.bool)
    has_pair[:, 0] = False
    if documents is not None:
        has_pair[:, 1:] = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    return has_pair


def _counts(
    table: PairCounts | Mapping[tuple[int, int], int], first: Tensor, second: Tensor
) -> Tensor:
    if isinstance(table, PairCounts):
        return table.lookup(first, second)
    pairs, where = torch.unique(torch.stack([first, second]), dim=1, return_inverse=True)
    counts = [table.get((a, b), 0) for a, b in zip(*pairs.tolist(), strict=True)]
    return torch.tensor(counts, dtype=torch.int64, device=first.device)[where]


def _for_each_block(label, num_rows: int, T: int, device: torch.device) -> None:
    on_cpu = device.type == "cpu"
    rows = max(1, (_BLOCK_TOKENS_CPU if on_cpu else _BLOCK_TOKENS_CUDA) // T)
    blocks: Iterator[slice] = (slice(i, i + rows) for i in range(0, num_rows, rows))
    num_threads = min(torch.get_num_threads(), -(-num_rows // rows)) if on_cpu else 1
    if num_threads == 1:
        for block in blocks:
            label(block)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(label, blocks):
            pass


def _as_rows(tokens: Tensor, document_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if not isinstance(tokens, Tensor) or tokens.dim() == 0 or not _is_integer(tokens):
        got = (
            f"{tokens.dtype} of shape {list(tokens.shape)}"
            if isinstance(tokens, Tensor)
            else (type(tokens).__name__)
        )
        raise UserError(f"tokens want an integer tensor of shape [..., T], got {got}.")
    T = tokens.shape[-1]
    rows = tokens.reshape(-1, T) if tokens.numel() else tokens.new_zeros((0, T))
    rows = rows.contiguous()
    if rows.dtype in (torch.uint16, torch.uint32, torch.uint64):  # few operators know these
        rows = rows.long()
    if document_ids is None:
        return rows, None
    if document_ids.shape != tokens.shape or not _is_integer(document_ids):
        raise UserError(
            f"document_ids want whole numbers in the shape of tokens, {list(tokens.shape)}, got "
            f"{document_ids.dtype} of shape {list(document_ids.shape)}."
        )
    documents = document_ids.reshape(rows.shape).to(rows.device, torch.int64)
    return torch.where(documents >= 0, rows, 0), documents


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _token_bits(rows: Tensor, pair_counts: object) -> int:
    """Bits that hold every token id, after a look at the ids."""
    if not rows.numel():
        return 1
    least, most = (int(bound) for bound in torch.aminmax(rows))
    if least < 0:
        raise UserError(
            f"token ids must be 0 or more, got {least}. Mark padding with document_ids of -1."
        )
    if isinstance(pair_counts, PairCounts):
        pair_counts.require_ids_below_vocab(most)
    position_bits = rows.shape[1].bit_length()
    token_bits = max(most.bit_length(), 1)
    if 2 * token_bits + position_bits > 63:
        raise UserError(
            f"token id {most} in a context of {rows.shape[1]} tokens: pair and position do not "
            f"fit in 63 bits. Use a shorter context, or check the ids."
        )
    return token_bits


def _require_cut(max_count: int) -> None:
    if isinstance(max_count, bool) or not isinstance(max_count, int) or max_count < 0:
        raise UserError(
            f"max_count is a whole number of occurrences, 0 or more, got {max_count!r}. For a "
            f"rate use max_count_from_rate(rate, num_train_tokens)."
        )
