"""Hyena of order 2: a long implicit convolution between two gates.

    x1, x2, v = short(W_in x + b_in)              each of width D; short: a few taps by channel
    y[t]      = W_out (x2[t] * c[t]) + b_out      c[t] = sum over k <= t of h[k] (x1 v)[t - k]
    h[k]      = mlp(z[k]) (e^(-rate k / (max_seq_len - 1)) + shift)    (+ d at k = 0)

The network has sines for activations; z[k] holds time and cosines and sines of it and is
trained as well; rates are fixed and spread over the channels.

Source   Poli et al. 2023, arXiv:2302.10866; HazyResearch/zoology at dbcb60d,
         zoology/mixers/hyena.py.
Differs  The reference marks the filter's network for a learning rate of 1e-3 and z for 1e-5, both
         without weight decay, and its trainer ignores the marks. Here they hold:
         `filter_learning_rate` and `position_learning_rate`; None gives the run's, as in published
         sweeps. Heads, blocks, two directions and filter dropout, which are broken or unused
         there, are left out. As there, 3 features mean one frequency, 1e-4. Its model draws
         linear maps, the filter's included, with standard deviation 0.02: `init="normal"`.
State    conv: the last inputs of the short filter, (kernel_size - 1) 3 D, and all of the long
         one, D T.
Cost     O(B T D (D + log T)), and O(T F^2) for the filter.
Letters  B batch, T time, D width, F filter_width.
"""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._channel_major import from_channels, to_channels
from recallzoo.mixers._contract import Cache, Context, Mixer, OptionValue, ParameterRule
from recallzoo.mixers._convolution import (
    causal_conv_channels,
    conv_step,
    in_float32,
    init_linear_maps,
    linear_float32,
    position_features,
    require_features,
    require_length,
)
from recallzoo.mixers._gated_short_conv import gated_short_conv
from recallzoo.mixers._select_channels import select_from_channels
from recallzoo.mixers.short_conv import ShortConv

DECAY_TARGET = 1e-2
FAST_DECAY, SLOW_DECAY = 0.3, 1.5
"""Share of max_seq_len after which the fastest and the slowest channel's filter has decayed to
DECAY_TARGET."""


class SineFilter(nn.Module):
    """The taps as a function of their lag: a network with sines, times a decay per channel."""

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        num_features: int,
        filter_width: int,
        num_hidden_layers: int,
        sine_frequency: float,
        modulate: bool,
        modulation_shift: float,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.max_seq_len = max_seq_len
        self.modulate = modulate
        self.modulation_shift = modulation_shift
        self.positions = nn.Parameter(position_features(num_features, max_seq_len, max_seq_len))
        self.frequency = nn.Parameter(torch.full((filter_width,), sine_frequency))
        widths = [num_features] + [filter_width] * (num_hidden_layers + 1)
        self.hidden = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))
        self.last = nn.Linear(filter_width, d_model, bias=False)
        self.direct = nn.Parameter(torch.randn(d_model))

    def forward(self, seq_len: int) -> Float[Tensor, "D T"]:
        """Taps 0 to seq_len - 1, the direct term in the first, in float32."""
        device = self.positions.device
        with in_float32(device):
            h = self.positions[:seq_len].float()
            for linear in self.hidden:
                assert isinstance(linear, nn.Linear)
                h = torch.sin(self.frequency.float() * linear_float32(h, linear))
            h = linear_float32(h, self.last)
            if self.modulate:
                lag = torch.arange(seq_len, dtype=torch.float32, device=device)[:, None]
                slow, fast = (-math.log(DECAY_TARGET) / pct for pct in (SLOW_DECAY, FAST_DECAY))
                rate = torch.linspace(slow, fast, self.d_model, device=device)
                decay = torch.exp(-rate * lag / max(self.max_seq_len - 1, 1))
                h = h * (decay + self.modulation_shift)
            direct = F.pad(self.direct.float()[:, None], (0, seq_len - 1))
            return h.transpose(-1, -2) + direct


