"""Causal convolutions of more than a few dozen positions as matrix products.

    conv_by_tiles     a Triton kernel: tiles of the Toeplitz matrix are made where they are used
    conv_in_blocks    PyTorch: blocks of the matrix, one for each distance of blocks of positions

Both are `recallzoo.mixers._convolution.causal_conv`, in the precision of matrix products with
float32 sums: B T^2 / 2 multiplications a channel on tensor cores, where a Fourier transform works
in float32 and moves its intermediate results through memory several times. Neither pads, branches
on values or scatters. `benchmarks/pretrain_speed.py --convolutions` compares what is used on GPUs.

Letters   B batch, T time, D width, K filter taps, C channels, N blocks, R packed runs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recallzoo.mixers._contract import product_dtype
from recallzoo.mixers._groups import over_groups

BLOCK = 128


def conv_channels_by_tiles(
    x: Float[Tensor, "D B T"], taps: Float[Tensor, "D K"]
) -> Float[Tensor, "D B T"]:
    """`causal_conv_channels` by a kernel: CUDA with Triton (and, for tests, its interpreter)."""
    seq_len = x.shape[-1]
    taps = F.pad(taps[..., :seq_len].float(), (0, max(0, seq_len - taps.shape[-1])))
    return toeplitz(x.to(product_dtype(x)).contiguous(), taps).to(x.dtype)


def conv_by_tiles(x: Float[Tensor, "B T D"], taps: Float[Tensor, "D K"]) -> Float[Tensor, "B T D"]:
    """`causal_conv` by the same kernel."""
    return conv_channels_by_tiles(x.movedim(-1, 0), taps).movedim(0, -1)


def conv_in_blocks(
    x: Float[Tensor, "B T D"], taps: Float[Tensor, "D K"], block: int = BLOCK
) -> Float[Tensor, "B T D"]:
    """`causal_conv` in PyTorch: y_i = sum over j <= i of M_(i-j) x_j over blocks of positions."""
    B, seq_len, D = x.shape
    taps = taps[..., :seq_len]
    num_blocks = -(-seq_len // block)
    padded = F.pad(x, (0, 0, 0, num_blocks * block - seq_len))
    columns = padded.unflatten(1, (num_blocks, block)).permute(3, 2, 1, 0).reshape(D, block, -1)
    matrices = _block_matrices(taps, num_blocks, block).to(x.dtype)
    total = torch.zeros(D, block, num_blocks * B, dtype=torch.float32, device=x.device)
    for distance in range(num_blocks):
        inputs = columns[:, :, : (num_blocks - distance) * B]
        part = torch.bmm(matrices[:, distance], inputs)
        total = total + F.pad(part.float(), (distance * B, 0))
    y = total.view(D, block, num_blocks, B).permute(3, 2, 1, 0).flatten(1, 2)
    return y[:, :seq_len].to(x.dtype)


def _block_matrices(
    taps: Float[Tensor, "D K"], num_blocks: int, block: int
) -> Float[Tensor, "D N b b"]:
    """matrices[d, m, r, c] = taps[d, m block + r - c], zero outside of the filter."""
    padded = F.pad(taps, (block, num_blocks * block - taps.shape[-1]))
    # Window m holds taps m block - block .. m block + block - 1.
    windows = padded.unfold(-1, 2 * block, block).flip(-1)
    # As in `_convolution._toeplitz`: each row starts one further on, by reading rows of 2 block in
    # rows of 2 block - 1.
    rows = windows[..., None, :].expand(-1, -1, block, -1).flatten(-2)
    shifted = rows[..., : block * (2 * block - 1)].unflatten(-1, (block, 2 * block - 1))
    return shifted[..., block - 1 :]


@torch.library.custom_op("recallzoo::toeplitz", mutates_args=())
def toeplitz(x: Tensor, taps: Tensor) -> Tensor:
    """y [C, B, T] from x [C, B, T], which sets the precision, and taps [C, T] in float32, see
    `_kernels.toeplitz`."""
    from recallzoo.mixers._kernels import toeplitz as kernel

    return kernel.forward(x.contiguous(), taps.to(x.dtype).contiguous())


@torch.library.custom_op("recallzoo::toeplitz_backward", mutates_args=())
def _backward(x: Tensor, taps: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    from recallzoo.mixers._kernels import toeplitz as kernel

    return kernel.backward(x.contiguous(), taps.to(x.dtype).contiguous(), d_y.contiguous())


@toeplitz.register_fake
def _(x: Tensor, taps: Tensor) -> Tensor:  # noqa: ARG001
    return _dense(x)


@_backward.register_fake
def _(x: Tensor, taps: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _dense(x), _dense(taps)


def _dense(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


toeplitz.register_autograd(
    lambda ctx, d_y: _backward(*ctx.saved_tensors, d_y.contiguous()), setup_context=_save
)


for _operator in (toeplitz, _backward):
    _operator.register_vmap(over_groups(_operator))
