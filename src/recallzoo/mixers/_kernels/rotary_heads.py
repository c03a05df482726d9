"""A packed projection turned by its positions and taken apart, and its gradient: a Triton kernel.

    q, k, v  <-  [q | k | v][t], of q and k each pair (i, i + half) of a head turned by a[t, i]

Written out, the gradient is joined by a kernel that asks of every element where it is from. One
program moves a tile of all three, forwards or back; back, it turns the other way.

Letters   N sequences, T time, D width, half the pairs of a head.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

ROWS, PAIRS = 8, 128
"""Positions and pairs of a tile."""


@triton.jit
def _turn(
    packed, q, k, v, cos, sin, NT, T, D, BACK: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    inside = (row < NT)[:, None] & (pair < D // 2)[None, :]
    i = pair % HALF
    first = (pair // HALF) * (2 * HALF) + i
    angle = (row % T)[:, None] * HALF + i[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    if BACK:
        s = -s
    at = row[:, None] * D + first[None, :]
    packed += row[:, None] * (3 * D) + first[None, :]
    for part in tl.static_range(3):
        apart = q if part == 0 else (k if part == 1 else v)
        source = apart + at if BACK else packed + part * D
        target = packed + part * D if BACK else apart + at
        x = tl.load(source, mask=inside, other=0.0)
        y = tl.load(source + HALF, mask=inside, other=0.0)
        if part < 2:
            x, y = x.to(tl.float32), y.to(tl.float32)
            x, y = x * c - y * s, y * c + x * s
        tl.store(target, x.to(target.dtype.element_ty), mask=inside)
        tl.store(target + HALF, y.to(target.dtype.element_ty), mask=inside)


def apart(packed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [N, T, D] from the packed projection [N, T, 3 D] and tables [T, half]."""
    q, k, v = (packed.new_empty(*packed.shape[:2], packed.shape[2] // 3) for _ in range(3))
    _launch(packed, q, k, v, cos, sin, back=False)
    return q, k, v


def together(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of the packed projection."""
    d_packed = d_q.new_empty(*d_q.shape[:2], 3 * d_q.shape[2])
    _launch(d_packed, d_q, d_k, d_v, cos, sin, back=True)
    return d_packed


def _launch(
    packed: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, back: bool
) -> None:
    N, T, D = q.shape
    grid = (int(triton.cdiv(N * T, ROWS)), int(triton.cdiv(D // 2, PAIRS)))
    _turn[grid](
        packed, q, k, v, cos, sin, N * T, T, D, BACK=back, HALF=cos.shape[1], ROWS=ROWS,
        PAIRS=PAIRS,
    )  # fmt: skip
