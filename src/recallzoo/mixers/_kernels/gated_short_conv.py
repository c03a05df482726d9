"""Short filters and the first gate of Hyena in one pass: Triton kernels.

Channels come in thirds: a gate, a second gate, values. With c the filtered input of a third,

    forward    u = c_gate c_value,  gate2 = c_gate2
    backward   d_c_gate = d_u c_value,  d_c_value = d_u c_gate,  d_c_gate2 = d_gate2
               d_p[s] = sum over k of h[k] d_c[s + k]

A thread takes a chunk of VEC neighbouring positions, up to 16 bytes, in one aligned load, and keeps
each position in a register of its own. A shift is then a choice of registers; only the K - 1
positions on each side of a chunk are loaded again, from the cache. In code a chunk is a tuple whose
element i is a tensor, over CHUNKS chunks, of their ith positions.

A program takes CHUNKS chunks of one channel of each third, STEPS times. Filtered values that the
gradient needs beyond a chunk are computed again. Sums over positions (of taps and biases) stay with
their thread over all steps, and are added up over threads, then over programs, in a fixed order.

Letters  G groups, D width, N = B T positions, T time, K taps; SIDE >= K - 1 positions on each side
         of a chunk are loaded, PIECE at once.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false
# Triton's compiler adds tuples, and unpacks none into another.
# ruff: noqa: RUF005

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD = {"CHUNKS": 128, "num_warps": 4}
BACKWARD = {"CHUNKS": 64, "STEPS": 4, "num_warps": 1}
"""Each thread takes a chunk a step. Sums over the threads of a single warp need no barrier; they
take about as many instructions as half a step, which several steps share."""


@triton.jit
def _split(x, WIDTH: tl.constexpr):
    """The columns of x [CHUNKS, WIDTH] as a tuple; a power of two of them, which stay in the
    registers they are in."""
    if WIDTH == 1:
        columns = (tl.reshape(x, [x.shape[0]]),)
    else:
        halves = tl.permute(tl.reshape(x, [x.shape[0], 2, WIDTH // 2]), (0, 2, 1))
        low, high = tl.split(halves)
        columns = _split(low, WIDTH // 2) + _split(high, WIDTH // 2)
    return columns


@triton.jit
def _join(columns, WIDTH: tl.constexpr):
    """[CHUNKS, WIDTH] from its columns."""
    if WIDTH == 1:
        x = tl.expand_dims(columns[0], 1)
    else:
        low = _join(columns[: WIDTH // 2], WIDTH // 2)
        high = _join(columns[WIDTH // 2 :], WIDTH // 2)
        x = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [low.shape[0], WIDTH])
    return x


@triton.jit
def _load(at, there, WIDTH: tl.constexpr):
    """What is in WIDTH places from each `at` on, in float32; zero where not `there`."""
    value = tl.load(at[:, None] + tl.arange(0, WIDTH)[None, :], mask=there[:, None], other=0.0)
    return _split(value.to(tl.float32), WIDTH)


@triton.jit
def _store(at, inside, columns, WIDTH: tl.constexpr):
    """Write each row of `columns` to the WIDTH places from its `at` on."""
    value = _join(columns, WIDTH).to(at.dtype.element_ty)
    tl.store(at[:, None] + tl.arange(0, WIDTH)[None, :], value, mask=inside[:, None])


@triton.jit
def _with_later(
    at,
    t,
    inside,
    T: tl.constexpr,
    VEC: tl.constexpr,
    SIDE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """A chunk and the SIDE positions after it, zero beyond the sequence's end."""
    values = _load(at, inside, VEC)
    for ahead in tl.static_range(VEC, VEC + SIDE, PIECE):
        values = values + _load(at + ahead, inside & (t + ahead < T), PIECE)
    return values


@triton.jit
def _inputs(
    at,
    in_bias,
    t,
    inside,
    T: tl.constexpr,
    VEC: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    PIECE: tl.constexpr,
):
    """p + in_bias of a chunk, with BEFORE and AFTER positions on its sides: zero before the
    sequence, in_bias beyond its end, where nothing computed from it is used."""
    x = ()
    for back in tl.static_range(BEFORE, 0, -PIECE):
        there = inside & (t >= back)
        piece = _load(at - back, there, PIECE)
        for i in tl.static_range(PIECE):
            x = x + (tl.where(there, piece[i] + in_bias, 0.0),)
    rest = _with_later(at, t, inside, T, VEC, AFTER, PIECE)
    for i in tl.static_range(VEC + AFTER):
        x = x + (rest[i] + in_bias,)
    return x


