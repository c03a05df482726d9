"""Causal convolutions of more than a few dozen positions as matrix products on CUDA.

A Triton kernel makes tiles of the Toeplitz matrix where they are used. It is
`recallzoo.mixers._convolution.causal_conv_channels`, in the precision of matrix products with
float32 sums: B T^2 / 2 multiplications a channel on tensor cores, where a Fourier transform works
in float32 and moves its intermediate results through memory several times. It neither pads,
branches on values nor scatters. `benchmarks/pretrain_speed.py --convolutions` compares what is used
on GPUs.

Letters   B batch, T time, D width, K filter taps, C channels, R packed runs.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._contract import product_dtype
from recallzoo.mixers._groups import over_groups


def conv_channels_by_tiles(
    x: Float[Tensor, "D B T"], taps: Float[Tensor, "D K"]
) -> Float[Tensor, "D B T"]:
    """`causal_conv_channels` by a kernel: CUDA with Triton (and, for tests, its interpreter)."""
    seq_len = x.shape[-1]
    taps = taps[..., :seq_len].float().contiguous()
    return toeplitz(x.to(product_dtype(x)).contiguous(), taps).to(x.dtype)


@torch.library.custom_op("recallzoo::toeplitz", mutates_args=())
def toeplitz(x: Tensor, taps: Tensor) -> Tensor:
    """y [C, B, T] from x [C, B, T], which sets the precision, and taps [C, K] in float32, see
    `_kernels.toeplitz`."""
    from recallzoo.mixers._kernels import toeplitz as kernel

    return kernel.forward(x.contiguous(), taps.to(x.dtype).contiguous())


@torch.library.custom_op("recallzoo::toeplitz_backward", mutates_args=())
def _backward(x: Tensor, taps: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    from recallzoo.mixers._kernels import toeplitz as kernel

    return kernel.backward(x.contiguous(), taps.to(x.dtype).contiguous(), d_y.contiguous())


@toeplitz.register_fake
def _(x: Tensor, taps: Tensor) -> Tensor:  # noqa: ARG001
    return _dense(x)


@_backward.register_fake
def _(x: Tensor, taps: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _dense(x), _dense(taps)


def _dense(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


toeplitz.register_autograd(
    lambda ctx, d_y: _backward(*ctx.saved_tensors, d_y.contiguous()), setup_context=_save
)


for _operator in (toeplitz, _backward):
    _operator.register_vmap(over_groups(_operator))
