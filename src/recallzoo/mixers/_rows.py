"""Attention of some rows (queries) of a sequence to all tokens up to each of them.

    y[r] = softmax over s <= p[r] of (q[r] . k[s] / sqrt(K)) v[s]

The rows are gathered to the front, attended, and scattered back by the caller: C rows cost
O(C T K) time, and no form here holds more than C by T of anything. Which form computes it:

    plain   holds the C by T scores; the readable one, for short sequences and under
            `torch.func.vmap`, which folds the run axis into its products
    fused   PyTorch's fused operator under a C by T mask, in chunks of rows whose masks are made
            again in the backward pass
    flex    FlexAttention on CUDA, for many rows: its block mask is computed from the positions,
            so blocks of rows beyond the last selected one and keys after it cost nothing.
            Capacity is then memory for queries only, and time follows the number selected

Letters   B batch, T time, H heads, K key width, C rows (capacity).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import checkpoint

from recallzoo.mixers._contract import Context
from recallzoo.mixers._softmax import PLAIN_MAX_SEQ_LEN, attend_at

Form = Literal["plain", "fused", "flex"]

CHUNK = 1024
"""Rows of one call of the fused operator: its mask is CHUNK by T."""
FUSED_MAX_ROWS = 512
"""Most rows for which the fused operator is chosen where FlexAttention is there. With room for 256
rows it takes 0.5 to 0.6 of its time from 2,048 to 65,536 tokens on an H100, with room for 1,024 of
which 256 are selected 0.8 to 1.2 (results/scaling_h100.json, `forms`)."""
BLOCK = 128
"""Rows, and keys, to a block of FlexAttention."""


def gather_rows(
    rows: Bool[Tensor, "B T"], capacity: int
) -> tuple[Int[Tensor, "B C"], Bool[Tensor, "B C"]]:
    """Positions of the selected rows, earliest first, and which of the C there are that many.

    The rest are positions that are not selected, all different; `capacity` must be at least the
    largest number selected.
    """
    order = torch.sort((~rows).to(torch.uint8), dim=1, stable=True).indices[:, :capacity]
    return order, torch.gather(rows, 1, order)


def scatter_rows(
    y: Float[Tensor, "B C D"], positions: Int[Tensor, "B C"], seq_len: int
) -> Float[Tensor, "B T D"]:
    """Rows back at their positions, zeros elsewhere. Positions must differ."""
    zeros = y.new_zeros(y.shape[0], seq_len, y.shape[2])
    return zeros.scatter(1, positions[..., None].expand(-1, -1, y.shape[2]), y)


def form_for(q: Float[Tensor, "B H C K"], seq_len: int, drops: bool) -> Form:
    """The form that suits sizes and device."""
    rows, head_dim = q.shape[-2:]
    if drops or max(rows, seq_len) <= PLAIN_MAX_SEQ_LEN or is_mapped(q):
        return "plain"
    return "flex" if rows > FUSED_MAX_ROWS and can_flex(q, head_dim) else "fused"


def can_flex(x: Tensor, head_dim: int) -> bool:
    """Whether FlexAttention takes the input: on CUDA, outside of `torch.func.vmap`, a head
    width that is a power of two from 16 to 256."""
    return x.is_cuda and not is_mapped(x) and head_dim in (16, 32, 64, 128, 256)


def is_mapped(x: Tensor) -> bool:
    """Whether this is inside of `torch.func.vmap` over `x`."""
    return torch._C._functorch.is_batchedtensor(x)  # pyright: ignore[reportAttributeAccessIssue]


def can_look(x: Tensor) -> bool:
    """Whether a number may be read back from a tensor: not while compiling, under vmap, while a
    CUDA graph is captured, or where there are shapes alone."""
    if torch.compiler.is_compiling() or is_mapped(x) or isinstance(x, FakeTensor):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def attend_rows(
    q: Float[Tensor, "B H C K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T K"],
    positions: Int[Tensor, "B C"],
    valid: Bool[Tensor, "B C"],
    context: Context,
    *,
    dropout: float = 0.0,
    form: Form | None = None,
) -> Float[Tensor, "B H C K"]:
    """Each row's attention up to its own position. Rows that are not `valid` give finite
    numbers of no meaning, which must not be used."""
    form = form or form_for(q, k.shape[-2], dropout > 0.0 and context.training)
    if form == "plain":
        return attend_at(q, k, v, positions, context, dropout=dropout)
    if form == "flex":
        return _attend_flex(q, k, v, positions, valid)
    return _attend_fused(q, k, v, positions)


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    if q.shape[-2] <= CHUNK:
        return _fused_chunk(q, k, v, positions)
    chunks = [
        checkpoint(_fused_chunk, part, k, v, at, use_reentrant=False)
        for part, at in zip(q.split(CHUNK, dim=-2), positions.split(CHUNK, dim=-1), strict=True)
    ]
    return torch.cat(chunks, dim=-2)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _fused_chunk(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    mask = torch.arange(k.shape[-2], device=k.device) <= positions[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    """FlexAttention uncompiled holds all scores, so it is compiled even in eager code."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    y = attend(q, k, v, block_mask=row_blocks(positions, valid, k.shape[-2]))
    assert isinstance(y, Tensor)
    return y


