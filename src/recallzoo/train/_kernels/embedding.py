"""Token vectors of a pack, and their gradient: Triton kernels.

The gradient of a token is summed by atomic additions, and the filler token 0 stands at most
positions of a recall task: they would all queue for one row. So a block of positions first sums
what belongs to token 0 by itself, and adds it once.

Atomic additions come in any order, and sums of floating-point numbers depend on it: two equal runs
would part. So what is added is whole multiples of a unit, whose sums do not depend on the order. A
run's unit is the smallest power of 2 for which N terms as large as its largest cannot exceed 62
bits, so the largest is found first; a term is off by less than N 2^-60 of it. Where one is not
finite, all that the run adds is NaN.

Letters   R packed runs, N tokens of a batch, V vocabulary, E embedding width.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ELEMENTS = 8192
_INFINITY = tl.constexpr(0x7F800000)
"""Bits of a float32. Those of a larger magnitude are larger, and those of NaN larger than all."""


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
def _find_largest(d_vectors, largest, SIZE, scale, BLOCK: tl.constexpr):
    run = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = scale * tl.load(d_vectors + run * SIZE + at, mask=at < SIZE, other=0.0).to(tl.float32)
    magnitude = g.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(largest + run, tl.max(magnitude, axis=0), sem="relaxed")


@triton.jit
def _exponent(largest, LOG2_N: tl.constexpr):
    """Of the units in 1: N terms below 2^(e + 1), of exponent e, must stay below 2^62."""
    return tl.minimum(61 - LOG2_N - ((largest >> 23) - 127), 126)


@triton.jit
def _power_of_2(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _add_gradient(
    tokens,
    d_vectors,
    d_weight,
    totals,
    largest,
    scale,
    N,
    V,
    E,
    LOG2_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    run = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_E)
    inside = (row[:, None] < N) & (col[None, :] < E)
    token = tl.load(tokens + run * N + row, mask=row < N, other=0)
    to = run * V * E + token[:, None] * E + col[None, :]
    bits = tl.load(largest + run)
    if bits >= _INFINITY:
        tl.store(d_weight + to, float("nan"), mask=inside)
    else:
        at = d_vectors + (run * N + row[:, None]) * E + col[None, :]
        g = scale * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        g = g * _power_of_2(_exponent(bits, LOG2_N))
        is_filler = token[:, None] == 0
        filler = tl.sum(tl.where(is_filler, g, 0.0), axis=0)
        tl.atomic_add(totals + run * V * E + col, filler.to(tl.int64), mask=col < E, sem="relaxed")
        tl.atomic_add(totals + to, g.to(tl.int64), mask=inside & (is_filler == 0), sem="relaxed")


@triton.jit
def _settle(totals, d_weight, largest, SIZE, LOG2_N: tl.constexpr, BLOCK: tl.constexpr):
    run = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    unit = _power_of_2(-_exponent(tl.load(largest + run), LOG2_N))
    added = tl.load(totals + run * SIZE + at, mask=inside, other=0).to(tl.float32) * unit
    to = d_weight + run * SIZE + at
    tl.store(to, tl.load(to, mask=inside, other=0.0) + added, mask=inside)


def look_up(weight: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [R, V, E] at tokens [R, N], as `dtype`: [R, N, E]."""
    weight, tokens = weight.contiguous(), tokens.contiguous()
    (runs, vocab_size, width), num_tokens = weight.shape, tokens.shape[1]
    vectors = torch.empty(runs, num_tokens, width, dtype=dtype, device=weight.device)
    grid, sizes = _launch(runs, num_tokens, width)
    _look_up[grid](weight, tokens, vectors, num_tokens, vocab_size, width, **sizes)
    return vectors


def add_gradient(
    tokens: Tensor, d_vectors: Tensor, d_weight: Tensor, *, scale: float = 1.0
) -> None:
    """Add `scale` times the gradient of the vectors [R, N, E] to that of the weights [R, V, E],
    in float32."""
    tokens, d_vectors = tokens.contiguous(), d_vectors.contiguous()
    (runs, vocab_size, width), num_tokens = d_weight.shape, tokens.shape[1]
    totals = torch.zeros(d_weight.shape, dtype=torch.int64, device=d_weight.device)
    largest = torch.zeros(runs, dtype=torch.int32, device=d_weight.device)
    log2_n = (num_tokens - 1).bit_length()
    terms, size = num_tokens * width, vocab_size * width
    grid = (int(triton.cdiv(terms, _BLOCK_ELEMENTS)), runs)
    _find_largest[grid](d_vectors, largest, terms, scale, BLOCK=_BLOCK_ELEMENTS)
    grid, sizes = _launch(runs, num_tokens, width)
    shape = (num_tokens, vocab_size, width, log2_n)
    _add_gradient[grid](tokens, d_vectors, d_weight, totals, largest, scale, *shape, **sizes)
    grid = (int(triton.cdiv(size, 1024)), runs)
    _settle[grid](totals, d_weight, largest, size, log2_n, BLOCK=1024)


def _launch(runs: int, num_tokens: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    block_e = int(triton.next_power_of_2(width))
    block_n = max(1, min(128, _BLOCK_ELEMENTS // block_e))
    grid = (int(triton.cdiv(num_tokens, block_n)), runs)
    return grid, {"BLOCK_N": block_n, "BLOCK_E": block_e}
