"""Convolution through the frequency domain as an operator of PyTorch, for compiled programs.

    y[c, b, t] = sum over k <= t of taps[c, k] x[c, b, t - k]

PyTorch's compiler has no complex numbers on CUDA and gives up on the whole program where it meets
them. Inside an operator it does not, and both gradients are known: time reversed, the same product
of spectra. Spectra are made anew in the backward pass, where keeping them would take 4 times the
memory of a bfloat16 input.

Letters   C channels, B batch, T time, K taps, R packed runs.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._groups import over_groups


def fft_size(least: int) -> int:
    """The smallest of 2^n, 3 2^n and 5 2^n that is at least `least` and even."""
    sizes = []
    for factor in (1, 3, 5):
        size = 2 * factor
        while size < least:
            size *= 2
        sizes.append(size)
    return min(sizes)


def fft_conv(x: Float[Tensor, "C B T"], taps: Float[Tensor, "C K"]) -> Float[Tensor, "C B T"]:
    """Each channel's rows filtered by its taps, in float32, returned in the dtype of x."""
    return by_operator(x, taps) if x.is_cuda else written_out(x, taps)


def written_out(x: Float[Tensor, "C B T"], taps: Float[Tensor, "C K"]) -> Float[Tensor, "C B T"]:
    """`fft_conv` for PyTorch to differentiate."""
    size = fft_size(x.shape[-1] + taps.shape[-1] - 1)
    product = _spectrum(x, size) * _spectrum(taps, size)[:, None]
    return torch.fft.irfft(product, n=size)[..., : x.shape[-1]].to(x.dtype)


@torch.library.custom_op("recallzoo::fft_conv", mutates_args=())
def by_operator(x: Tensor, taps: Tensor) -> Tensor:
    """`fft_conv` as an operator."""
    size = fft_size(x.shape[-1] + taps.shape[-1] - 1)
    product = _spectrum(x, size) * _spectrum(taps, size)[:, None]
    return _signal(product, size, x.shape[-1], x.dtype)


@torch.library.custom_op("recallzoo::fft_conv_backward", mutates_args=())
def _backward(x: Tensor, taps: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    size = fft_size(x.shape[-1] + taps.shape[-1] - 1)
    d_y_f = _spectrum(d_y, size)
    d_x = _signal(d_y_f * _spectrum(taps, size).conj()[:, None], size, x.shape[-1], x.dtype)
    d_taps_f = (d_y_f * _spectrum(x, size).conj()).sum(1)
    return d_x, _signal(d_taps_f, size, taps.shape[-1], taps.dtype)


def _spectrum(signal: Tensor, size: int) -> Tensor:
    return torch.fft.rfft(signal.float(), n=size)


def _signal(spectrum: Tensor, size: int, length: int, dtype: torch.dtype) -> Tensor:
    return torch.fft.irfft(spectrum, n=size)[..., :length].to(dtype).contiguous()


def _dense(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@by_operator.register_fake
def _(x, taps):  # noqa: ARG001
    return _dense(x)


@_backward.register_fake
def _(x, taps, d_y):  # noqa: ARG001
    return _dense(x), _dense(taps)


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


by_operator.register_autograd(
    lambda ctx, d_y: _backward(*ctx.saved_tensors, d_y), setup_context=_save
)
for _operator in (by_operator, _backward):
    _operator.register_vmap(over_groups(_operator))
