"""RWKV-4's weighted mean as an operator of PyTorch: a kernel that packs and compiles.

    wkv4(projected, decay, first) -> y      y = sigmoid(r) wkv(k, v; decay, first), of k, v and r
                                            y = wkv(k, v; decay, first), of k and v alone

Sequences come in groups with a decay and a `first` of their own, so that mapping over packed runs
(`torch.func.vmap`) only adds groups: the batching rule makes the runs part of the groups and calls
the operator once.

Letters   P parts, 3 or 2, G groups of N sequences, T time, D width, C chunks, R packed runs.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._groups import over_groups


def wkv4(
    projected: Float[Tensor, "P N T D"], decay: Float[Tensor, "D"], first: Float[Tensor, "D"]
) -> Float[Tensor, "N T D"]:
    """The wkv of `rwkv4`, times sigmoid(r) where there is an r, in the dtype of `projected`, which
    is k, v and maybe r; decay (above zero) and first in float32."""
    return _forward(projected[None], decay[None], first[None])[0].squeeze(0)


@torch.library.custom_op("recallzoo::wkv4", mutates_args=())
def _forward(projected: Tensor, decay: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """y [G, N, T, D] and, for the gradients alone, states of the scan, from [G, P, N, T, D] and
    [G, D]."""
    from recallzoo.mixers._kernels import wkv4 as kernel

    return kernel.forward(*(t.contiguous() for t in (projected, decay, first)))


@torch.library.custom_op("recallzoo::wkv4_backward", mutates_args=())
def _backward(
    projected: Tensor, decay: Tensor, first: Tensor, states: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from recallzoo.mixers._kernels import wkv4 as kernel

    return kernel.backward(*(t.contiguous() for t in (projected, decay, first, states, d_y)))


@_forward.register_fake
def _(projected, decay, first):  # noqa: ARG001
    from recallzoo.mixers._kernels import wkv4 as kernel

    groups, _, *rest = projected.shape
    return projected.new_empty(groups, *rest), decay.new_empty(kernel.state_shape(projected))


@_backward.register_fake
def _(projected, decay, first, states, d_y):  # noqa: ARG001
    dense = torch.contiguous_format
    return tuple(torch.empty_like(t, memory_format=dense) for t in (projected, decay, first))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx, d_y, d_states):  # noqa: ARG001 (nobody sees the states)
    return _backward(*ctx.saved_tensors, d_y)


_forward.register_autograd(_gradients, setup_context=_save)


for _operator in (_forward, _backward):
    _operator.register_vmap(over_groups(_operator))
