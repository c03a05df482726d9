"""Some positions of a tensor whose channels come first, and the way back: Triton kernels.

    select   y[n, q, c] = z[c, n, p[n, q]]
    spread   d_z[c, n, t] = sum over the q with p[n, q] = t of d_y[n, q, c]

Both are products with one 1 a row, made where it is used: z is read and its gradient written once,
along rows of T. A value is moved as it is; where a position is asked for more than once, its
gradient is a sum in float32, in one order.

Letters   G groups, C channels, N sequences, T time, Q queries.
"""

# Launches take sizes as plain numbers.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 32
TIMES = 64
MAX_QUERIES = 64
"""Of a program. Products of tensor cores want 16 of each at least."""


@triton.jit
def _select(
    z, positions, y, C, N, T, Q,
    QUERIES: tl.constexpr, CHANNELS: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    q = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    position = tl.load(positions + sequence * Q + q, mask=q < Q, other=-1)
    row = z + ((sequence // N * C + c) * N + sequence % N) * T
    total = tl.zeros([CHANNELS, QUERIES], tl.float32)
    for start in range(0, T, TIMES):
        t = start + tl.arange(0, TIMES)
        inside = (c < C)[:, None] & (t < T)[None, :]
        values = tl.load(row[:, None] + t[None, :], mask=inside, other=0.0)
        chosen = (t[:, None] == position[None, :]).to(values.dtype)
        total = tl.dot(values, chosen, total, input_precision="ieee")
    at = y + (sequence * Q + q[None, :]) * C + c[:, None]
    inside = (c < C)[:, None] & (q < Q)[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _spread(
    d_y, positions, d_z, C, N, T, Q,
    QUERIES: tl.constexpr, CHANNELS: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    t = tl.program_id(2) * TIMES + tl.arange(0, TIMES)
    total = tl.zeros([CHANNELS, TIMES], tl.float32)
    for start in range(0, Q, QUERIES):
        q = start + tl.arange(0, QUERIES)
        position = tl.load(positions + sequence * Q + q, mask=q < Q, other=-1)
        inside = (c < C)[:, None] & (q < Q)[None, :]
        given = d_y + (sequence * Q + q[None, :]) * C + c[:, None]
        values = tl.load(given, mask=inside, other=0.0)
        chosen = (position[:, None] == t[None, :]).to(values.dtype)
        total = tl.dot(values, chosen, total, input_precision="ieee")
    row = d_z + ((sequence // N * C + c) * N + sequence % N) * T
    inside = (c < C)[:, None] & (t < T)[None, :]
    tl.store(row[:, None] + t[None, :], total.to(d_z.dtype.element_ty), mask=inside)


def select(z: Tensor, positions: Tensor) -> Tensor:
    """[G, N, Q, C] from z [G, C, N, T] and positions [G, N, Q], contiguous."""
    G, C, N, T = z.shape
    Q = positions.shape[-1]
    y = z.new_empty(G, N, Q, C)
    queries = _queries(Q)
    grid = (G * N, int(triton.cdiv(C, CHANNELS)), int(triton.cdiv(Q, queries)))
    _select[grid](z, positions, y, C, N, T, Q, queries, CHANNELS, TIMES)
    return y


def spread(d_y: Tensor, positions: Tensor, seq_len: int) -> Tensor:
    """d_z [G, C, N, T] from d_y [G, N, Q, C] and positions [G, N, Q], contiguous."""
    G, N, Q, C = d_y.shape
    d_z = torch.empty(G, C, N, seq_len, dtype=d_y.dtype, device=d_y.device)
    grid = (G * N, int(triton.cdiv(C, CHANNELS)), int(triton.cdiv(seq_len, TIMES)))
    _spread[grid](d_y, positions, d_z, C, N, seq_len, Q, _queries(Q), CHANNELS, TIMES)
    return d_z


def _queries(num_queries: int) -> int:
    return max(16, min(MAX_QUERIES, int(triton.next_power_of_2(num_queries))))
