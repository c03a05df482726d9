"""Token vectors of a pack, and their gradient: Triton kernels.

The gradient of a token is summed by atomic additions, and the filler token 0 stands at most
positions of a recall task: they would all queue for one row. So a block of positions first sums
what belongs to token 0 by itself, and adds it once.

Atomic additions come in any order, and sums of floating-point numbers depend on it: two equal runs
would part. So what is added is whole multiples of 2^-44, whose sums do not depend on the order and
hold up to 2^19. Where one of N terms is 2^19 / N or more, so that a sum might not hold, or is not
finite, the gradient is NaN: the run is marked as diverged rather than trained on a wrong one.

Letters   R packed runs, N tokens of a batch, V vocabulary, E embedding width.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ELEMENTS = 8192
_UNITS = tl.constexpr(2.0**44)
_HOLDS = 2.0**19


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
def _add_gradient(
    tokens,
    d_vectors,
    d_weight,
    totals,
    scale,
    limit,
    N,
    V,
    E,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    run = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_E)
    inside = (row[:, None] < N) & (col[None, :] < E)
    token = tl.load(tokens + run * N + row, mask=row < N, other=0)
    at = d_vectors + (run * N + row[:, None]) * E + col[None, :]
    g = scale * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    to = run * V * E + token[:, None] * E + col[None, :]
    holds = tl.abs(g) < limit
    tl.store(d_weight + to, float("nan"), mask=inside & (holds == 0))
    g = tl.where(holds, g, 0.0) * _UNITS
    is_filler = token[:, None] == 0
    filler = tl.sum(tl.where(is_filler, g, 0.0), axis=0)
    tl.atomic_add(totals + run * V * E + col, filler.to(tl.int64), mask=col < E, sem="relaxed")
    tl.atomic_add(totals + to, g.to(tl.int64), mask=inside & (is_filler == 0), sem="relaxed")


@triton.jit
def _settle(totals, d_weight, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    added = tl.load(totals + at, mask=inside, other=0).to(tl.float32) * (1.0 / _UNITS)
    tl.store(d_weight + at, tl.load(d_weight + at, mask=inside, other=0.0) + added, mask=inside)


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
    grid, sizes = _launch(runs, num_tokens, width)
    limit, shape = _HOLDS / num_tokens, (num_tokens, vocab_size, width)
    _add_gradient[grid](tokens, d_vectors, d_weight, totals, scale, limit, *shape, **sizes)
    size = d_weight.numel()
    _settle[(int(triton.cdiv(size, 1024)),)](totals, d_weight, size, BLOCK=1024)


def _launch(runs: int, num_tokens: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    block_e = int(triton.next_power_of_2(width))
    block_n = max(1, min(128, _BLOCK_ELEMENTS // block_e))
    grid = (int(triton.cdiv(num_tokens, block_n)), runs)
    return grid, {"BLOCK_N": block_n, "BLOCK_E": block_e}
