"""Token vectors of a pack, and their gradient: Triton kernels.

The gradient of a word is the sum of those of its positions. Sums of floating-point numbers depend
on their order, so that atomic additions would let two equal runs part. Here the positions of a
pack are sorted by run and word, and a word's are added up in the order of the batch; what is not
finite spoils its word alone.

    blocks   each sums BLOCK sorted positions by word. A word that begins and ends in a block is
             added to the gradient there and then; of one that goes on in the next block or came
             from the one before, the block keeps the part.
    parts    the block in which such a word begins adds up its parts and then adds their sum. The
             filler token 0 stands at most positions of a recall task and has hundreds of parts,
             which are read side by side.

A run's blocks are counted from its own first position, so that no sum depends on other runs.

Letters   R packed runs, N tokens of a batch, V vocabulary, E embedding width.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ELEMENTS = 8192
_BLOCK = 128
"""Sorted positions of a block. More leave fewer parts, and fewer blocks to wait for memory with."""
_WARP_ELEMENTS = 2048
"""Of positions times channels that a warp sums at once: 64 registers of a thread, and as many for
the rows that these are added to."""
_PARTS_ELEMENTS = 8192
_MAX_WIDTH = 128
"""Channels of a program: 4 for each thread of a warp, the most that one access of float32 takes."""


@triton.jit
def _look_up(weight, tokens, vectors, N, V, E, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    run = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_E)
    inside = (row[:, None] < N) & (col[None, :] < E)
    token = tl.load(tokens + run * N + row, mask=row < N, other=0)
    x = tl.load(weight + (run * V + token[:, None]) * E + col[None, :], mask=inside, other=0.0)
    at = vectors + (run * N + row[:, None]) * E + col[None, :]
    tl.store(at, x.to(vectors.dtype.element_ty), mask=inside)


@triton.jit
def _join(sum_a, word_a, sum_b, word_b):
    """Of two stretches, one after the other: the sum over the last word's positions."""
    return tl.where(word_a == word_b, sum_a + sum_b, sum_b), word_b