def row_blocks(positions: Int[Tensor, "B C"], valid: Bool[Tensor, "B C"], seq_len: int) -> Any:
    """Which blocks of keys each block of rows needs, as FlexAttention's BlockMask.

    Rows stand in the order of their positions. A block of rows needs the blocks of keys up to
    its last row's position, none if it holds no valid row; blocks that end before its first
    row's position need no mask within.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def up_to_the_row(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        del head
        return key <= positions[batch, row]

    return BlockMask(
        (positions.shape[1], seq_len),
        *_block_lists(positions, valid, seq_len),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=up_to_the_row,
    )


# An operator, so that the lists lie in memory as they are declared here. Where the compiler makes
# them it chooses the stride of their axis of heads, which has length 1. FlexAttention's kernels
# find a sequence's blocks by that stride, and full blocks, in PyTorch 2.11, by the strides of the
# others: they took another sequence's blocks, and may have read outside of the lists.
@torch.library.custom_op("recallzoo::block_lists", mutates_args=())
def _block_lists(positions: Tensor, valid: Tensor, seq_len: int) -> list[Tensor]:
    """Number of blocks, and their indices, for each block of rows: those with a mask, those
    without; then the same for each block of keys."""
    padding = -positions.shape[1] % BLOCK
    first = F.pad(torch.where(valid, positions, seq_len), (0, padding), value=seq_len)
    last = F.pad(torch.where(valid, positions, -1), (0, padding), value=-1)
    first = first.unflatten(1, (-1, BLOCK)).amin(-1)[..., None]
    last = last.unflatten(1, (-1, BLOCK)).amax(-1)[..., None]
    block = torch.arange(_num_blocks(seq_len), device=positions.device)
    needed = block * BLOCK <= last
    full = needed & ((block + 1) * BLOCK <= first + 1)
    kinds = (needed & ~full, full)
    both_ways = (*kinds, *(kind.mT for kind in kinds))
    return [part for listing in map(_listed, both_ways) for part in listing]


def _listed(wanted: Bool[Tensor, "B R K"]) -> tuple[Int[Tensor, "B 1 R"], Int[Tensor, "B 1 R K"]]:
    """How many are wanted along the last axis, and which, first to last before all others."""
    order = (~wanted).to(torch.uint8).sort(dim=-1, stable=True).indices.to(torch.int32)
    return wanted.sum(-1, dtype=torch.int32).contiguous()[:, None], order.contiguous()[:, None]


@_block_lists.register_fake
def _(positions, valid, seq_len):  # noqa: ARG001
    B, of_rows, of_keys = len(positions), _num_blocks(positions.shape[1]), _num_blocks(seq_len)
    shapes = [(of_rows,), (of_rows, of_keys)] * 2 + [(of_keys,), (of_keys, of_rows)] * 2
    return [positions.new_empty(B, 1, *shape, dtype=torch.int32) for shape in shapes]


def _num_blocks(length: int) -> int:
    return math.ceil(length / BLOCK)
