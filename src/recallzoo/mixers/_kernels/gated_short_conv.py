"""Short filters and the first gate of Hyena in one pass: Triton kernels.

Channels come in thirds: a gate, a second gate, values. With c the filtered input of a third,

    forward    u = c_gate c_value,  gate2 = c_gate2
    backward   d_c_gate = d_u c_value,  d_c_value = d_u c_gate,  d_c_gate2 = d_gate2
               d_p[s] = sum over k of h[k] d_c[s + k]

A program takes BLOCK positions of one channel of each third. Filtered values that the gradient
needs at later positions are computed again from the inputs, which lie in the cache. Sums over
positions (of taps and biases) are left as one number a program, and added up in a fixed order.

Letters  G groups, D width, N = B T positions, T time, K taps.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD = {"BLOCK": 1024, "num_warps": 4}
BACKWARD = {"BLOCK": 512, "num_warps": 2}


@triton.jit
def _input(p, in_bias, row, n, t, inside, offset: tl.constexpr, N, T: tl.constexpr):
    """p + in_bias `offset` positions on from n, zero outside of the sequence."""
    there = inside & (t + offset >= 0) & (t + offset < T)
    value = tl.load(p + row * N + n + offset, mask=there, other=0.0).to(tl.float32)
    return tl.where(there, value + tl.load(in_bias + row), 0.0)


@triton.jit
def _filtered(
    p,
    in_bias,
    taps,
    bias,
    row,
    n,
    t,
    inside,
    offset: tl.constexpr,
    N,
    T: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The filter's output `offset` positions on from n."""
    total = tl.zeros([BLOCK], tl.float32) + tl.load(bias + row)
    for lag in tl.static_range(K):
        weight = tl.load(taps + row * K + lag)
        total += weight * _input(p, in_bias, row, n, t, inside, offset - lag, N, T)
    return total


@triton.jit
def _forward(
    p,
    in_bias,
    taps,
    bias,
    u,
    gate2,
    D,
    N,
    T: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64)
    row = channel // D * 3 * D + channel % D
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    t = n % T
    inside = n < N
    c_gate = _filtered(p, in_bias, taps, bias, row, n, t, inside, 0, N, T, K, BLOCK)
    c_value = _filtered(p, in_bias, taps, bias, row + 2 * D, n, t, inside, 0, N, T, K, BLOCK)
    tl.store(u + channel * N + n, (c_gate * c_value).to(u.dtype.element_ty), mask=inside)
    c_gate2 = _filtered(p, in_bias, taps, bias, row + D, n, t, inside, 0, N, T, K, BLOCK)
    tl.store(gate2 + channel * N + n, c_gate2.to(gate2.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    p,
    in_bias,
    d_p,
    sums,
    row,
    n,
    t,
    inside,
    slope,
    gradient,
    N,
    T: tl.constexpr,
    K: tl.constexpr,
):
    """Store the inputs' gradient and this program's sums: taps, bias, bias of the input."""
    tl.store(d_p + row * N + n, gradient.to(d_p.dtype.element_ty), mask=inside)
    blocks = tl.num_programs(1)
    at = sums + row * (K + 2) * blocks + tl.program_id(1)
    for lag in tl.static_range(K):
        value = _input(p, in_bias, row, n, t, inside, -lag, N, T)
        tl.store(at + lag * blocks, tl.sum(slope * value, axis=0))
    tl.store(at + K * blocks, tl.sum(slope, axis=0))
    tl.store(at + (K + 1) * blocks, tl.sum(gradient, axis=0))


@triton.jit
def _backward(
    p,
    in_bias,
    taps,
    bias,
    d_u,
    d_gate2,
    d_p,
    sums,
    D,
    N,
    T: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64)
    row = channel // D * 3 * D + channel % D
    row2 = row + D
    row3 = row + 2 * D
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    t = n % T
    inside = n < N

    slope2 = tl.load(d_gate2 + channel * N + n, mask=inside, other=0.0).to(tl.float32)
    gradient2 = tl.load(taps + row2 * K) * slope2
    for lag in tl.static_range(1, K):
        there = inside & (t + lag < T)
        later = tl.load(d_gate2 + channel * N + n + lag, mask=there, other=0.0).to(tl.float32)
        gradient2 += tl.load(taps + row2 * K + lag) * later
    _finish(p, in_bias, d_p, sums, row2, n, t, inside, slope2, gradient2, N, T, K)

    given = tl.load(d_u + channel * N + n, mask=inside, other=0.0).to(tl.float32)
    slope = given * _filtered(p, in_bias, taps, bias, row3, n, t, inside, 0, N, T, K, BLOCK)
    slope3 = given * _filtered(p, in_bias, taps, bias, row, n, t, inside, 0, N, T, K, BLOCK)
    gradient = tl.load(taps + row * K) * slope
    gradient3 = tl.load(taps + row3 * K) * slope3
    for lag in tl.static_range(1, K):
        there = inside & (t + lag < T)
        given = tl.load(d_u + channel * N + n + lag, mask=there, other=0.0).to(tl.float32)
        c_value = _filtered(p, in_bias, taps, bias, row3, n, t, inside, lag, N, T, K, BLOCK)
        c_gate = _filtered(p, in_bias, taps, bias, row, n, t, inside, lag, N, T, K, BLOCK)
        gradient += tl.load(taps + row * K + lag) * given * c_value
        gradient3 += tl.load(taps + row3 * K + lag) * given * c_gate
    _finish(p, in_bias, d_p, sums, row, n, t, inside, slope, gradient, N, T, K)
    _finish(p, in_bias, d_p, sums, row3, n, t, inside, slope3, gradient3, N, T, K)


def forward(p: Tensor, in_bias: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """u and gate2 [G, D, B, T] in the dtype of p [G, 3 D, B, T], from taps [G, 3 D, K] and biases
    [G, 3 D] in float32; all contiguous."""
    G, width, B, T = p.shape
    D, K = width // 3, taps.shape[-1]
    u, gate2 = p.new_empty(G, D, B, T), p.new_empty(G, D, B, T)
    grid = (G * D, int(triton.cdiv(B * T, FORWARD["BLOCK"])))
    _forward[grid](p, in_bias, taps, bias, u, gate2, D, B * T, T, K, **FORWARD)
    return u, gate2


def backward(
    p: Tensor, in_bias: Tensor, taps: Tensor, bias: Tensor, d_u: Tensor, d_gate2: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of p, and those of taps, bias and in_bias side by side, [G, 3 D, K + 2]."""
    G, width, B, T = p.shape
    D, K = width // 3, taps.shape[-1]
    d_p = torch.empty_like(p)
    blocks = int(triton.cdiv(B * T, BACKWARD["BLOCK"]))
    sums = torch.empty(G, width, K + 2, blocks, dtype=torch.float32, device=p.device)
    _backward[(G * D, blocks)](
        *(p, in_bias, taps, bias, d_u, d_gate2, d_p, sums),
        *(D, B * T, T, K),
        **BACKWARD,
    )
    return d_p, sums.sum(-1)