@triton.jit
def _filtered(x, taps, bias, LENGTH: tl.constexpr, BEFORE: tl.constexpr, K: tl.constexpr):
    """The filter's output at LENGTH positions from the chunk's start on."""
    c = ()
    for i in tl.static_range(LENGTH):
        total = bias + taps[0] * x[BEFORE + i]
        for lag in tl.static_range(1, K):
            total += taps[lag] * x[BEFORE + i - lag]
        c = c + (total,)
    return c


@triton.jit
def _products(one, other, LENGTH: tl.constexpr):
    """The products of the first LENGTH elements of two tuples."""
    products = ()
    for i in tl.static_range(LENGTH):
        products = products + (one[i] * other[i],)
    return products


@triton.jit
def _taps(taps, row, K: tl.constexpr):
    """A channel's taps as a tuple."""
    weights = ()
    for lag in tl.static_range(K):
        weights = weights + (tl.load(taps + row * K + lag),)
    return weights


@triton.jit
def _gated_conv_forward(
    p,
    in_bias,
    taps,
    bias,
    u,
    gate2,
    D,
    chunks,
    T: tl.constexpr,
    K: tl.constexpr,
    VEC: tl.constexpr,
    SIDE: tl.constexpr,
    PIECE: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    block = tl.program_id(0)
    group = tl.program_id(2).to(tl.int64)
    channel = group * D + tl.program_id(1)
    row = channel + group * 2 * D
    row2 = row + D
    row3 = row + 2 * D
    N = chunks * VEC
    chunk = block * CHUNKS + tl.arange(0, CHUNKS)
    n = chunk * VEC
    t = n % T
    inside = chunk < chunks
    x = _inputs(p + row * N + n, tl.load(in_bias + row), t, inside, T, VEC, SIDE, 0, PIECE)
    x2 = _inputs(p + row2 * N + n, tl.load(in_bias + row2), t, inside, T, VEC, SIDE, 0, PIECE)
    x3 = _inputs(p + row3 * N + n, tl.load(in_bias + row3), t, inside, T, VEC, SIDE, 0, PIECE)
    c = _filtered(x, _taps(taps, row, K), tl.load(bias + row), VEC, SIDE, K)
    c2 = _filtered(x2, _taps(taps, row2, K), tl.load(bias + row2), VEC, SIDE, K)
    c3 = _filtered(x3, _taps(taps, row3, K), tl.load(bias + row3), VEC, SIDE, K)
    _store(u + channel * N + n, inside, _products(c, c3, VEC), VEC)
    _store(gate2 + channel * N + n, inside, c2, VEC)


@triton.jit
def _gradient(slope, taps, VEC: tl.constexpr, K: tl.constexpr):
    """The gradient of a chunk's inputs, from that of the filter's outputs there and later."""
    gradient = ()
    for i in tl.static_range(VEC):
        total = taps[0] * slope[i]
        for lag in tl.static_range(1, K):
            total += taps[lag] * slope[i + lag]
        gradient = gradient + (total,)
    return gradient


@triton.jit
def _zeros(CHUNKS: tl.constexpr, COUNT: tl.constexpr):
    """Sums to begin with: taps, bias, bias of the input."""
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([CHUNKS], tl.float32),)
    return zeros


@triton.jit
def _add(sums, slope, x, gradient, VEC: tl.constexpr, SIDE: tl.constexpr, K: tl.constexpr):
    """The sums with those of a chunk: the gradients of the taps, the bias, the input's bias."""
    added = ()
    for lag in tl.static_range(K):
        total = sums[lag]
        for i in tl.static_range(VEC):
            total += slope[i] * x[SIDE + i - lag]
        added = added + (total,)
    total = sums[K]
    total_in = sums[K + 1]
    for i in tl.static_range(VEC):
        total += slope[i]
        total_in += gradient[i]
    return added + (total, total_in)


@triton.jit
def _finish(sums, at, blocks, COUNT: tl.constexpr):
    """Store this program's sums, each `blocks` places after the one before."""
    for i in tl.static_range(COUNT):
        tl.store(at + i * blocks, tl.sum(sums[i], axis=0))


