"""RWKV-4's weighted mean as an operator of PyTorch: a kernel that packs and compiles.

    wkv4(k, v, decay, first) -> y

Sequences come in groups with a decay and a `first` of their own, so that mapping over packed runs
(`torch.func.vmap`) only adds groups: the batching rule puts the runs' sequences one below the
other and calls the operator once.

Letters   N sequences, T time, D width, G groups of N / G sequences, R packed runs.
"""

import torch
from torch import Tensor


def wkv4(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """The wkv of `rwkv4`, [N, T, D] in the dtype of v, from k and v [N, T, D] and, in float32,
    decay (above zero) and first [G, D]."""
    return _forward(k, v, decay, first)[0]


@torch.library.custom_op("recallzoo::wkv4", mutates_args=())
def _forward(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """wkv and, for the gradients alone, states of the scan."""
    from recallzoo.mixers._kernels import wkv4 as kernel

    return kernel.forward(*(t.contiguous() for t in (k, v, decay, first)))


@torch.library.custom_op("recallzoo::wkv4_backward", mutates_args=())
def _backward(
    k: Tensor, v: Tensor, decay: Tensor, first: Tensor, states: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from recallzoo.mixers._kernels import wkv4 as kernel

    return kernel.backward(*(t.contiguous() for t in (k, v, decay, first, states, d_y)))


@_forward.register_fake
def _(k, v, decay, first):  # noqa: ARG001
    from recallzoo.mixers._kernels import wkv4 as kernel

    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    return y, decay.new_empty(kernel.state_shape(*k.shape))


@_backward.register_fake
def _(k, v, decay, first, states, d_y):  # noqa: ARG001
    dense = torch.contiguous_format
    return tuple(torch.empty_like(t, memory_format=dense) for t in (k, v, decay, first))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx, d_y, d_states):  # noqa: ARG001 (nobody sees the states)
    return _backward(*ctx.saved_tensors, d_y)


_forward.register_autograd(_gradients, setup_context=_save)


def _grouped(info, in_dims, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Every tensor with the mapped axis in front, where it becomes part of the first."""
    mapped = [
        tensor.expand(info.batch_size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
        for tensor, axis in zip(tensors, in_dims, strict=True)
    ]
    return [tensor.flatten(0, 1) for tensor in mapped]


@_forward.register_vmap
def _(info, in_dims, *tensors):
    found = _forward(*_grouped(info, in_dims, tensors))
    return tuple(t.unflatten(0, (info.batch_size, -1)) for t in found), (0, 0)


@_backward.register_vmap
def _(info, in_dims, *tensors):
    gradients = _backward(*_grouped(info, in_dims, tensors))
    return tuple(g.unflatten(0, (info.batch_size, -1)) for g in gradients), (0, 0, 0, 0)
