"""What stands at some positions of a tensor whose channels come first, as an operator of PyTorch.

    y[b, q] = z[:, b, positions[b, q]]

Indexed, the gradient fills a tensor and adds to it atomically; as PyTorch's product, z is copied
first to where the positions lie together. On CUDA with Triton a kernel reads z once as it lies, and
one writes its gradient.

Letters   B batch, T time, D width, Q queries, G groups of B sequences, R packed runs.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recallzoo.mixers._contract import HAS_TRITON, select_positions
from recallzoo.mixers._groups import over_groups


def select_from_channels(
    z: Float[Tensor, "D B T"], positions: Int[Tensor, "B Q"]
) -> Float[Tensor, "B Q D"]:
    """`select_positions` of what lies channels first."""
    if z.is_cuda and HAS_TRITON and z.dtype != torch.float64:
        return by_kernel(z, positions)
    return select_positions(z.permute(1, 2, 0), positions)


def by_kernel(z: Float[Tensor, "D B T"], positions: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q D"]:
    """`select_from_channels` in one kernel, and one for its gradient."""
    return _select(z[None], positions[None]).squeeze(0)


@torch.library.custom_op("recallzoo::select_channels", mutates_args=())
def _select(z: Tensor, positions: Tensor) -> Tensor:
    """[G, B, Q, D] from z [G, D, B, T] and positions [G, B, Q]."""
    from recallzoo.mixers._kernels import select_channels as kernel

    return kernel.select(z.contiguous(), positions.contiguous())


@torch.library.custom_op("recallzoo::select_channels_backward", mutates_args=())
def _spread(d_y: Tensor, positions: Tensor, seq_len: int) -> Tensor:
    from recallzoo.mixers._kernels import select_channels as kernel

    return kernel.spread(d_y.contiguous(), positions.contiguous(), seq_len)


@_select.register_fake
def _(z, positions):
    groups, width, number, _ = z.shape
    return z.new_empty(groups, number, positions.shape[-1], width)


@_spread.register_fake
def _(d_y, positions, seq_len):  # noqa: ARG001
    groups, number, _, width = d_y.shape
    return d_y.new_empty(groups, width, number, seq_len)


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    z, positions = inputs
    ctx.save_for_backward(positions)
    ctx.seq_len = z.shape[-1]


def _gradient(ctx, d_y: Tensor) -> tuple[Tensor, None]:
    (positions,) = ctx.saved_tensors
    return _spread(d_y, positions, ctx.seq_len), None


_select.register_autograd(_gradient, setup_context=_save)


for _operator in (_select, _spread):
    _operator.register_vmap(over_groups(_operator))