@triton.jit
def _gated_conv_backward(
    p,
    in_bias,
    taps,
    bias,
    d_u,
    d_gate2,
    d_p,
    sums,
    D,
    chunks,
    T: tl.constexpr,
    K: tl.constexpr,
    VEC: tl.constexpr,
    SIDE: tl.constexpr,
    PIECE: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
):
    block = tl.program_id(0)
    group = tl.program_id(2).to(tl.int64)
    channel = group * D + tl.program_id(1)
    row = channel + group * 2 * D
    row2 = row + D
    row3 = row + 2 * D
    N = chunks * VEC
    h = _taps(taps, row, K)
    h2 = _taps(taps, row2, K)
    h3 = _taps(taps, row3, K)
    b = tl.load(bias + row)
    b3 = tl.load(bias + row3)
    b_in = tl.load(in_bias + row)
    b_in2 = tl.load(in_bias + row2)
    b_in3 = tl.load(in_bias + row3)
    sums1 = _zeros(CHUNKS, K + 2)
    sums2 = _zeros(CHUNKS, K + 2)
    sums3 = _zeros(CHUNKS, K + 2)
    start = block * STEPS * CHUNKS
    for first in range(start, tl.minimum(start + STEPS * CHUNKS, chunks), CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        n = chunk * VEC
        t = n % T
        inside = chunk < chunks

        # Loads come before everything else, so that their waits overlap.
        x2 = _inputs(p + row2 * N + n, b_in2, t, inside, T, VEC, SIDE, 0, PIECE)
        x = _inputs(p + row * N + n, b_in, t, inside, T, VEC, SIDE, SIDE, PIECE)
        x3 = _inputs(p + row3 * N + n, b_in3, t, inside, T, VEC, SIDE, SIDE, PIECE)
        slope2 = _with_later(d_gate2 + channel * N + n, t, inside, T, VEC, SIDE, PIECE)
        d = _with_later(d_u + channel * N + n, t, inside, T, VEC, SIDE, PIECE)

        gradient2 = _gradient(slope2, h2, VEC, K)
        _store(d_p + row2 * N + n, inside, gradient2, VEC)
        sums2 = _add(sums2, slope2, x2, gradient2, VEC, SIDE, K)
        slope = _products(d, _filtered(x3, h3, b3, VEC + K - 1, SIDE, K), VEC + K - 1)
        gradient = _gradient(slope, h, VEC, K)
        _store(d_p + row * N + n, inside, gradient, VEC)
        sums1 = _add(sums1, slope, x, gradient, VEC, SIDE, K)
        slope3 = _products(d, _filtered(x, h, b, VEC + K - 1, SIDE, K), VEC + K - 1)
        gradient3 = _gradient(slope3, h3, VEC, K)
        _store(d_p + row3 * N + n, inside, gradient3, VEC)
        sums3 = _add(sums3, slope3, x3, gradient3, VEC, SIDE, K)
    blocks = tl.num_programs(0)
    at = sums + block
    _finish(sums1, at + row * (K + 2) * blocks, blocks, K + 2)
    _finish(sums2, at + row2 * (K + 2) * blocks, blocks, K + 2)
    _finish(sums3, at + row3 * (K + 2) * blocks, blocks, K + 2)


def _sizes(p: Tensor, K: int) -> dict[str, int]:
    """What a thread loads at once: chunks do not cross a sequence's ends, nor pieces a chunk's."""
    T = p.shape[-1]
    vec = math.gcd(T, 16 // p.element_size())
    piece = min(vec, int(triton.next_power_of_2(max(K - 1, 1))))
    return {"VEC": vec, "SIDE": int(triton.cdiv(K - 1, piece)) * piece, "PIECE": piece}


def forward(p: Tensor, in_bias: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """u and gate2 [G, D, B, T] in the dtype of p [G, 3 D, B, T], from taps [G, 3 D, K] and biases
    [G, 3 D] in float32; all contiguous."""
    G, width, B, T = p.shape
    D, K = width // 3, taps.shape[-1]
    u, gate2 = p.new_empty(G, D, B, T), p.new_empty(G, D, B, T)
    sizes = _sizes(p, K)
    chunks = B * T // sizes["VEC"]
    blocks = int(triton.cdiv(chunks, FORWARD["CHUNKS"]))
    _gated_conv_forward[(blocks, D, G)](
        *(p, in_bias, taps, bias, u, gate2),
        *(D, chunks, T, K),
        **sizes,
        **FORWARD,
    )
    return u, gate2


def backward(
    p: Tensor, in_bias: Tensor, taps: Tensor, bias: Tensor, d_u: Tensor, d_gate2: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of p, and those of taps, bias and in_bias side by side, [G, 3 D, K + 2]."""
    G, width, B, T = p.shape
    D, K = width // 3, taps.shape[-1]
    d_p = torch.empty_like(p)
    sizes = _sizes(p, K)
    chunks = B * T // sizes["VEC"]
    blocks = int(triton.cdiv(chunks, BACKWARD["CHUNKS"] * BACKWARD["STEPS"]))
    sums = torch.empty(G, width, K + 2, blocks, dtype=torch.float32, device=p.device)
    _gated_conv_backward[(blocks, D, G)](
        *(p, in_bias, taps, bias, d_u, d_gate2, d_p, sums),
        *(D, chunks, T, K),
        **sizes,
        **BACKWARD,
    )
    return d_p, sums.sum(-1)
