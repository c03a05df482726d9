"""Rows of sequences in another order, as an operator of PyTorch that packs and compiles.

    y[b, c] = x[b, positions[b, c]],    no position twice in a row of `positions`

so that the gradient is each row of dy put back at its place, and nothing is added up: neither
atomically, as that of `gather` is, nor by a product, whose matrix of ones is as long as the
sequence for each row moved and for all T of them T by T.

Letters   B batch, T time, D width, C rows taken.
"""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from recallzoo.mixers._groups import over_groups


def distinct_rows(
    x: Shaped[Tensor, "B T D"], positions: Int[Tensor, "B C"]
) -> Shaped[Tensor, "B C D"]:
    """The rows of x at `positions`, all different in each sequence: O(C D) time, and O(T D) for
    the gradient."""
    return _take(x, positions)


@torch.library.custom_op("recallzoo::distinct_rows", mutates_args=())
def _take(x: Tensor, positions: Tensor) -> Tensor:
    rows = x.flatten(0, 1).index_select(0, _flat(positions, x.shape[1]))
    return rows.view(*positions.shape, x.shape[2])


@torch.library.custom_op("recallzoo::distinct_rows_backward", mutates_args=())
def _put_back(dy: Tensor, positions: Tensor, seq_len: int) -> Tensor:
    B, C, D = dy.shape
    made = dy.new_empty if seq_len == C else dy.new_zeros
    dx = made(B * seq_len, D)
    return dx.index_copy_(0, _flat(positions, seq_len), dy.reshape(B * C, D)).view(B, seq_len, D)


def _flat(positions: Tensor, seq_len: int) -> Tensor:
    """Positions in all sequences one after another."""
    start = torch.arange(positions.shape[0], device=positions.device) * seq_len
    return (start[:, None] + positions).flatten()


@_take.register_fake
def _(x, positions):
    return x.new_empty(*positions.shape, x.shape[2])


@_put_back.register_fake
def _(dy, positions, seq_len):  # noqa: ARG001
    return dy.new_empty(dy.shape[0], seq_len, dy.shape[2])


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    x, positions = inputs
    ctx.save_for_backward(positions)
    ctx.seq_len = x.shape[1]


def _gradient(ctx, dy):
    (positions,) = ctx.saved_tensors
    return _put_back(dy, positions, ctx.seq_len), None


_take.register_autograd(_gradient, setup_context=_save)

for _operator in (_take, _put_back):
    _operator.register_vmap(over_groups(_operator))
