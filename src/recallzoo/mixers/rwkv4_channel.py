"""RWKV-4 channel mixing: a gated feed-forward map of each token and the one before it.

    k = W_k (mu_k x[t] + (1 - mu_k) x[t-1]),    r = W_r (mu_r x[t] + (1 - mu_r) x[t-1])
    y[t] = sigmoid(r) * W_v max(k, 0)^2                            by channel but for the maps

RWKV-4 alternates it with time mixing (`rwkv4`), each behind a norm and a residual of its own: in
a model that is a pattern of the two with state_mixer "none".

Source   Peng et al. 2023, arXiv:2305.13048, eq. 16-18 and appendix D for the mixing ratios.
Differs  Matrices are drawn with standard deviation 0.02, as in `rwkv4`.
State    conv: the input before, D.
Cost     O(B T D^2 expansion).
Letters  B batch, T time, D width.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._contract import Cache, Context, Mixer, OptionValue
from recallzoo.mixers._token_shift import has_kernels, token_shift_pair


class RWKV4Channel(Mixer):
    """RWKV-4 channel mixing (arXiv:2305.13048).

    expansion                 hidden width over D
    layer_index, num_layers   as in `rwkv4`: which time mixing it follows, of how many
    """

    name: ClassVar[str] = "rwkv4_channel"
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"layer_index": 1, "num_layers": 2, "expansion": 1.5},
    )

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        expansion: float = 4.0,
        layer_index: int = 0,
        num_layers: int = 12,
    ) -> None:
        super().__init__(d_model, max_seq_len)
        if not 0 <= layer_index < num_layers:
            raise InvalidConfig(
                f"rwkv4_channel.layer_index={layer_index} must be in 0..{num_layers - 1}: "
                f"num_layers={num_layers} and the first layer is 0."
            )
        d_hidden = round(d_model * expansion)
        if d_hidden < 1:
            raise InvalidConfig(
                f"rwkv4_channel.expansion={expansion} leaves no hidden units at d_model={d_model}."
            )
        ratio = (torch.arange(d_model) / d_model) ** (1.0 - layer_index / num_layers)
        self.channel_mix_k = nn.Parameter(ratio)
        self.channel_mix_r = nn.Parameter(ratio.clone())
        self.key = nn.Linear(d_model, d_hidden, bias=False)
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_hidden, d_model, bias=False)
        for linear in (self.key, self.receptance, self.value):
            nn.init.normal_(linear.weight, std=0.02)

    def _mix(self, x: Float[Tensor, "*S D"], before: Float[Tensor, "*S D"]) -> Tensor:
        return self._gated(
            before + (x - before) * self.channel_mix_k, before + (x - before) * self.channel_mix_r
        )

    def _gated(self, for_key: Float[Tensor, "*S D"], for_gate: Float[Tensor, "*S D"]) -> Tensor:
        hidden = torch.relu(self.key(for_key)) ** 2
        return torch.sigmoid(self.receptance(for_gate)) * self.value(hidden)

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        if has_kernels(x):
            mix = torch.stack([self.channel_mix_k, self.channel_mix_r])
            return self._gated(*token_shift_pair(x, mix))
        return self._mix(x, F.pad(x, (0, 0, 1, 0))[..., :-1, :])

    def init_cache(self, batch_size: int) -> Cache:
        return {"conv": self.key.weight.new_zeros(batch_size, self.d_model)}

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        before = cache["conv"]
        assert isinstance(before, Tensor)
        return self._mix(x_t, before), {"conv": x_t}
