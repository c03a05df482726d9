"""H3: a shift state-space model on keys and a diagonal one on key-value products.

    k'  = shift(W_k x)                                by channel, sees the last N inputs
    S_t = diag(A_1 .. A_N/2) S_t-1 + B (k'[t] v[t])   by head, k' v an outer product [K, K]
    y   = W_o concat_h( q[t] . (2 Re C S_t + D k'[t] v[t]) )

with q = W_q x, v = W_v x. Both models are linear and fixed, so `forward` convolves with

    shift     h[n] = sum over m of b[m] c[m + n]  (+ d at n = 0),           n < N
    diagonal  h[n] = 2 Re sum over m of C_m B_m A_m^n  (+ D at n = 0)

where A, B are the continuous (a, b) discretised with step dt per head: bilinear,
A = (1 + dt a / 2) / (1 - dt a / 2), B = dt b / (1 - dt a / 2), or by zero-order hold.

Source   Fu et al. 2022, arXiv:2212.14052; S4D, Gu et al. 2022, arXiv:2206.11893;
         HazyResearch/zoology at dbcb60d, zoology/mixers/h3/: S4D-Lin initialisation,
         a = -1/2 + i pi m, b = 1, C complex normal, dt log-uniform.
Differs  Complex numbers are kept as pairs of real ones. Output channels are ordered by head, the
         reference's by value index: a permutation before W_o. Weight decay skips b, a, dt and the
         shift's b, which the reference marks and its trainer ignores. The reference counts D N of
         state; carried are N - 1 inputs of the shift and the outer products. Its model draws linear
         maps with standard deviation 0.02: `init="normal"`. W_o is called `output`, so that a
         model leaves its scale alone, as there. In the published sweep d_state is the sequence
         length and head_dim 2.
State    conv: (N - 1) D. matrix: D K N (real and imaginary parts of N/2 numbers a product).
Cost     O(B T D (D + K log T)) and O(D / K N T) for the filters.
Letters  B batch, T time, D width, H heads (D / K), K head width (head_dim), N d_state,
         M complex states (N / 2).
"""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._channel_major import from_channels, to_channels
from recallzoo.mixers._contract import (
    Cache,
    Context,
    Mixer,
    OptionValue,
    ParameterRule,
    select_positions,
)
from recallzoo.mixers._convolution import (
    causal_conv_channels,
    conv_step,
    in_float32,
    init_linear_maps,
)
from recallzoo.mixers._correlation import correlation
from recallzoo.mixers._diagonal_taps import diagonal_taps
from recallzoo.mixers._select_channels import select_from_channels


