"""BaseConv: a causal convolution, gated by a linear map of the same input.

    y[t] = (W x[t] + b1) * (c[t] + b2),    c[t] = sum over k <= t of h[k] x[t - k]

by channel but for W. The filter h is the same for every input: BaseConv shifts by distances
that it has learned, and cannot look up a key that stands at another one each time.

Source   Arora et al. 2023, arXiv:2312.04927, definition of BaseConv; HazyResearch/zoology at
         dbcb60d, zoology/mixers/base_conv.py.
Differs  The reference adds x to y, though the block does so as well (`skip`), and to c where the
         filter is long (`filter_skip`), where it leaves b2 out. Both skips are off by default:
         this is the paper's equation. Give each layer its own filter with a pattern of mixers,
         where the reference takes a list of kernel sizes. Its model draws linear maps, those of
         the filter's network included, with standard deviation 0.02: `init="normal"`.
State    conv: the last K - 1 inputs, (K - 1) D, or all, D T, where the filter is long.
Cost     O(B T D (D + K)), or O(B T D (D + log T)) where the filter is long.
Letters  B batch, T time, D width, K taps (kernel_size).
"""

from typing import ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._contract import Cache, Context, Mixer, OptionValue, select_positions
from recallzoo.mixers._convolution import Convolution, init_linear_maps
from recallzoo.mixers.implicit_long_conv import ImplicitLongConv
from recallzoo.mixers.long_conv import LongConv
from recallzoo.mixers.short_conv import ShortConv

LONG = -1


class BaseConv(Mixer):
    """Gated convolution (arXiv:2312.04927).

    kernel_size   taps of the filter; -1: as many as the longest input has tokens
    implicit      whether a long filter is computed by a network or holds a parameter per tap
    activation    applied to both factors
    skip          add x to the output
    filter_skip   add x to the convolution
    init          "torch": as PyTorch draws linear maps; "normal": standard deviation 0.02
    """

    name: ClassVar[str] = "base_conv"
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"kernel_size": -1, "filter_skip": True, "skip": True},
        {"kernel_size": -1, "implicit": False, "activation": "silu"},
        {"kernel_size": 1, "init": "normal"},
    )

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        kernel_size: int = 3,
        implicit: bool = True,
        activation: Literal["none", "silu"] = "none",
        skip: bool = False,
        filter_skip: bool = False,
        init: Literal["torch", "normal"] = "torch",
    ) -> None:
        super().__init__(d_model, max_seq_len)
        if kernel_size < 1 and kernel_size != LONG:
            raise InvalidConfig(
                f"base_conv.kernel_size={kernel_size} must be at least 1, or -1 for a filter as "
                f"long as the longest input."
            )
        if kernel_size != LONG and not implicit:
            raise InvalidConfig(
                f"base_conv.implicit=False would be ignored with kernel_size={kernel_size}: a "
                f"short filter always has a parameter per tap. Leave it out, or set kernel_size=-1."
            )
        if activation not in ("none", "silu"):
            raise InvalidConfig(f"base_conv.activation={activation!r} must be 'none' or 'silu'.")
        self.activation = activation
        self.skip = skip
        self.gate = nn.Linear(d_model, d_model)
        self.conv: Convolution
        if kernel_size != LONG:
            self.conv = ShortConv(d_model, max_seq_len, kernel_size=kernel_size, skip=filter_skip)
        elif implicit:
            self.conv = ImplicitLongConv(d_model, max_seq_len, bias=True, skip=filter_skip)
        else:
            self.conv = LongConv(d_model, max_seq_len, bias=True, skip=filter_skip)
        init_linear_maps(self, init, self.name)

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        return self._combine(x, self.conv(x, context))

    def forward_at(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "B Q"], context: Context
    ) -> Float[Tensor, "B Q D"]:
        c = self.conv.forward_at(x, positions, context)
        return self._combine(select_positions(x, positions), c)

    def init_cache(self, batch_size: int) -> Cache:
        return self.conv.init_cache(batch_size)

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        c_t, cache = self.conv.step(x_t, cache, context)
        return self._combine(x_t, c_t), cache

    def _combine(self, x: Float[Tensor, "*S D"], c: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        gate = self.gate(x)
        if self.activation == "silu":
            gate, c = F.silu(gate), F.silu(c)
        y = gate * c
        return y + x if self.skip else y
