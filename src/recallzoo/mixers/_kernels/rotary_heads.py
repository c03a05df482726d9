"""A packed projection turned by its positions and taken apart, and its gradient: a Triton kernel.

    q, k, v  <-  [q | k | v][t], of q and k each pair (i, i + half), i < half, of a head turned by
                                 a[t, i], and a head's channels from 2 half on as they are

Written out, the gradient is joined by a kernel that asks of every element where it is from. One
program moves a tile of all three, forwards or back; back, it turns the other way. What is not
turned moves in pairs too, (i, i + rest): where half and rest are multiples of 8, the eight pairs of
a thread are next to each other in both halves, and the compiler moves 16 bytes at once.

Letters   N sequences, T time, D width, H heads of K channels (K even), half the pairs of a head
          that are turned, rest = K / 2 - half those that are not.
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
    packed, q, k, v, cos, sin, NT, T, H, BACK: tl.constexpr, HALF: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    REST: tl.constexpr = K // 2 - HALF
    D = H * K
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    inside = (row < NT)[:, None] & (pair < H * (K // 2))[None, :]
    i = pair % (K // 2)
    is_turned = i < HALF
    first = (pair // (K // 2)) * K + i + tl.where(is_turned, 0, HALF)
    second = first + tl.where(is_turned, HALF, REST)
    angle = (row % T)[:, None] * HALF + i[None, :]
    has_angle = inside & is_turned[None, :]
    c = tl.load(cos + angle, mask=has_angle, other=1.0)
    s = tl.load(sin + angle, mask=has_angle, other=0.0)
    if BACK:
        s = -s
    at = row[:, None] * D
    packed += row[:, None] * (3 * D)
    for part in tl.static_range(3):
        apart = q if part == 0 else (k if part == 1 else v)
        source = apart + at if BACK else packed + part * D
        target = packed + part * D if BACK else apart + at
        x = tl.load(source + first[None, :], mask=inside, other=0.0)
        y = tl.load(source + second[None, :], mask=inside, other=0.0)
        if part < 2:
            x, y = x.to(tl.float32), y.to(tl.float32)
            a, b = x * c - y * s, y * c + x * s
            # Chosen, not left to c = 1 and s = 0: an infinite channel would spoil its neighbour.
            x = tl.where(is_turned[None, :], a, x)
            y = tl.where(is_turned[None, :], b, y)
        tl.store(target + first[None, :], x.to(target.dtype.element_ty), mask=inside)
        tl.store(target + second[None, :], y.to(target.dtype.element_ty), mask=inside)


def apart(
    packed: Tensor, cos: Tensor, sin: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [N, T, D] from the packed projection [N, T, 3 D] and tables [T, half]."""
    q, k, v = (packed.new_empty(*packed.shape[:2], packed.shape[2] // 3) for _ in range(3))
    _launch(packed, q, k, v, cos, sin, num_heads, back=False)
    return q, k, v


def together(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, num_heads: int
) -> Tensor:
    """The gradient of the packed projection."""
    d_packed = d_q.new_empty(*d_q.shape[:2], 3 * d_q.shape[2])
    _launch(d_packed, d_q, d_k, d_v, cos, sin, num_heads, back=True)
    return d_packed


def _launch(
    packed: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    *,
    back: bool,
) -> None:
    N, T, D = q.shape
    head_dim, half = D // num_heads, cos.shape[1]
    grid = (int(triton.cdiv(N * T, ROWS)), int(triton.cdiv(D // 2, PAIRS)))
    _turn[grid](
        packed, q, k, v, cos, sin, N * T, T, num_heads, BACK=back, HALF=half, K=head_dim,
        ROWS=ROWS, PAIRS=PAIRS,
    )  # fmt: skip