class H3(Mixer):
    """Hungry Hungry Hippo (arXiv:2212.14052).

    d_state          N: taps of the shift, real numbers in each diagonal state; even
    head_dim         K: width of the outer products
    dt_min, dt_max   range of the initial steps
    discretization   of the diagonal model: "bilinear" or "zoh", zero-order hold
    init             "torch": as PyTorch draws linear maps; "normal": standard deviation 0.02
    """

    name: ClassVar[str] = "h3"
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"d_state": 2, "head_dim": 2},
        {"d_state": 16, "head_dim": 4, "discretization": "zoh", "init": "normal"},
    )

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        d_state: int = 64,
        head_dim: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        discretization: Literal["bilinear", "zoh"] = "bilinear",
        init: Literal["torch", "normal"] = "torch",
    ) -> None:
        super().__init__(d_model, max_seq_len)
        if d_state < 2 or d_state % 2:
            raise InvalidConfig(
                f"h3.d_state={d_state} must be even and at least 2: it is made of complex pairs."
            )
        if head_dim < 1 or d_model % head_dim:
            raise InvalidConfig(f"h3.head_dim={head_dim} does not divide d_model={d_model}.")
        if not 0.0 < dt_min <= dt_max:
            raise InvalidConfig(
                f"h3.dt_min={dt_min} and h3.dt_max={dt_max} must be positive and in this order."
            )
        if discretization not in ("bilinear", "zoh"):
            raise InvalidConfig(
                f"h3.discretization={discretization!r} must be 'bilinear' or 'zoh'."
            )
        self.head_dim = head_dim
        self.num_heads = d_model // head_dim
        self.discretization = discretization
        H, M = self.num_heads, d_state // 2
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)
        init_linear_maps(self, init, self.name)

        first = F.one_hot(torch.zeros(d_model, dtype=torch.int64), d_state).float()
        bound = d_state**-0.5
        self.shift_b = nn.Parameter(first)
        self.shift_c = nn.Parameter(torch.empty(d_model, d_state).uniform_(-bound, bound))
        self.shift_d = nn.Parameter(torch.randn(d_model))

        low, high = math.log(dt_min), math.log(dt_max)
        self.log_dt = nn.Parameter(low + (high - low) * torch.rand(H))
        self.a_log_decay = nn.Parameter(torch.full((H, M), math.log(0.5)))
        self.a_frequency = nn.Parameter(torch.pi * torch.arange(M).float().repeat(H, 1))
        self.b = nn.Parameter(torch.stack([torch.ones(H, M), torch.zeros(H, M)], dim=-1))
        self.c = nn.Parameter(torch.randn(H, M, 2) * 0.5**0.5)
        self.d = nn.Parameter(torch.randn(H))

    def parameter_rules(self) -> dict[str, ParameterRule]:
        names = ("shift_b", "log_dt", "a_log_decay", "a_frequency", "b")
        return {name: ParameterRule(decay=False) for name in names}

    def _shift_taps(self, seq_len: int) -> Float[Tensor, "D N"]:
        """The shift model's filter, its direct term included."""
        with in_float32(self.shift_b.device):
            taps = correlation(self.shift_b.float(), self.shift_c.float())
            direct = F.pad(self.shift_d.float()[:, None], (0, taps.shape[-1] - 1))
            return (taps + direct)[:, :seq_len]

    def _discretized(
        self,
    ) -> tuple[
        Float[Tensor, "H M"], Float[Tensor, "H M"], Float[Tensor, "H M"], Float[Tensor, "H M"]
    ]:
        """log |A|, arg A and the real and imaginary part of B."""
        dt = torch.exp(self.log_dt.float())[:, None]
        real, imag = -torch.exp(self.a_log_decay.float()), self.a_frequency.float()
        b_real, b_imag = self.b.float().unbind(-1)
        if self.discretization == "bilinear":
            x, y = real * dt / 2, imag * dt / 2
            size = (1 - x) ** 2 + y**2
            log_radius = 0.5 * torch.log1p(4 * x / size)
            angle = torch.atan2(y, 1 + x) + torch.atan2(y, 1 - x)
            gain_real, gain_imag = dt * (1 - x) / size, dt * y / size
        else:
            log_radius, angle = real * dt, imag * dt
            size = real**2 + imag**2
            radius = torch.exp(log_radius)
            up_real, up_imag = radius * torch.cos(angle) - 1, radius * torch.sin(angle)
            gain_real = (up_real * real + up_imag * imag) / size
            gain_imag = (up_imag * real - up_real * imag) / size
        return (
            log_radius,
            angle,
            gain_real * b_real - gain_imag * b_imag,
            gain_real * b_imag + gain_imag * b_real,
        )

    def _diagonal_taps(self, seq_len: int) -> Float[Tensor, "H T"]:
        """The diagonal model's filter, its direct term included."""
        with in_float32(self.log_dt.device):
            log_radius, angle, b_real, b_imag = self._discretized()
            c_real, c_imag = self.c.float().unbind(-1)
            real = 2 * (c_real * b_real - c_imag * b_imag)
            imag = 2 * (c_real * b_imag + c_imag * b_real)
            taps = diagonal_taps(log_radius, angle, real, imag, seq_len)
            return taps + F.pad(self.d.float()[:, None], (0, seq_len - 1))

    def _heads(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S H K"]:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _heads_first(self, x: Float[Tensor, "D B T"]) -> Float[Tensor, "H K B T"]:
        return x.unflatten(0, (self.num_heads, self.head_dim))

    def _projected(
        self, x: Float[Tensor, "B T D"], *maps: nn.Linear
    ) -> tuple[Float[Tensor, "D B T"], ...]:
        """Linear maps as one, whose products are faster. Channels first, each is a part of the
        whole; keys are by themselves, as their convolution would copy a part in a pack."""
        weight = torch.cat([one.weight for one in maps])
        parts = to_channels(weight, x).split(self.d_model)
        return tuple(_plus(part, one.bias) for part, one in zip(parts, maps, strict=True))

    def _recalled(
        self, x: Float[Tensor, "B T D"], v: Float[Tensor, "D B T"]
    ) -> Float[Tensor, "H K K B T"]:
        """What the queries are multiplied with, key index first."""
        seq_len, K = x.shape[-2], self.head_dim
        taps = self._shift_taps(seq_len)
        k = causal_conv_channels(to_channels(self.k_proj.weight, x), taps)
        # A constant's convolution is a running sum of the taps: adding the bias afterwards spares
        # a pass over the keys.
        reached = F.pad(taps, (0, seq_len - taps.shape[-1])).cumsum(-1)
        k = k + (self.k_proj.bias.float()[:, None] * reached)[:, None].to(k.dtype)
        products = self._heads_first(k)[:, :, None] * self._heads_first(v)[:, None]
        y = causal_conv_channels(products.flatten(1, 3), self._diagonal_taps(seq_len))
        return y.unflatten(1, (K, K, -1))

    def _read(
        self, x: Float[Tensor, "*S D"], recalled: Float[Tensor, "*S H K K"]
    ) -> Float[Tensor, "*S D"]:
        y = (self._heads(self.q_proj(x))[..., None] * recalled).sum(-2)
        return self.output(y.flatten(-2))

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        q, v = self._projected(x, self.q_proj, self.v_proj)
        y = (self._heads_first(q)[:, :, None] * self._recalled(x, v)).sum(1)
        out = from_channels(y.flatten(0, 1), self.output.weight)
        return out + self.output.bias.to(out.dtype)

    def forward_at(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "B Q"], context: Context
    ) -> Float[Tensor, "B Q D"]:
        (v,) = self._projected(x, self.v_proj)
        recalled = select_from_channels(self._recalled(x, v).flatten(0, 2), positions)
        K = self.head_dim
        recalled = recalled.unflatten(-1, (self.num_heads, K, K))
        return self._read(select_positions(x, positions), recalled)

    def init_cache(self, batch_size: int) -> Cache:
        num_taps = self.shift_b.shape[1]
        K, H, M = self.head_dim, self.num_heads, num_taps // 2
        return {
            "conv": self.k_proj.weight.new_zeros(batch_size, num_taps - 1, self.d_model),
            "matrix": self.c.new_zeros(batch_size, K, K, H, M, 2, dtype=torch.float32),
        }

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        past, state = cache["conv"], cache["matrix"]
        assert isinstance(past, Tensor)
        assert isinstance(state, Tensor)
        k_t, inputs = conv_step(self.k_proj(x_t), past, self._shift_taps(self.shift_b.shape[1]))
        k, v = self._heads(k_t).transpose(1, 2), self._heads(self.v_proj(x_t)).transpose(1, 2)
        product = (k[:, :, None] * v[:, None]).float()
        log_radius, angle, b_real, b_imag = self._discretized()
        a_real = torch.exp(log_radius) * torch.cos(angle)
        a_imag = torch.exp(log_radius) * torch.sin(angle)
        real, imag = state.unbind(-1)
        u = product[..., None]
        new_real = a_real * real - a_imag * imag + b_real * u
        new_imag = a_real * imag + a_imag * real + b_imag * u
        c_real, c_imag = self.c.float().unbind(-1)
        y = 2 * (c_real * new_real - c_imag * new_imag).sum(-1) + self.d.float() * product
        new_state = torch.stack([new_real, new_imag], dim=-1)
        y_t = self._read(x_t, y.permute(0, 3, 1, 2).to(k_t.dtype))
        return y_t, {"conv": inputs[:, 1:], "matrix": new_state}


def _plus(x: Float[Tensor, "D B T"], bias: Float[Tensor, "D"]) -> Float[Tensor, "D B T"]:
    return x + bias.to(x.dtype)[:, None, None]