class Hyena(Mixer):
    """Hyena operator of order 2 (arXiv:2302.10866).

    kernel_size              taps of the short filter
    filter_width             hidden width of the filter's network
    num_features             time and pairs of cosine and sine that it reads, an odd number
    num_hidden_layers        hidden to hidden maps in it
    sine_frequency           initial frequency of its sines
    modulate                 whether the filter decays with the lag
    modulation_shift         what the decay levels off at
    dropout                  on the long convolution's input
    filter_learning_rate     peak learning rate of the filter's network; None: the run's
    position_learning_rate   that of the features it reads; None: the run's
    init                     "torch": as PyTorch draws linear maps; "normal": deviation 0.02
    """

    name: ClassVar[str] = "hyena"
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"kernel_size": 1, "filter_width": 8, "num_features": 5, "modulation_shift": 0.05},
        {"modulate": False, "num_hidden_layers": 0, "dropout": 0.2, "init": "normal"},
    )

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        kernel_size: int = 3,
        filter_width: int = 64,
        num_features: int = 3,
        num_hidden_layers: int = 2,
        sine_frequency: float = 1.0,
        modulate: bool = True,
        modulation_shift: float = 0.0,
        dropout: float = 0.0,
        filter_learning_rate: float | None = 1e-3,
        position_learning_rate: float | None = 1e-5,
        init: Literal["torch", "normal"] = "torch",
    ) -> None:
        super().__init__(d_model, max_seq_len)
        require_features(self.name, num_features)
        for option, value, least in (
            ("kernel_size", kernel_size, 1),
            ("filter_width", filter_width, 1),
            ("num_hidden_layers", num_hidden_layers, 0),
        ):
            if value < least:
                raise InvalidConfig(f"hyena.{option}={value} must be at least {least}.")
        if not 0.0 <= dropout < 1.0:
            raise InvalidConfig(f"hyena.dropout={dropout} must be in [0, 1).")
        if modulation_shift and not modulate:
            raise InvalidConfig(
                f"hyena.modulation_shift={modulation_shift} would be ignored with modulate=False. "
                f"Leave it out, or set modulate=True."
            )
        for option, rate in (
            ("filter_learning_rate", filter_learning_rate),
            ("position_learning_rate", position_learning_rate),
        ):
            if rate is not None and rate <= 0.0:
                raise InvalidConfig(f"hyena.{option}={rate} must be above 0, or None.")
        self.dropout = dropout
        self.filter_learning_rate = filter_learning_rate
        self.position_learning_rate = position_learning_rate
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.short = ShortConv(3 * d_model, max_seq_len, kernel_size=kernel_size)
        self.filter = SineFilter(
            d_model,
            max_seq_len,
            num_features=num_features,
            filter_width=filter_width,
            num_hidden_layers=num_hidden_layers,
            sine_frequency=sine_frequency,
            modulate=modulate,
            modulation_shift=modulation_shift,
        )
        init_linear_maps(self, init, self.name)

    def parameter_rules(self) -> dict[str, ParameterRule]:
        network = ParameterRule(decay=False, learning_rate=self.filter_learning_rate)
        rules = {
            f"filter.{name}": network
            for name, _ in self.filter.named_parameters()
            if name not in ("positions", "direct")
        }
        positions = ParameterRule(decay=False, learning_rate=self.position_learning_rate)
        return {**rules, "filter.positions": positions}

    def _gate_and_recalled(
        self, x: Float[Tensor, "B T D"], context: Context
    ) -> tuple[Float[Tensor, "D B T"], Float[Tensor, "D B T"]]:
        """The second gate, and the long convolution that it is multiplied with, channels first."""
        seq_len = x.shape[-2]
        require_length(self.name, seq_len, self.max_seq_len)
        weight, bias, short = self.in_proj.weight, self.in_proj.bias, self.short
        assert short.bias is not None
        u, gate2 = gated_short_conv(to_channels(weight, x), bias, short.filter, short.bias)
        # Masks are a function of the position in [B, T, D].
        u = context.dropout(u.permute(1, 2, 0), self.dropout).permute(2, 0, 1)
        return gate2, causal_conv_channels(u, self.filter(seq_len))

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        gate2, recalled = self._gate_and_recalled(x, context)
        y = from_channels(gate2 * recalled, self.out_proj.weight)
        return y + self.out_proj.bias.to(y.dtype)

    def forward_at(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "B Q"], context: Context
    ) -> Float[Tensor, "B Q D"]:
        both = self._gate_and_recalled(x, context)
        gate2, recalled = (select_from_channels(z, positions) for z in both)
        return self.out_proj(gate2 * recalled)

    def init_cache(self, batch_size: int) -> Cache:
        past = self.in_proj.weight.new_zeros(batch_size, 0, self.d_model)
        return {"short": self.short.init_cache(batch_size), "long": {"conv": past}}

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        short, long = cache["short"], cache["long"]
        assert isinstance(short, dict)
        assert isinstance(long, dict)
        past = long["conv"]
        assert isinstance(past, Tensor)
        require_length(self.name, past.shape[1] + 1, self.max_seq_len)
        projected, short = self.short.step(self.in_proj(x_t), short, context)
        gate1, gate2, v = projected.chunk(3, dim=-1)
        y_t, inputs = conv_step(gate1 * v, past, self.filter(past.shape[1] + 1))
        return self.out_proj(gate2 * y_t), {"short": short, "long": {"conv": inputs}}
