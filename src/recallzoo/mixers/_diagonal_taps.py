"""The filter of a diagonal state-space model, as H3 has one for each head.

    h[t] = sum over m of Re w_m z_m^t,  0 <= t < T
    z = exp(log_radius + i angle),  w = real + i imag

Written out, powers are the largest tensor of the whole mixer, and compiled from two smaller tables
they were a twelfth of H3's step at 512 tokens and width 512.

Letters   C filters (heads, of all packed runs), M complex states, T time.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._contract import HAS_TRITON
from recallzoo.mixers._groups import over_groups


def diagonal_taps(
    log_radius: Float[Tensor, "C M"],
    angle: Float[Tensor, "C M"],
    real: Float[Tensor, "C M"],
    imag: Float[Tensor, "C M"],
    seq_len: int,
) -> Float[Tensor, "C T"]:
    """h of each filter, in float32."""
    if HAS_TRITON and angle.is_cuda:
        return by_kernel(log_radius, angle, real, imag, seq_len)
    return in_pytorch(log_radius, angle, real, imag, seq_len)


def in_pytorch(
    log_radius: Float[Tensor, "C M"],
    angle: Float[Tensor, "C M"],
    real: Float[Tensor, "C M"],
    imag: Float[Tensor, "C M"],
    seq_len: int,
) -> Float[Tensor, "C T"]:
    """`diagonal_taps` from tables of about sqrt(T) powers: z^(i J + j) = z^(i J) z^j."""
    stride = max(1, math.isqrt(seq_len))
    coarse_real, coarse_imag = _powers(log_radius, angle, -(-seq_len // stride), stride)
    fine_real, fine_imag = _powers(log_radius, angle, stride, 1)
    real, imag = real[:, None], imag[:, None]
    left_real = real * coarse_real - imag * coarse_imag
    left_imag = real * coarse_imag + imag * coarse_real
    taps = left_real @ fine_real.transpose(-1, -2) - left_imag @ fine_imag.transpose(-1, -2)
    return taps.flatten(-2)[:, :seq_len]


def _powers(
    log_radius: Float[Tensor, "C M"], angle: Float[Tensor, "C M"], count: int, stride: int
) -> tuple[Float[Tensor, "C P M"], Float[Tensor, "C P M"]]:
    """Real and imaginary part of z^0, z^stride, ..., z^((count - 1) stride)."""
    exponent = torch.arange(0, count * stride, stride, device=angle.device)[:, None].float()
    radius = torch.exp(exponent * log_radius[:, None])
    turned = exponent * angle[:, None]
    return radius * torch.cos(turned), radius * torch.sin(turned)


@torch.library.custom_op("recallzoo::diagonal_taps", mutates_args=())
def by_kernel(
    log_radius: Tensor, angle: Tensor, real: Tensor, imag: Tensor, seq_len: int
) -> Tensor:
    """`diagonal_taps` by a Triton kernel, from float32."""
    from recallzoo.mixers._kernels import diagonal_taps as kernel

    w = real.contiguous(), imag.contiguous()
    return kernel.forward(log_radius.contiguous(), angle.contiguous(), *w, seq_len)


@torch.library.custom_op("recallzoo::diagonal_taps_backward", mutates_args=())
def _backward(
    log_radius: Tensor, angle: Tensor, real: Tensor, imag: Tensor, d_taps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from recallzoo.mixers._kernels import diagonal_taps as kernel

    z = log_radius.contiguous(), angle.contiguous()
    return kernel.backward(*z, real.contiguous(), imag.contiguous(), d_taps.contiguous())


@by_kernel.register_fake
def _(log_radius: Tensor, angle: Tensor, real: Tensor, imag: Tensor, seq_len: int) -> Tensor:  # noqa: ARG001
    return angle.new_empty(angle.shape[0], seq_len)


@_backward.register_fake
def _(log_radius, angle, real, imag, d_taps):  # noqa: ARG001
    dense = torch.contiguous_format
    return tuple(torch.empty_like(angle, memory_format=dense) for _ in range(4))


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:4])


by_kernel.register_autograd(
    lambda ctx, d_taps: (*_backward(*ctx.saved_tensors, d_taps), None), setup_context=_save
)
by_kernel.register_vmap(over_groups(by_kernel))
_backward.register_vmap(over_groups(_backward))
