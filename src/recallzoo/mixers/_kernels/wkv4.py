"""RWKV-4's weighted mean as a scan in registers: Triton kernels.

A program keeps the sums of one sequence and a block of channels, a channel to a thread, so that no
thread reads what another wrote. Positions come in chunks, whose rows are all asked for before the
first is needed. The forward pass stores the sums before each chunk. The backward pass goes through
the chunks from the last: it scans a chunk again from there, keeping the sums before each position
in registers, then runs back in time with

    G[t-1] = g[t] / den[t] (1, -y[t]) + e^-w G[t],        d w = - sum over t of e^-w G[t] . sums[t]

Every sum carries its largest exponent, as in `rwkv4._decayed_sums`, here in powers of 2.

Letters   N sequences, T time, D width, G groups of sequences with weights of their own, C chunks.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# The compiler knows no unpacking of tuples.
# ruff: noqa: RUF005

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16
"""Positions from one stored state to the next. The backward pass holds three numbers for each of
them in registers; the states take 12 / CHUNK bytes a position and channel, written and read."""
BLOCK = 32
"""Channels of a program."""
LOG2E = tl.constexpr(1.4426950408889634)
EMPTY = tl.constexpr(-1e38)
"""The exponent of a sum without terms. Finite, so that differences of two stay numbers."""


@triton.jit
def _shares(a, b):
    """The larger of two exponents, and 2^(a - larger), 2^(b - larger)."""
    apart = a - b
    smaller = tl.exp2(-tl.abs(apart))
    return tl.maximum(a, b), tl.where(apart >= 0, 1.0, smaller), tl.where(apart >= 0, smaller, 1.0)


@triton.jit
def _rows(pointer, start, T, D, inside, ROWS: tl.constexpr):
    """Rows from `start` on, 0 from T on."""
    rows = ()
    for j in tl.static_range(ROWS):
        rows = rows + (tl.load(pointer + j * D, mask=inside & (start + j < T), other=0.0),)
    return rows


@triton.jit
def _forward(
    k,
    v,
    decay,
    first,
    y,
    states,
    PER_GROUP,
    T: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    chunks: tl.constexpr = (T + ROWS - 1) // ROWS
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = col < D
    w = tl.load(decay + sequence // PER_GROUP * D + col, mask=inside, other=0.0) * LOG2E
    u = tl.load(first + sequence // PER_GROUP * D + col, mask=inside, other=0.0) * LOG2E
    total = tl.zeros([BLOCK], tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    exponent = tl.full([BLOCK], EMPTY, tl.float32)
    for chunk in range(chunks):
        start = chunk * ROWS
        state = states + (sequence * chunks + chunk) * 3 * D + col
        tl.store(state, total, mask=inside)
        tl.store(state + D, weight, mask=inside)
        tl.store(state + 2 * D, exponent, mask=inside)
        at = (sequence * T + start) * D + col
        keys = _rows(k + at, start, T, D, inside, ROWS)
        values = _rows(v + at, start, T, D, inside, ROWS)
        for j in tl.static_range(ROWS):
            key, value = keys[j].to(tl.float32) * LOG2E, values[j].to(tl.float32)
            _, past, now = _shares(exponent, key + u)
            out = (past * total + now * value) / (past * weight + now)
            here = inside & (start + j < T)
            tl.store(y + at + j * D, out.to(y.dtype.element_ty), mask=here)
            exponent, past, now = _shares(exponent - w, key)
            total = past * total + now * value
            weight = past * weight + now


@triton.jit
def _backward(
    k,
    v,
    decay,
    first,
    states,
    d_y,
    d_k,
    d_v,
    d_decay,
    d_first,
    PER_GROUP,
    T: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    chunks: tl.constexpr = (T + ROWS - 1) // ROWS
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = col < D
    w = tl.load(decay + sequence // PER_GROUP * D + col, mask=inside, other=0.0) * LOG2E
    u = tl.load(first + sequence // PER_GROUP * D + col, mask=inside, other=0.0) * LOG2E
    g_total = tl.zeros([BLOCK], tl.float32)
    g_weight = tl.zeros([BLOCK], tl.float32)
    g_exponent = tl.full([BLOCK], EMPTY, tl.float32)
    sum_decay = tl.zeros([BLOCK], tl.float32)
    sum_first = tl.zeros([BLOCK], tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        start = chunk * ROWS
        at = (sequence * T + start) * D + col
        keys = _rows(k + at, start, T, D, inside, ROWS)
        values = _rows(v + at, start, T, D, inside, ROWS)
        givens = _rows(d_y + at, start, T, D, inside, ROWS)
        state = states + (sequence * chunks + chunk) * 3 * D + col
        total = tl.load(state, mask=inside, other=0.0)
        weight = tl.load(state + D, mask=inside, other=0.0)
        exponent = tl.load(state + 2 * D, mask=inside, other=0.0)
        totals, weights, exponents = (total,), (weight,), (exponent,)
        for j in tl.static_range(ROWS - 1):
            key, value = keys[j].to(tl.float32) * LOG2E, values[j].to(tl.float32)
            exponent, past, now = _shares(exponent - w, key)
            total = past * total + now * value
            weight = past * weight + now
            totals, weights = totals + (total,), weights + (weight,)
            exponents = exponents + (exponent,)
        for j in tl.static_range(ROWS - 1, -1, -1):
            here = inside & (start + j < T)
            key, value = keys[j].to(tl.float32) * LOG2E, values[j].to(tl.float32)
            largest, past, now = _shares(exponents[j], key + u)
            inverse = 1.0 / (past * weights[j] + now)
            out = (past * totals[j] + now * value) * inverse
            scaled = givens[j].to(tl.float32) * inverse
            direct = now * scaled
            slope = direct * (value - out)
            sum_first += slope
            # No term of G is larger than 2^-exponent of the sums that it meets, nor than 2^-key.
            kept = tl.exp2(g_exponent - w + exponents[j])
            sum_decay -= kept * (g_total * totals[j] + g_weight * weights[j])
            later = tl.exp2(key + g_exponent)
            key_gradient = slope + later * (g_total * value + g_weight)
            tl.store(d_k + at + j * D, key_gradient.to(d_k.dtype.element_ty), mask=here)
            value_gradient = direct + later * g_total
            tl.store(d_v + at + j * D, value_gradient.to(d_v.dtype.element_ty), mask=here)
            common, keep, add = _shares(g_exponent - w, -largest)
            add *= scaled
            g_total = keep * g_total + add
            g_weight = keep * g_weight - add * out
            g_exponent = tl.where(start + j < T, common, EMPTY)
    tl.store(d_decay + sequence * D + col, sum_decay, mask=inside)
    tl.store(d_first + sequence * D + col, sum_first, mask=inside)


def state_shape(num_sequences: int, seq_len: int, width: int) -> tuple[int, int, int, int]:
    """Of the stored sums: [N, C, 3, D]."""
    return num_sequences, int(triton.cdiv(seq_len, min(CHUNK, seq_len))), 3, width


def forward(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """y [N, T, D] in the dtype of v and the sums before each chunk, [N, C, 3, D], from k and v
    [N, T, D], decay and first [G, D] in float32."""
    num_sequences, seq_len, width = k.shape
    y = torch.empty_like(v)
    states = torch.empty(state_shape(*k.shape), device=k.device)
    grid, sizes = _launch(num_sequences, seq_len, width)
    _forward[grid](k, v, decay, first, y, states, num_sequences // len(decay), **sizes)
    return y, states


def backward(
    k: Tensor, v: Tensor, decay: Tensor, first: Tensor, states: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, decay and first."""
    num_sequences, seq_len, width = k.shape
    sums = torch.empty(2, num_sequences, width, device=k.device)
    d_k, d_v = torch.empty_like(k), torch.empty_like(v)
    grid, sizes = _launch(num_sequences, seq_len, width)
    per_group = num_sequences // len(decay)
    _backward[grid](
        *(k, v, decay, first, states, d_y, d_k, d_v, sums[0], sums[1], per_group), **sizes
    )
    by_group = sums.unflatten(1, (len(decay), per_group))
    return d_k, d_v, by_group[0].sum(1), by_group[1].sum(1)


def _launch(num_sequences: int, seq_len: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    block = min(BLOCK, int(triton.next_power_of_2(width)))
    sizes = {"T": seq_len, "D": width, "ROWS": min(CHUNK, seq_len), "BLOCK": block}
    grid = (num_sequences * int(triton.cdiv(width, block)),)
    return grid, {**sizes, "num_warps": max(1, block // 32)}
