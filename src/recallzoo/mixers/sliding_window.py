"""Causal softmax attention over the latest tokens only.

    y[t] = W_o concat_h( sum over t - window < s <= t of softmax_s(q[t] . k[s] / sqrt(K)) v[s] )

A query sees itself and the window - 1 tokens before it.

Source   Beltagy et al. 2020, arXiv:2004.05150, section 3.1, in its causal form; Mistral 7B,
         arXiv:2310.06825, counts the window the same way.
Differs  One head by default, as in `attention`.
State    kv: keys and values of the latest tokens, 2 D min(T, window) elements.
Cost     O(B T window D), in blocks; no T by T scores once T > 2 max(window, 64).
"""

from typing import ClassVar, Literal

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._contract import OptionValue
from recallzoo.mixers.attention import Attention


class SlidingWindow(Attention):
    """Attention of each token to itself and the window - 1 before it (arXiv:2004.05150)."""

    name: ClassVar[str] = "sliding_window"
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"window": 1},
        {"window": 4, "num_heads": 2},
        {"window": 5, "positions": "rotary", "dropout": 0.3},
    )

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        window: int = 64,
        num_heads: int = 1,
        positions: Literal["none", "rotary"] = "none",
        rotary_fraction: float = 1.0,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        if window < 1:
            raise InvalidConfig(
                f"{self.name}.window={window} must be at least 1: a token sees itself."
            )
        super().__init__(
            d_model,
            max_seq_len,
            num_heads=num_heads,
            positions=positions,
            rotary_fraction=rotary_fraction,
            bias=bias,
            dropout=dropout,
        )
        self.window = window
