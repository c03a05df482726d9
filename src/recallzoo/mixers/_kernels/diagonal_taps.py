"""Filters of diagonal state-space models: Triton kernels.

    h[c, t] = sum over m of Re w z^t
    z = exp(log_radius + i angle),  w = real + i imag,  at [c, m]

With t = p S + s, z^t is z^(p S) z^s: two small tables of powers and products of them, made where
they are used. Of the sums A = sum over t of g[t] z^t and B = sum over t of t g[t] z^t, where g is
the gradient of h, the gradients are Re A and -Im A of w's parts, Re(w B) of log_radius and
-Im(w B) of angle.

Letters  C filters, M complex states of each, T time, S columns, P rows: powers of the tables.
"""

# Launches take sizes as plain numbers, and options of the compiler.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 32
ROWS = 16
STATES = 32
"""States that are summed over at a time, or whose gradients a program has."""


@triton.jit
def _powers(exponents, log_radius, angle):
    """Real and imaginary part of z^e [exponents, states]."""
    radius = tl.exp(exponents[:, None] * log_radius[None, :])
    turned = exponents[:, None] * angle[None, :]
    return radius * tl.cos(turned), radius * tl.sin(turned)


@triton.jit
def _diagonal_taps(
    log_radius, angle, real, imag, taps, M, T,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    filter_number = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, COLUMNS)
    start = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)) * COLUMNS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, M, STATES):
        m = first + tl.arange(0, STATES)
        at = filter_number * M + m
        log_r = tl.load(log_radius + at, mask=m < M, other=0.0)
        theta = tl.load(angle + at, mask=m < M, other=0.0)
        w_real = tl.load(real + at, mask=m < M, other=0.0)
        w_imag = tl.load(imag + at, mask=m < M, other=0.0)
        coarse_real, coarse_imag = _powers(start.to(tl.float32), log_r, theta)
        fine_real, fine_imag = _powers(s.to(tl.float32), log_r, theta)
        left_real = w_real[None, :] * coarse_real - w_imag[None, :] * coarse_imag
        left_imag = w_real[None, :] * coarse_imag + w_imag[None, :] * coarse_real
        total = tl.dot(left_real, tl.trans(fine_real), total, input_precision="ieee")
        total = tl.dot(left_imag, tl.trans(-fine_imag), total, input_precision="ieee")
    t = start[:, None] + s[None, :]
    tl.store(taps + filter_number * T + t, total, mask=t < T)


@triton.jit
def _diagonal_taps_backward(
    log_radius, angle, real, imag, d_taps, d_log_radius, d_angle, d_real, d_imag, M, T,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    filter_number = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, COLUMNS)
    m = tl.program_id(1) * STATES + tl.arange(0, STATES)
    at = filter_number * M + m
    log_r = tl.load(log_radius + at, mask=m < M, other=0.0)
    theta = tl.load(angle + at, mask=m < M, other=0.0)
    fine_real, fine_imag = _powers(s.to(tl.float32), log_r, theta)
    a_real = tl.zeros([STATES], tl.float32)
    a_imag = tl.zeros([STATES], tl.float32)
    b_real = tl.zeros([STATES], tl.float32)
    b_imag = tl.zeros([STATES], tl.float32)
    for first in range(0, T, ROWS * COLUMNS):
        start = first + tl.arange(0, ROWS) * COLUMNS
        t = start[:, None] + s[None, :]
        g = tl.load(d_taps + filter_number * T + t, mask=t < T, other=0.0)
        later = g * t.to(tl.float32)
        coarse_real, coarse_imag = _powers(start.to(tl.float32), log_r, theta)
        g_real = tl.dot(g, fine_real, input_precision="ieee")
        g_imag = tl.dot(g, fine_imag, input_precision="ieee")
        a_real += tl.sum(coarse_real * g_real - coarse_imag * g_imag, axis=0)
        a_imag += tl.sum(coarse_real * g_imag + coarse_imag * g_real, axis=0)
        later_real = tl.dot(later, fine_real, input_precision="ieee")
        later_imag = tl.dot(later, fine_imag, input_precision="ieee")
        b_real += tl.sum(coarse_real * later_real - coarse_imag * later_imag, axis=0)
        b_imag += tl.sum(coarse_real * later_imag + coarse_imag * later_real, axis=0)
    w_real = tl.load(real + at, mask=m < M, other=0.0)
    w_imag = tl.load(imag + at, mask=m < M, other=0.0)
    tl.store(d_log_radius + at, w_real * b_real - w_imag * b_imag, mask=m < M)
    tl.store(d_angle + at, -w_real * b_imag - w_imag * b_real, mask=m < M)
    tl.store(d_real + at, a_real, mask=m < M)
    tl.store(d_imag + at, -a_imag, mask=m < M)


def forward(log_radius: Tensor, angle: Tensor, real: Tensor, imag: Tensor, seq_len: int) -> Tensor:
    """h [C, T] from contiguous [C, M] in float32."""
    C, M = angle.shape
    taps = angle.new_empty(C, seq_len)
    grid = (C, int(triton.cdiv(seq_len, ROWS * COLUMNS)))
    _diagonal_taps[grid](
        log_radius, angle, real, imag, taps, M, seq_len,
        ROWS=ROWS, COLUMNS=COLUMNS, STATES=STATES, num_warps=4,
    )  # fmt: skip
    return taps


def backward(
    log_radius: Tensor, angle: Tensor, real: Tensor, imag: Tensor, d_taps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four inputs of `forward`."""
    C, M = angle.shape
    found = (
        torch.empty_like(angle),
        torch.empty_like(angle),
        torch.empty_like(angle),
        torch.empty_like(angle),
    )
    _diagonal_taps_backward[(C, int(triton.cdiv(M, STATES)))](
        log_radius, angle, real, imag, d_taps, *found, M, d_taps.shape[1],
        ROWS=ROWS, COLUMNS=COLUMNS, STATES=STATES, num_warps=4,
    )  # fmt: skip
    return found