@triton.jit
def _columns(E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Those of this program; a thread has as many as let a warp hold rows whole, so that rows are
    summed within threads."""
    col = tl.max_contiguous(tl.arange(0, BLOCK_E), [BLOCK_E // 32 if BLOCK_E > 32 else 1])
    return tl.program_id(0) % tl.cdiv(E, BLOCK_E) * BLOCK_E + col


@triton.jit
def _sum_blocks(
    words,
    order,
    d_vectors,
    d_weight,
    parts,
    scale,
    N,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    run = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) // tl.cdiv(E, BLOCK_E)
    col = _columns(E, BLOCK_E)
    words += run * N
    part_here = parts + (run * tl.cdiv(N, BLOCK) + block) * 2 * E + col
    begin = block * BLOCK
    word_before = tl.load(words + begin - 1, mask=begin > 0, other=-1)
    row = tl.arange(0, BLOCK_N)
    carry = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, BLOCK, BLOCK_N):
        at = begin + start + row
        word = tl.load(words + at, mask=at < N, other=-1)
        word_after = tl.load(words + at + 1, mask=at + 1 < N, other=-1)
        goes_on = tl.load(words + at - 1, mask=(at > 0) & (at < N), other=-1) == word
        inside = (at < N)[:, None] & (col < E)[None, :]
        source = tl.load(order + run * N + at, mask=at < N, other=0)
        g = tl.load(d_vectors + source[:, None] * E + col[None, :], mask=inside, other=0.0)
        g = g.to(tl.float32)
        g = tl.where(((row == 0) & goes_on)[:, None], g + carry[None, :], g)
        word_of_each = tl.broadcast_to(word[:, None], [BLOCK_N, BLOCK_E])
        sums, _ = tl.associative_scan((g, word_of_each), 0, _join)
        ends = (at < N) & (word != word_after)
        if tl.max(ends.to(tl.int32), axis=0) > 0:
            is_begun = ends & (word == word_before)
            is_whole = ends & (word != word_before)
            in_width = (col < E)[None, :]
            part = part_here[None, :] + row[:, None] * 0  # of one row at most
            tl.store(part, sums, mask=is_begun[:, None] & in_width)
            to = d_weight + word.to(tl.int64)[:, None] * E + col[None, :]
            old = tl.load(to, mask=is_whole[:, None] & in_width, other=0.0)
            tl.store(to, old + scale * sums, mask=is_whole[:, None] & in_width)
        carry = tl.sum(tl.where((row == BLOCK_N - 1)[:, None], sums, 0.0), axis=0)
    end = begin + BLOCK
    if end < N:
        word = tl.load(words + end - 1)
        if word == tl.load(words + end):
            begins_here = (word != word_before).to(tl.int32)
            tl.store(part_here + begins_here * E, carry, mask=col < E)


@triton.jit
def _sum_parts(
    words,
    parts,
    d_weight,
    scale,
    N,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    run = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) // tl.cdiv(E, BLOCK_E)
    col = _columns(E, BLOCK_E)
    num_blocks = tl.cdiv(N, BLOCK)
    words += run * N
    parts += run * num_blocks * 2 * E
    begin = block * BLOCK
    word = tl.load(words + begin + BLOCK - 1)
    begins_here = tl.load(words + begin - 1, mask=begin > 0, other=-1) != word
    if begins_here & (tl.load(words + begin + BLOCK) == word):
        total = tl.load(parts + (block * 2 + 1) * E + col, mask=col < E, other=0.0)
        row = tl.arange(0, BLOCK_N)
        first = block + 1
        # Triton's compiler fails at a loop that hands its body less than its condition reads.
        while first < num_blocks:
            later = first + row
            goes_on = tl.load(words + later * BLOCK, mask=later < num_blocks, other=-1) == word
            part = parts + (later * 2)[:, None] * E + col[None, :]
            inside = goes_on[:, None] & (col < E)[None, :]
            total += tl.sum(tl.load(part, mask=inside, other=0.0), axis=0)
            first += BLOCK_N
            next_word = tl.load(words + first * BLOCK, mask=first < num_blocks, other=-1)
            first = tl.where(next_word == word, first, num_blocks)
        to = d_weight + word.to(tl.int64) * E + col
        old = tl.load(to, mask=col < E, other=0.0)
        tl.store(to, old + scale * total, mask=col < E)


def look_up(weight: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [R, V, E] at tokens [R, N], as `dtype`: [R, N, E]."""
    weight, tokens = weight.contiguous(), tokens.contiguous()
    (runs, vocab_size, width), num_tokens = weight.shape, tokens.shape[1]
    vectors = torch.empty(runs, num_tokens, width, dtype=dtype, device=weight.device)
    block_e = int(triton.next_power_of_2(width))
    block_n = max(1, min(128, _BLOCK_ELEMENTS // block_e))
    grid = (int(triton.cdiv(num_tokens, block_n)), runs)
    shape = (num_tokens, vocab_size, width)
    _look_up[grid](weight, tokens, vectors, *shape, BLOCK_N=block_n, BLOCK_E=block_e)
    return vectors


def add_gradient(
    tokens: Tensor, d_vectors: Tensor, d_weight: Tensor, *, scale: float = 1.0
) -> None:
    """Add `scale` times the gradient of the vectors [R, N, E] to that of the weights [R, V, E],
    in float32 and contiguous. The same numbers give the same bits. Tokens are words of the
    vocabulary: others would be added to another run's."""
    assert d_weight.is_contiguous(), "d_weight is added to in place, row by row"
    d_vectors = d_vectors.contiguous()
    (runs, vocab_size, width), num_tokens = d_weight.shape, tokens.shape[1]
    words, order = _sorted_by_word(tokens, vocab_size)
    blocks = int(triton.cdiv(num_tokens, _BLOCK))
    parts = torch.empty(runs, blocks, 2, width, device=d_weight.device)
    block_e = min(_MAX_WIDTH, int(triton.next_power_of_2(width)))
    slices = int(triton.cdiv(width, block_e))
    sizes = {"BLOCK": _BLOCK, "BLOCK_E": block_e}
    rows = min(_BLOCK, max(1, _WARP_ELEMENTS // block_e))
    _sum_blocks[blocks * slices, runs](
        *(words, order, d_vectors, d_weight, parts, scale, num_tokens, width),
        **sizes,
        BLOCK_N=rows,
        num_warps=1,
    )
    if blocks > 1:
        _sum_parts[(blocks - 1) * slices, runs](
            *(words, parts, d_weight, scale, num_tokens, width),
            **sizes,
            BLOCK_N=max(1, _PARTS_ELEMENTS // block_e),
            num_warps=4,
        )


def _sorted_by_word(tokens: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Rows of the runs' tables, one below the other, in ascending order, and the positions
    [R * N] that they belong to, those of a word in their own order."""
    num_rows = len(tokens) * vocab_size
    # A radix sort passes over the keys once for each of their bytes.
    dtype = torch.int32 if num_rows < 2**31 else torch.int64
    words = torch.empty(tokens.shape, dtype=dtype, device=tokens.device)
    first_rows = torch.arange(0, num_rows, vocab_size, device=tokens.device)
    torch.add(tokens, first_rows[:, None], out=words)
    # As one list: PyTorch sorts rows of a matrix twice.
    return torch.sort(words.flatten(), stable=True)
