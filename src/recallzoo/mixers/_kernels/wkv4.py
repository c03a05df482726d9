"""RWKV-4's weighted mean, gated or not, as a scan in registers: Triton kernels.

A program keeps the sums of one sequence and a block of channels, a channel to a thread, so that no
thread reads what another wrote. Positions come in chunks, whose rows are all asked for before the
first is needed. The forward pass stores the sums before each chunk. The backward pass goes through
the chunks from the last: it scans a chunk again from there, keeping the sums before each position
in registers, then runs back in time with

    G[t-1] = g[t] / den[t] (1, -y[t]) + e^-w G[t],        d w = - sum over t of e^-w G[t] . sums[t]

Every sum carries its largest exponent, as in `rwkv4._decayed_sums`, here in powers of 2. Keys,
values and, where there is a gate, receptances lie in one tensor [G, P, N, T, D], as one product
leaves them.

Letters   P parts, 3 or 2, G groups of N sequences with weights of their own, T time, D width,
          C chunks.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false
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
def _places(group, row, start, N, T: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
    """Where a sequence's keys, values and receptances from `start` on lie."""
    keys = ((group * PARTS * N + row) * T + start) * D
    values = (((group * PARTS + 1) * N + row) * T + start) * D
    return keys, values, (((group * PARTS + 2) * N + row) * T + start) * D


@triton.jit
def _put(pointer, value, mask):
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _wkv_forward(
    projected,
    decay,
    first,
    y,
    states,
    N,
    T: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    chunks: tl.constexpr = (T + ROWS - 1) // ROWS
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = col < D
    group = sequence // N
    w = tl.load(decay + group * D + col, mask=inside, other=0.0) * LOG2E
    u = tl.load(first + group * D + col, mask=inside, other=0.0) * LOG2E
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
        to_k, to_v, to_r = _places(group, sequence % N, start, N, T, D, PARTS)
        keys = _rows(projected + to_k + col, start, T, D, inside, ROWS)
        values = _rows(projected + to_v + col, start, T, D, inside, ROWS)
        if PARTS == 3:
            receptances = _rows(projected + to_r + col, start, T, D, inside, ROWS)
        for j in tl.static_range(ROWS):
            key, value = keys[j].to(tl.float32) * LOG2E, values[j].to(tl.float32)
            _, past, now = _shares(exponent, key + u)
            below = past * weight + now
            if PARTS == 3:
                below *= 1.0 + tl.exp2(receptances[j].to(tl.float32) * -LOG2E)
            out = (past * total + now * value) / below
            here = inside & (start + j < T)
            _put(y + at + j * D, out, here)
            exponent, past, now = _shares(exponent - w, key)
            total = past * total + now * value
            weight = past * weight + now


@triton.jit
def _wkv_backward(
    projected,
    decay,
    first,
    states,
    d_y,
    d_projected,
    d_decay,
    d_first,
    N,
    T: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    chunks: tl.constexpr = (T + ROWS - 1) // ROWS
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = col < D
    group = sequence // N
    w = tl.load(decay + group * D + col, mask=inside, other=0.0) * LOG2E
    u = tl.load(first + group * D + col, mask=inside, other=0.0) * LOG2E
    g_total = tl.zeros([BLOCK], tl.float32)
    g_weight = tl.zeros([BLOCK], tl.float32)
    g_exponent = tl.full([BLOCK], EMPTY, tl.float32)
    sum_decay = tl.zeros([BLOCK], tl.float32)
    sum_first = tl.zeros([BLOCK], tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        start = chunk * ROWS
        at = (sequence * T + start) * D + col
        to_k, to_v, to_r = _places(group, sequence % N, start, N, T, D, PARTS)
        keys = _rows(projected + to_k + col, start, T, D, inside, ROWS)
        values = _rows(projected + to_v + col, start, T, D, inside, ROWS)
        if PARTS == 3:
            receptances = _rows(projected + to_r + col, start, T, D, inside, ROWS)
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
            given = givens[j].to(tl.float32)
            if PARTS == 3:
                gate = 1.0 / (1.0 + tl.exp2(receptances[j].to(tl.float32) * -LOG2E))
                given *= gate
                _put(d_projected + to_r + col + j * D, given * out * (1.0 - gate), here)
            scaled = given * inverse
            direct = now * scaled
            slope = direct * (value - out)
            sum_first += slope
            # No term of G is larger than 2^-exponent of the sums that it meets, nor than 2^-key.
            kept = tl.exp2(g_exponent - w + exponents[j])
            sum_decay -= kept * (g_total * totals[j] + g_weight * weights[j])
            later = tl.exp2(key + g_exponent)
            key_gradient = slope + later * (g_total * value + g_weight)
            _put(d_projected + to_k + col + j * D, key_gradient, here)
            _put(d_projected + to_v + col + j * D, direct + later * g_total, here)
            common, keep, add = _shares(g_exponent - w, -largest)
            add *= scaled
            g_total = keep * g_total + add
            g_weight = keep * g_weight - add * out
            g_exponent = tl.where(start + j < T, common, EMPTY)
    tl.store(d_decay + sequence * D + col, sum_decay, mask=inside)
    tl.store(d_first + sequence * D + col, sum_first, mask=inside)


def state_shape(projected: Tensor) -> tuple[int, ...]:
    """Of the stored sums: [G, N, C, 3, D]."""
    groups, _, number, seq_len, width = projected.shape
    return groups, number, int(triton.cdiv(seq_len, min(CHUNK, seq_len))), 3, width


def forward(projected: Tensor, decay: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(r) wkv, [G, N, T, D], and the sums before each chunk, [G, N, C, 3, D], from k, v
    and r [G, 3, N, T, D], decay and first [G, D] in float32; wkv without r."""
    y = torch.empty_like(projected[:, 0], memory_format=torch.contiguous_format)
    states = torch.empty(state_shape(projected), device=projected.device)
    grid, sizes = _launch(projected)
    _wkv_forward[grid](projected, decay, first, y, states, **sizes)
    return y, states


def backward(
    projected: Tensor, decay: Tensor, first: Tensor, states: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the parts in one tensor, decay and first."""
    groups, _, number, _, width = projected.shape
    sums = torch.empty(2, groups, number, width, device=projected.device)
    d_projected = torch.empty_like(projected)
    grid, sizes = _launch(projected)
    _wkv_backward[grid](
        projected, decay, first, states, d_y, d_projected, sums[0], sums[1], **sizes
    )
    return d_projected, sums[0].sum(1), sums[1].sum(1)


def _launch(projected: Tensor) -> tuple[tuple[int], dict[str, int]]:
    groups, parts, number, seq_len, width = projected.shape
    block = min(BLOCK, int(triton.next_power_of_2(width)))
    sizes = {"N": number, "T": seq_len, "D": width, "PARTS": parts, "BLOCK": block}
    sizes["ROWS"] = min(CHUNK, seq_len)
    grid = (groups * number * int(triton.cdiv(width, block)),)
    return grid, {**sizes, "num_warps": max(1, block // 32)}
