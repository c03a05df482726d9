"""Correlation of rows: the impulse response of H3's shift model.

    h[n] = sum over m of b[m] c[m + n],  0 <= n < N,  c zero past its end

Its gradients are sums of the same kind: d_b[m] = sum over n of d_h[n] c[n + m] and
d_c[j] = sum over m of b[m] d_h[j - m].

Letters   C rows (channels, of all packed runs), N their length.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._contract import HAS_TRITON
from recallzoo.mixers._convolution import causal_conv_channels
from recallzoo.mixers._groups import over_groups


def correlation(b: Float[Tensor, "C N"], c: Float[Tensor, "C N"]) -> Float[Tensor, "C N"]:
    """h of each row, in the dtype of the inputs."""
    if HAS_TRITON and b.is_cuda and b.dtype == torch.float32:
        return by_kernel(b, c)
    return in_pytorch(b, c)


def in_pytorch(b: Float[Tensor, "C N"], c: Float[Tensor, "C N"]) -> Float[Tensor, "C N"]:
    """`correlation` as a convolution with one side reversed."""
    return causal_conv_channels(c.flip(-1)[:, None], b)[:, 0].flip(-1)


@torch.library.custom_op("recallzoo::correlation", mutates_args=())
def by_kernel(b: Tensor, c: Tensor) -> Tensor:
    """`correlation` in float32 by a Triton kernel."""
    from recallzoo.mixers._kernels.correlation import correlate

    return correlate(b.contiguous(), c.contiguous(), 1)


@torch.library.custom_op("recallzoo::correlation_backward", mutates_args=())
def _backward(b: Tensor, c: Tensor, d_h: Tensor) -> tuple[Tensor, Tensor]:
    from recallzoo.mixers._kernels.correlation import correlate

    b, c, d_h = b.contiguous(), c.contiguous(), d_h.contiguous()
    return correlate(d_h, c, 1), correlate(b, d_h, -1)


@by_kernel.register_fake
def _(b: Tensor, c: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(b, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(b: Tensor, c: Tensor, d_h: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    dense = torch.contiguous_format
    return torch.empty_like(b, memory_format=dense), torch.empty_like(c, memory_format=dense)


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


by_kernel.register_autograd(
    lambda ctx, d_h: _backward(*ctx.saved_tensors, d_h), setup_context=_save
)
by_kernel.register_vmap(over_groups(by_kernel))
_backward.register_vmap(over_groups(_backward))
