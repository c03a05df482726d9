"""State mixers: what acts on each position alone, after the sequence mixer."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from recallzoo.errors import UnknownName

StateMixer = Literal["none", "identity", "mlp", "tanh_mlp", "gated_mlp"]
"""`none` leaves the block without its second half. `identity` keeps it, x + norm(x), as the
reference's Figure 2 has it: its block adds the norm of the residual stream where it is given
torch.nn.Identity. `tanh_mlp` is what stood there in October 2023."""


class MLP(nn.Module):
    """y = W2 f(W1 x + b1) + b2, where f is gelu, or tanh."""

    def __init__(self, d_model: int, d_hidden: int, activation: Literal["gelu", "tanh"]) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(d_model, d_hidden)
        self.fc2 = nn.Linear(d_hidden, d_model)
        _initialise(self)

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        hidden = self.fc1(x)
        is_tanh = self.activation == "tanh"
        return self.fc2(torch.tanh(hidden) if is_tanh else F.gelu(hidden, approximate="tanh"))


class GatedMLP(nn.Module):
    """y = W2 (silu(W1 x) * W3 x), without biases (SwiGLU; Shazeer 2020, arXiv:2002.05202)"""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, 2 * d_hidden, bias=False)
        self.fc2 = nn.Linear(d_hidden, d_model, bias=False)
        _initialise(self)

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


def _initialise(module: nn.Module) -> None:
    for linear in module.children():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


def build_state_mixer(kind: str, d_model: int, mlp_ratio: float) -> nn.Module | None:
    """The state mixer of one block, or None. Raises UnknownName."""
    d_hidden = round(d_model * mlp_ratio)
    match kind:
        case "none":
            return None
        case "identity":
            return nn.Identity()
        case "mlp":
            return MLP(d_model, d_hidden, "gelu")
        case "tanh_mlp":
            return MLP(d_model, d_hidden, "tanh")
        case "gated_mlp":
            return GatedMLP(d_model, d_hidden)
    raise UnknownName("state mixer", kind, get_args(StateMixer))
