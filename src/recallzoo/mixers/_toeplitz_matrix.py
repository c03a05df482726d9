"""Toeplitz matrices as an operator of PyTorch that packs and compiles.

    toeplitz_matrix(taps, dtype)[c, s, t] = taps[c, t - s], zero where s > t

so that rows of inputs times the matrix are rows of outputs, and neither the product nor its
gradient is transposed.

Written out, the matrix is a view of repeated rows that the compiler copies in float32 before it
converts, and its gradient a strided sum; on CUDA with Triton kernels write and read it once.

Letters   C channels, T time, R packed runs.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._contract import HAS_TRITON
from recallzoo.mixers._groups import over_groups


def toeplitz_matrix(taps: Float[Tensor, "C T"], dtype: torch.dtype) -> Float[Tensor, "C T T"]:
    """The matrices that convolve with `taps`."""
    if taps.is_cuda and HAS_TRITON:
        return _matrix(taps, dtype)
    return written_out(taps).to(dtype)


def written_out(taps: Float[Tensor, "C T"]) -> Float[Tensor, "C T T"]:
    """`toeplitz_matrix` in PyTorch."""
    # Column t is the reversed filter, T zeros behind it, shifted by t. Repeating a row of length
    # 2T and reading it in rows of 2T - 1 shifts each by one more; unlike indexing by t - s, its
    # gradient is a plain sum.
    C, T = taps.shape
    row = torch.nn.functional.pad(taps.flip(-1), (0, T))
    rows = row[:, None, :].expand(-1, T, -1).reshape(C, 2 * T * T)
    shifted = rows[:, : T * (2 * T - 1)].unflatten(-1, (T, 2 * T - 1))
    return shifted[:, :, T - 1 :].transpose(-1, -2)


@torch.library.custom_op("recallzoo::toeplitz_matrix", mutates_args=())
def _matrix(taps: Tensor, dtype: torch.dtype) -> Tensor:
    from recallzoo.mixers._kernels import toeplitz_matrix as kernel

    return kernel.fill(taps.contiguous(), dtype)


@torch.library.custom_op("recallzoo::toeplitz_diagonals", mutates_args=())
def _diagonals(d_matrix: Tensor) -> Tensor:
    from recallzoo.mixers._kernels import toeplitz_matrix as kernel

    return kernel.sum_diagonals(d_matrix.contiguous())


@_matrix.register_fake
def _(taps, dtype):
    return taps.new_empty(*taps.shape, taps.shape[-1], dtype=dtype)


@_diagonals.register_fake
def _(d_matrix):
    return d_matrix.new_empty(d_matrix.shape[:2], dtype=torch.float32)


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    ctx.taps_dtype = inputs[0].dtype


def _gradient(ctx, d_matrix):
    return _diagonals(d_matrix).to(ctx.taps_dtype), None


_matrix.register_autograd(_gradient, setup_context=_save)


for _operator in (_matrix, _diagonals):
    _operator.register_vmap(over_groups(_operator))
