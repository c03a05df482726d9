"""RWKV-4's weighted mean as an operator of PyTorch: a kernel that packs and compiles.

    wkv4(k, v, decay, first) -> y

Sequences come in groups with a decay and a `first` of their own, so that mapping over packed runs
(`torch.func.vmap`) only adds groups: the batching rule puts the runs' sequences one below the
other and calls the operator once.

Letters   N sequences, T time, D width, G groups of N / G sequences, R packed runs.
"""

import torch
from torch import Tensor


@torch.library.custom_op("recallzoo::wkv4", mutates_args=())
def wkv4(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """The wkv of `rwkv4`, [N, T, D] in the dtype of v, from k and v [N, T, D] and, in float32,
    decay (above zero) and first [G, D]."""
    from recallzoo.mixers._kernels import wkv4 as kernel

    return kernel.forward(k.contiguous(), v.contiguous(), decay.contiguous(), first.contiguous())


@torch.library.custom_op("recallzoo::wkv4_backward", mutates_args=())
def _backward(
    k: Tensor, v: Tensor, decay: Tensor, first: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from recallzoo.mixers._kernels import wkv4 as kernel

    return kernel.backward(*(t.contiguous() for t in (k, v, decay, first, d_y)))


@wkv4.register_fake
def _(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    first: Tensor,
    d_y: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dense = torch.contiguous_format
    d_k, d_v, d_decay, d_first = (
        torch.empty_like(t, memory_format=dense) for t in (k, v, decay, first)
    )
    return d_k, d_v, d_decay, d_first


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


wkv4.register_autograd(lambda ctx, d_y: _backward(*ctx.saved_tensors, d_y), setup_context=_save)


def _grouped(info, in_dims, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Every tensor with the mapped axis in front, where it becomes part of the first."""
    mapped = [
        tensor.expand(info.batch_size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
        for tensor, axis in zip(tensors, in_dims, strict=True)
    ]
    return [tensor.flatten(0, 1) for tensor in mapped]


@wkv4.register_vmap
def _(info, in_dims, k, v, decay, first):
    y = wkv4(*_grouped(info, in_dims, (k, v, decay, first)))
    return y.unflatten(0, (info.batch_size, -1)), 0


@_backward.register_vmap
def _(info, in_dims, k, v, decay, first, d_y):
    gradients = _backward(*_grouped(info, in_dims, (k, v, decay, first, d_y)))
    return tuple(g.unflatten(0, (info.batch_size, -1)) for g in gradients), (0, 0, 0, 0)
