"""Implicit long convolution: a long filter that is a small network's function of the lag.

    y[t] = sum over 0 <= k <= t of h[k] x[t - k],    h[k] = W2 relu(W1 z[k] + b1) + b2

z[k] holds time, k / (max_seq_len - 1), and cosines and sines of it at fixed frequencies.

Source   Arora et al. 2023, arXiv:2312.04927; the implicit filter of Poli et al. 2023,
         arXiv:2302.10866, without sines and modulation; HazyResearch/zoology at dbcb60d,
         zoology/mixers/convolution.py (ImplicitLongConvolution).
Differs  The reference adds x to the output: `skip`, off by default. `bias` adds the constant that
         BaseConv has. As there, 3 features mean one frequency, 1e-4, so that time alone varies;
         more features give more frequencies. `init="normal"` draws the network as the
         reference's model does, with standard deviation 0.02, which makes the filter almost
         zero and needs `skip` to pass anything on.
State    conv: all inputs, D T.
Cost     O(B D T log T), or O(B D T^2) as matrix products where that is faster.
Letters  B batch, T time, D width.
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._contract import OptionValue
from recallzoo.mixers._convolution import (
    Convolution,
    in_float32,
    init_linear_maps,
    linear_float32,
    position_features,
    require_features,
)


class ImplicitLongConv(Convolution):
    """Causal depthwise convolution whose taps are computed from their lag.

    num_features   time and pairs of cosine and sine, an odd number
    filter_width   hidden width of the network
    init           "torch": as PyTorch draws linear maps; "normal": standard deviation 0.02
    """

    name: ClassVar[str] = "implicit_long_conv"
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"num_features": 7, "filter_width": 5, "skip": True, "bias": True},
        {"init": "normal", "skip": True},
    )

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        num_features: int = 3,
        filter_width: int = 16,
        bias: bool = False,
        skip: bool = False,
        init: Literal["torch", "normal"] = "torch",
    ) -> None:
        super().__init__(d_model, max_seq_len, bias=bias, skip=skip)
        require_features(self.name, num_features)
        if filter_width < 1:
            raise InvalidConfig(f"{self.name}.filter_width={filter_width} must be at least 1.")
        self.num_features = num_features
        self.filter_in = nn.Linear(num_features, filter_width)
        self.filter_out = nn.Linear(filter_width, d_model)
        init_linear_maps(self, init, self.name)

    def filter_taps(self, seq_len: int) -> Float[Tensor, "D K"]:
        self._check_length(seq_len)
        device = self.filter_in.weight.device
        with in_float32(device):
            z = position_features(self.num_features, self.max_seq_len, seq_len, device)
            hidden = torch.relu(linear_float32(z, self.filter_in))
            return linear_float32(hidden, self.filter_out).transpose(-1, -2)
