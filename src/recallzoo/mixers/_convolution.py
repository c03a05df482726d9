"""Causal convolution, one filter per channel, and what the convolutional mixers share.

    y[t, d] = sum over lags 0 <= k <= min(t, K-1) of filter[d, k] x[t - k, d]

`causal_conv` is one function with five ways to compute it, picked by size and device:

    shifts     K products with shifted inputs, O(B T K D), for a few taps
    Toeplitz   a lower-triangular matrix per channel, [T, T], times its inputs: O(B T^2 D), but
               as matrix products, in the precision of matrix products (bfloat16 under autocast)
    tiles      the same products by a kernel that makes the matrix where it is used, on CUDA in 16
               bits (`_long_convolution`)
    FFT products  O(B D T^(3/2)): a Fourier transform of length T made of matrix products, by
               kernels, likewise on CUDA in 16 bits (`_fft_products`)
    FFT        O(B D T log T), in float32; padded to T + K - 1 or more so that nothing wraps

None of them scatters, branches on values or uses a convolution operator, which `vmap` over
packed runs maps badly.

Letters   B batch, T time, D width, K filter taps, Q queries.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._contract import (
    HAS_TRITON,
    Cache,
    Context,
    Mixer,
    product_dtype,
    select_positions,
)
from recallzoo.mixers._fft_conv import fft_conv
from recallzoo.mixers._fft_products import conv_channels_by_fft_products
from recallzoo.mixers._long_convolution import conv_channels_by_tiles
from recallzoo.mixers._select_channels import select_from_channels
from recallzoo.mixers._toeplitz_matrix import toeplitz_matrix

MAX_SHIFTS = 4
"""Taps up to which shifted sums are used: forward and backward on a CPU core, 3 taps take 0.7
times as long as by FFT, 4 taps 0.9, 6 taps 1.3."""
MAX_TOEPLITZ = {"cpu": 128, "cuda": 1024}
"""Length up to which Toeplitz matrices are used. Forward and backward on a CPU core take, against
FFT, 0.4 to 1 times as long at T = 64, 1.5 (small batches) to 0.3 (large ones, as in packs) at
128, and about 2 at 256. On CUDA products are fast and Fourier transforms are not."""
TILES = range(65, 8193)
"""Lengths for which tiles are used, but for those of FFT products. Forward and backward on an H100,
16 sequences of 768 channels, take 0.1 of the time of Toeplitz matrices at T = 1,024, and of that of
FFT 0.20 there, 0.23 at 2,048 and 0.35 at 4,096."""
FFT_PRODUCTS = (range(1793, 2049), range(2561, 65_537))
"""Lengths for which FFT products are used: their work grows with T^(3/2), that of tiles with T^2,
and is that of the next power of two. On an H100 they take, of the time of tiles, 0.69 (4 sequences)
to 0.91 (16) at 2,048, 0.42 to 0.51 at 4,096, 0.40 at 8,192 and 0.28 at 16,384; transforms in parts,
above that, have not been timed. On GPUs of the Hopper generation alone: for others the compiler
keeps their numbers in memory."""
MAX_TILED_TAPS = 1024
"""Taps up to which tiles serve every length, as they stop where the taps do: FFT products take the
time of tiles of about 900 taps at T = 4,096 and of 1,600 at 8,192."""


def causal_conv(x: Float[Tensor, "B T D"], taps: Float[Tensor, "D K"]) -> Float[Tensor, "B T D"]:
    """Each channel of x filtered by its own taps; the first tap weighs the present. Taps that
    reach past the first token are not used. The output has the dtype of x."""
    seq_len = x.shape[-2]
    taps = taps[..., :seq_len]
    if taps.shape[-1] <= MAX_SHIFTS:
        return conv_by_shifts(x, taps)
    return way_of_channels(x, seq_len, taps.shape[-1])(x.movedim(-1, 0), taps).movedim(0, -1)


def way_of_channels(x: Tensor, seq_len: int, num_taps: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The way for more than a few taps, of inputs whose channels come first."""
    if x.is_cuda and HAS_TRITON and product_dtype(x) in (torch.bfloat16, torch.float16):
        if seq_len >= TILES.start and num_taps <= MAX_TILED_TAPS:
            return conv_channels_by_tiles
        if any(seq_len in lengths for lengths in FFT_PRODUCTS) and is_hopper(x.device.index):
            return conv_channels_by_fft_products
        if seq_len in TILES:
            return conv_channels_by_tiles
    if seq_len <= MAX_TOEPLITZ.get(x.device.type, 0):
        return conv_channels_by_toeplitz
    return conv_channels_by_fft


def is_hopper(device: int | None) -> bool:
    """Whether a GPU multiplies as Hopper's do: groups of four warps, from shared memory."""
    # AMD's GPUs have numbers of 9 as well.
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


# What torch.compiler.assume_constant_result does, but for importing the compiler: two seconds more
# for every command that knows mixers.
is_hopper._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def conv_by_shifts(x: Float[Tensor, "B T D"], taps: Float[Tensor, "D K"]) -> Float[Tensor, "B T D"]:
    """`causal_conv` as a sum over taps."""
    seq_len, num_taps = x.shape[-2], taps.shape[-1]
    padded = F.pad(x, (0, 0, num_taps - 1, 0))
    weights = taps.to(x.dtype).unbind(-1)
    y = x * weights[0]
    for lag in range(1, num_taps):
        start = num_taps - 1 - lag
        y = y + padded[..., start : start + seq_len, :] * weights[lag]
    return y


