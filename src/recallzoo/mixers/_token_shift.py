"""RWKV's mixtures of each token and the one before it as operators of PyTorch.

    token_shift_mix(x, mix) -> mixed          mixed[m, t] = x[t-1] + mix[m] (x[t] - x[t-1])

with x[-1] = 0. x is read once for all mixtures, and its gradient and those of the ratios are made
in one pass, where PyTorch's own would take a reduction for each. Sequences come in groups with
ratios of their own, so that mapping over packed runs (`torch.func.vmap`) only adds groups.

Letters   G groups of N sequences, T time, D width, M mixtures, R packed runs.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._contract import HAS_TRITON, product_dtype
from recallzoo.mixers._groups import over_groups


def has_kernels(x: Tensor) -> bool:
    """Whether RWKV's kernels take this input."""
    return x.is_cuda and HAS_TRITON


def token_shift_mix(
    x: Float[Tensor, "B T D"], mix: Float[Tensor, "M D"]
) -> Float[Tensor, "M B T D"]:
    """Two or three mixtures in one tensor, in the dtype that a product would take them in."""
    return _stacked(x, mix.float()[None], product_dtype(x)).squeeze(0)


def token_shift_pair(
    x: Float[Tensor, "B T D"], mix: Float[Tensor, "2 D"]
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
    """Two mixtures in tensors of their own, for products of different shape: gradients that come
    apart need no copy then."""
    return _pair(x, mix.float()[None], product_dtype(x))


@torch.library.custom_op("recallzoo::token_shift_mix", mutates_args=())
def _stacked(x: Tensor, mix: Tensor, dtype: torch.dtype) -> Tensor:
    """[G, M, N, T, D] in `dtype` from x [G N, T, D] and mix [G, M, D] in float32."""
    from recallzoo.mixers._kernels import token_shift as kernel

    groups, num_mixtures, _ = mix.shape
    mixed = x.new_empty(groups, num_mixtures, len(x) // groups, *x.shape[1:], dtype=dtype)
    kernel.forward(x.contiguous(), mix.contiguous(), mixed.unbind(1))
    return mixed


@torch.library.custom_op("recallzoo::token_shift_mix_backward", mutates_args=())
def _stacked_backward(x: Tensor, mix: Tensor, d_mixed: Tensor) -> tuple[Tensor, Tensor]:
    from recallzoo.mixers._kernels import token_shift as kernel

    return kernel.backward(x.contiguous(), mix.contiguous(), d_mixed.contiguous().unbind(1))


@torch.library.custom_op("recallzoo::token_shift_pair", mutates_args=())
def _pair(x: Tensor, mix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Twice [G N, T, D] in `dtype` from x [G N, T, D] and mix [G, 2, D] in float32."""
    from recallzoo.mixers._kernels import token_shift as kernel

    pair = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype)
    kernel.forward(x.contiguous(), mix.contiguous(), _by_group(mix, *pair))
    return pair


@torch.library.custom_op("recallzoo::token_shift_pair_backward", mutates_args=())
def _pair_backward(
    x: Tensor, mix: Tensor, d_first: Tensor, d_second: Tensor
) -> tuple[Tensor, Tensor]:
    from recallzoo.mixers._kernels import token_shift as kernel

    given = _by_group(mix, d_first.contiguous(), d_second.contiguous())
    return kernel.backward(x.contiguous(), mix.contiguous(), given)


def _by_group(mix: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [t.unflatten(0, (len(mix), -1)) for t in tensors]


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


@_stacked.register_fake
def _(x, mix, dtype):
    groups, num_mixtures, _ = mix.shape
    return x.new_empty(groups, num_mixtures, x.shape[0] // groups, *x.shape[1:], dtype=dtype)


@_pair.register_fake
def _(x, mix, dtype):  # noqa: ARG001
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype)


@_stacked_backward.register_fake
def _(x, mix, d_mixed):  # noqa: ARG001
    return _dense(x, mix)


@_pair_backward.register_fake
def _(x, mix, d_first, d_second):  # noqa: ARG001
    return _dense(x, mix)


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])


_stacked.register_autograd(
    lambda ctx, d_mixed: (*_stacked_backward(*ctx.saved_tensors, d_mixed), None),
    setup_context=_save,
)
_pair.register_autograd(
    lambda ctx, *given: (*_pair_backward(*ctx.saved_tensors, *given), None), setup_context=_save
)


for _operator in (_stacked, _stacked_backward, _pair, _pair_backward):
    _operator.register_vmap(over_groups(_operator))
