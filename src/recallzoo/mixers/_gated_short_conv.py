"""Hyena's short filters and first gate, channels first, in PyTorch and as one operator.

    c = short(p + in_bias) + bias      by channel: short(x)[t] = sum over k of taps[k] x[t - k]
    gate1, gate2, v = thirds of c
    u = gate1 v                        returned beside gate2

`in_bias` is the bias of the linear map before: adding it here spares a pass over its output, which
a product cannot add to without one.

Letters   D width, B batch, T time, K taps, G groups (packed runs).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._contract import HAS_TRITON
from recallzoo.mixers._groups import over_groups

MAX_TAPS = 4
"""Taps up to which the kernel is used: its threads hold the K - 1 positions on each side of their
own, and a sum for each tap, in registers."""


def gated_short_conv(
    p: Float[Tensor, "C B T"],
    in_bias: Float[Tensor, "C"],
    taps: Float[Tensor, "C K"],
    bias: Float[Tensor, "C"],
) -> tuple[Float[Tensor, "D B T"], Float[Tensor, "D B T"]]:
    """u and gate2 in the dtype of p, from C = 3 D channels; sums are in float32 at least."""
    if HAS_TRITON and p.is_cuda and p.dtype != torch.float64 and taps.shape[-1] <= MAX_TAPS:
        return by_kernel(p, in_bias, taps, bias)
    return in_pytorch(p, in_bias, taps, bias)


def in_pytorch(
    p: Float[Tensor, "C B T"],
    in_bias: Float[Tensor, "C"],
    taps: Float[Tensor, "C K"],
    bias: Float[Tensor, "C"],
) -> tuple[Float[Tensor, "D B T"], Float[Tensor, "D B T"]]:
    """`gated_short_conv` as a sum of shifted inputs."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    in_bias, taps, bias = (w.to(dtype) for w in (in_bias, taps, bias))
    x = p.to(dtype) + in_bias[:, None, None]
    seq_len, num_taps = x.shape[-1], taps.shape[-1]
    padded = F.pad(x, (num_taps - 1, 0))
    c = bias[:, None, None] + x * taps[:, 0, None, None]
    for lag in range(1, num_taps):
        start = num_taps - 1 - lag
        c = c + padded[..., start : start + seq_len] * taps[:, lag, None, None]
    gate1, gate2, v = c.chunk(3)
    return (gate1 * v).to(p.dtype), gate2.to(p.dtype)


def by_kernel(
    p: Float[Tensor, "C B T"],
    in_bias: Float[Tensor, "C"],
    taps: Float[Tensor, "C K"],
    bias: Float[Tensor, "C"],
) -> tuple[Float[Tensor, "D B T"], Float[Tensor, "D B T"]]:
    """`gated_short_conv` in one kernel, and one for its gradient."""
    weights = (w.float()[None] for w in (in_bias, taps, bias))
    u, gate2 = _operator(p[None], *weights)
    return u.squeeze(0), gate2.squeeze(0)


@torch.library.custom_op("recallzoo::gated_short_conv", mutates_args=())
def _operator(p: Tensor, in_bias: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from recallzoo.mixers._kernels import gated_short_conv as kernel

    return kernel.forward(*(t.contiguous() for t in (p, in_bias, taps, bias)))


@torch.library.custom_op("recallzoo::gated_short_conv_backward", mutates_args=())
def _backward(
    p: Tensor, in_bias: Tensor, taps: Tensor, bias: Tensor, d_u: Tensor, d_gate2: Tensor
) -> tuple[Tensor, Tensor]:
    from recallzoo.mixers._kernels import gated_short_conv as kernel

    return kernel.backward(*(t.contiguous() for t in (p, in_bias, taps, bias, d_u, d_gate2)))


@_operator.register_fake
def _(p: Tensor, in_bias: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    G, width, B, T = p.shape
    return p.new_empty(G, width // 3, B, T), p.new_empty(G, width // 3, B, T)


@_backward.register_fake
def _(
    p: Tensor,
    in_bias: Tensor,  # noqa: ARG001
    taps: Tensor,
    bias: Tensor,  # noqa: ARG001
    d_u: Tensor,  # noqa: ARG001
    d_gate2: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    sums = taps.new_empty(*taps.shape[:2], taps.shape[2] + 2)
    return torch.empty_like(p, memory_format=torch.contiguous_format), sums


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, d_u: Tensor, d_gate2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_p, sums = _backward(*ctx.saved_tensors, d_u, d_gate2)
    return d_p, sums[..., -1], sums[..., :-2], sums[..., -2]


_operator.register_autograd(_differentiate, setup_context=_save)
_operator.register_vmap(over_groups(_operator))
_backward.register_vmap(over_groups(_backward))