def causal_conv_channels(
    x: Float[Tensor, "D B T"], taps: Float[Tensor, "D K"]
) -> Float[Tensor, "D B T"]:
    """`causal_conv` of an input whose channels come first: where it is products for each channel,
    nothing is moved."""
    seq_len = x.shape[-1]
    taps = taps[..., :seq_len]
    if taps.shape[-1] <= MAX_SHIFTS:
        return conv_by_shifts(x.movedim(0, -1), taps).movedim(-1, 0)
    return way_of_channels(x, seq_len, taps.shape[-1])(x, taps)


def conv_channels_by_toeplitz(
    x: Float[Tensor, "D B T"], taps: Float[Tensor, "D K"]
) -> Float[Tensor, "D B T"]:
    """`causal_conv_channels` as a matrix product per channel."""
    taps = F.pad(taps, (0, x.shape[-1] - taps.shape[-1]))
    return torch.bmm(x, toeplitz_matrix(taps, x.dtype)).to(x.dtype)


def conv_channels_by_fft(
    x: Float[Tensor, "D B T"], taps: Float[Tensor, "D K"]
) -> Float[Tensor, "D B T"]:
    """`causal_conv_channels` through the frequency domain, in float32."""
    return fft_conv(x, taps)


def conv_step(
    x_t: Float[Tensor, "B D"], past: Float[Tensor, "B N D"], taps: Float[Tensor, "D K"]
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B M D"]]:
    """One position of `causal_conv` and the inputs up to and including it."""
    inputs = torch.cat([past, x_t[:, None]], dim=1)
    reach = min(inputs.shape[1], taps.shape[1])
    weights = taps[:, :reach].flip(1).transpose(0, 1).to(x_t.dtype)
    return (inputs[:, inputs.shape[1] - reach :] * weights).sum(1), inputs


class Convolution(Mixer):
    """A mixer that is one causal convolution: what its subclasses differ in is the filter.

    y = conv(x, filter) (+ bias) (+ x with `skip`)
    """

    def __init__(self, d_model: int, max_seq_len: int, *, bias: bool, skip: bool) -> None:
        super().__init__(d_model, max_seq_len)
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None
        self.skip = skip

    def filter_taps(self, seq_len: int) -> Float[Tensor, "D K"]:
        """The filter for an input of `seq_len` tokens, in float32."""
        raise NotImplementedError(f"{type(self).__name__} lacks filter_taps")

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        return self._finish(causal_conv(x, self.filter_taps(x.shape[-2])), x)

    def forward_at(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "B Q"], context: Context
    ) -> Float[Tensor, "B Q D"]:
        seq_len = x.shape[-2]
        taps = self.filter_taps(seq_len)[..., :seq_len]
        if taps.shape[-1] <= MAX_SHIFTS:
            y = select_positions(conv_by_shifts(x, taps), positions)
        else:
            y = select_from_channels(causal_conv_channels(x.movedim(-1, 0), taps), positions)
        return self._finish(y, select_positions(x, positions) if self.skip else y)

    def init_cache(self, batch_size: int) -> Cache:
        parameter = next(self.parameters())
        return {"conv": parameter.new_zeros(batch_size, 0, self.d_model)}

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        past = cache["conv"]
        assert isinstance(past, Tensor)
        y_t, inputs = conv_step(x_t, past, self.filter_taps(past.shape[1] + 1))
        return self._finish(y_t, x_t), {"conv": inputs}

    def _finish(self, y: Float[Tensor, "*S D"], x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y + x if self.skip else y

    def _check_length(self, seq_len: int) -> None:
        require_length(type(self).name, seq_len, self.max_seq_len)


def require_length(name: str, seq_len: int, max_seq_len: int) -> None:
    """InvalidConfig if an input is longer than the filter."""
    if seq_len > max_seq_len:
        raise InvalidConfig(
            f"{name} has a filter for {max_seq_len} tokens and was given {seq_len}. Build it with "
            f"max_seq_len={seq_len} or more."
        )


def require_features(name: str, num_features: int) -> None:
    """InvalidConfig unless `num_features` is time and whole pairs of cosine and sine."""
    if num_features < 3 or num_features % 2 == 0:
        raise InvalidConfig(
            f"{name}.num_features={num_features} must be odd and at least 3: time, then a cosine "
            f"and a sine for each frequency."
        )


def position_features(
    num_features: int, max_seq_len: int, seq_len: int, device: torch.device | None = None
) -> Float[Tensor, "T F"]:
    """What an implicit filter is a function of: time in [0, 1] and, for (F - 1) / 2 frequencies
    f evenly spaced from 1e-4 to the largest, cos(2 pi f k / max_seq_len) and minus its sine."""
    num_bands = (num_features - 1) // 2
    k = torch.arange(seq_len, dtype=torch.float32, device=device)[:, None]
    frequency = torch.linspace(1e-4, num_bands - 1, num_bands, device=k.device)
    angle = frequency * (2 * torch.pi * k / max_seq_len)
    return torch.cat([k / max(max_seq_len - 1, 1), torch.cos(angle), -torch.sin(angle)], dim=-1)


def linear_float32(x: Float[Tensor, "*S F"], linear: nn.Linear) -> Float[Tensor, "*S G"]:
    """A linear map in float32 whatever its weights' dtype."""
    bias = None if linear.bias is None else linear.bias.float()
    return F.linear(x, linear.weight.float(), bias)


def in_float32(device: torch.device) -> torch.autocast:
    """Filters are computed in float32 also where matrix products are not: their errors would
    add up over all lags."""
    return torch.autocast(device.type, enabled=False)


def init_linear_maps(module: nn.Module, init: str, name: str) -> None:
    """`torch` leaves linear maps as PyTorch draws them; `normal` draws weights of standard
    deviation 0.02 and sets biases to zero."""
    if init not in ("torch", "normal"):
        raise InvalidConfig(f"{name}.init={init!r} must be 'torch' or 'normal'.")
    if init == "torch":
        return
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
