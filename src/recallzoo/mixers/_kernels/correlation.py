"""Sums over shifted products of short rows: a Triton kernel.

    y[c, n] = sum over m of a[c, m] x[c, n + m]        SIGN = 1, x zero past its end
    y[c, n] = sum over m of a[c, m] x[c, n - m]        SIGN = -1, x zero before its start

As a matrix product this needs a Toeplitz matrix per row, which is read once for one product.

Letters  C rows, N their length.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
AT_ONCE = 8
"""Products that a program has under way together, to hide the latency of the cache."""


@triton.jit
def _correlate(
    a, x, y, N: tl.constexpr, SIGN: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * N
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, AT_ONCE):
        for j in tl.static_range(AT_ONCE):
            m = first + j
            weight = tl.load(a + start + m, mask=m < N, other=0.0)
            at = n + SIGN * m
            value = tl.load(x + start + at, mask=(at >= 0) & (at < N) & (m < N), other=0.0)
            total += weight * value
    tl.store(y + start + n, total, mask=n < N)


def correlate(a: Tensor, x: Tensor, sign: int) -> Tensor:
    """y [C, N] from contiguous a and x [C, N] in float32; `sign` is 1 or -1."""
    C, N = a.shape
    y = torch.empty_like(x)
    grid = (C, int(triton.cdiv(N, BLOCK)))
    _correlate[grid](a, x, y, N, sign, BLOCK=BLOCK, AT_ONCE=AT_ONCE, num_warps=4)
    return y
