"""Selective attention: softmax attention at some positions, nothing at the others.

    y[i] = W_o (softmax over j <= i of (q[i] . k[j] / sqrt(K)) v) f[i]

f[i] is 0 where row i is not selected. Keys are not restricted: a selected row sees its whole
prefix. The selectors:

    all        f = 1: attention
    none       f = 0
    random     f = 1 with probability `rate`, drawn from tokens so far, position and seed
    sliding    f = 1, and keys restricted to the `window` latest tokens instead
    repeated   f = 1 where the token occurred earlier, x[j] = x[i] for some j < i
    learned    f = sigmoid(u[i] . W) where u[i] . W exceeds a threshold, causal (below)

learned   The threshold is a trained number which a controller keeps at `num_rows` rows in
max_seq_len tokens: its gradient is the wanted share minus the share of rows above it. No
sequence gets more than burst * num_rows rows, the earliest first, which bounds its cost;
`selection(x, context).num_wanted` counts what was above the threshold. While training, logistic
noise times `noise` is added before the threshold, and max(0, sum_i f[i] - k) / T, averaged over
sequences and times `auxiliary_weight`, to the loss.

Source   Arora et al. 2023, arXiv:2312.04927, section 5, equations 2 and 3 and the auxiliary loss
         there; the controller acts like the bias of arXiv:2408.15664, through the optimiser.
Differs  The paper's learned selector takes the top k of the whole sequence, which looks ahead:
         see `selective_attention_topk`. Random rows are a function of the sequence, so that
         evaluation repeats itself. In a sequence shorter than max_seq_len the learned budget is
         the same share.
State    kv: keys and values of every token, 2 D T (sliding: of the window); index: the tokens,
         T (repeated), a hash and a position (random), a count (learned).
Cost     O(B R T D) for R selected rows on long sequences; O(B T window D) for sliding.
Letters  B batch, T time, D width, K key width, R selected rows.
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from recallzoo.errors import InvalidConfig
from recallzoo.mixers._contract import Cache, Context, OptionValue
from recallzoo.mixers._selective import RowAttention
from recallzoo.mixers._selectors import Random, Repeated, Selector, Threshold

SelectorName = Literal["all", "none", "random", "sliding", "repeated", "learned"]

_OPTIONS_OF: dict[str, dict[str, int | float]] = {
    "all": {},
    "none": {},
    "random": {"rate": 0.1, "seed": 0},
    "sliding": {"window": 64},
    "repeated": {},
    "learned": {"num_rows": 256, "burst": 2.0, "noise": 0.5, "auxiliary_weight": 0.1},
}
"""The options that each selector has, and their defaults."""


class SelectiveAttention(RowAttention):
    """Attention at the rows that a selector names (arXiv:2312.04927, equations 2 and 3).

    selector           all, none, random, sliding, repeated or learned
    rate, seed         random: probability of a row; which rows
    window             sliding: tokens that a row sees
    num_rows           learned: rows in max_seq_len tokens, k
    burst              learned: rows that a single sequence may have, over num_rows
    noise              learned: size of the noise before the threshold while training
    auxiliary_weight   learned: weight of the auxiliary loss
    """

    name: ClassVar[str] = "selective_attention"
    needs_tokens: ClassVar[bool] = True
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = (
        {"selector": "all", "num_heads": 2, "positions": "rotary"},
        {"selector": "none"},
        {"selector": "random", "rate": 0.3, "num_heads": 2},
        {"selector": "sliding", "window": 40},
        {"selector": "sliding", "window": 4, "positions": "rotary"},
        {"selector": "repeated", "num_heads": 2, "positions": "rotary", "dropout": 0.3},
        {"selector": "learned", "num_rows": 4, "burst": 1.5},
        {"selector": "learned", "num_rows": 100, "positions": "rotary", "noise": 0.0},
    )

    def __init__(
        self,
        d_model: int,
        max_seq_len: int,
        *,
        selector: SelectorName = "repeated",
        rate: float | None = None,
        seed: int | None = None,
        window: int | None = None,
        num_rows: int | None = None,
        burst: float | None = None,
        noise: float | None = None,
        auxiliary_weight: float | None = None,
        num_heads: int = 1,
        positions: Literal["none", "rotary"] = "none",
        rotary_fraction: float = 1.0,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            d_model,
            max_seq_len,
            num_heads=num_heads,
            positions=positions,
            rotary_fraction=rotary_fraction,
            bias=bias,
            dropout=dropout,
        )
        given = {
            "rate": rate,
            "seed": seed,
            "window": window,
            "num_rows": num_rows,
            "burst": burst,
            "noise": noise,
            "auxiliary_weight": auxiliary_weight,
        }
        self.selector_name = selector
        self.selector = self._selector(selector, _settings(selector, given))
        needs_tokens = self.selector is not None and self.selector.needs_tokens
        self.needs_tokens = needs_tokens  # pyright: ignore[reportAttributeAccessIssue]

    def _selector(self, name: str, settings: dict[str, int | float]) -> Selector | None:
        if name == "random":
            rate, seed = settings["rate"], settings["seed"]
            if not 0.0 <= rate <= 1.0:
                raise InvalidConfig(f"{self.name}.rate={rate} must be in [0, 1].")
            return Random(rate, int(seed))
        if name == "sliding":
            if settings["window"] < 1:
                raise InvalidConfig(
                    f"{self.name}.window={settings['window']} must be at least 1: a token sees "
                    f"itself."
                )
            self.window = int(settings["window"])
        if name == "learned":
            require_gate(self.name, settings)
            if settings["burst"] < 1.0:
                raise InvalidConfig(
                    f"{self.name}.burst={settings['burst']} must be at least 1: a sequence may "
                    f"have the rows of the budget."
                )
            return Threshold(
                self.d_model,
                self.max_seq_len,
                int(settings["num_rows"]),
                settings["noise"],
                settings["auxiliary_weight"],
                settings["burst"],
            )
        return Repeated() if name == "repeated" else None

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        return 0.0 * x if self.selector_name == "none" else super().forward(x, context)

    def forward_at(
        self, x: Float[Tensor, "B T D"], positions: Tensor, context: Context
    ) -> Float[Tensor, "B Q D"]:
        y = super().forward_at(x, positions, context)
        return 0.0 * y if self.selector_name == "none" else y

    def init_cache(self, batch_size: int) -> Cache:
        cache = super().init_cache(batch_size)
        if self.selector is not None:
            cache["selector"] = self.selector.init_cache(batch_size, self.qkv.weight.device)
        return cache

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        y_t, new = super().step(x_t, cache, context)
        if self.selector_name == "none":
            return 0.0 * y_t, new
        if self.selector is None:
            return y_t, new
        past = cache["selector"]
        assert isinstance(past, dict)
        is_selected, weight, new["selector"] = self.selector.step(x_t, past, context)
        if weight is not None:
            y_t = y_t * weight.to(y_t.dtype)[:, None]
        return torch.where(is_selected[:, None], y_t, 0.0), new


def _settings(selector: str, given: dict[str, int | float | None]) -> dict[str, int | float]:
    """The options of a selector, defaults filled in. InvalidConfig for an unknown selector or an
    option that it would ignore."""
    if selector not in _OPTIONS_OF:
        raise InvalidConfig(
            f"selective_attention.selector={selector!r} must be one of {', '.join(_OPTIONS_OF)}."
        )
    known = _OPTIONS_OF[selector]
    for option, value in given.items():
        if value is not None and option not in known:
            owner = next(name for name, options in _OPTIONS_OF.items() if option in options)
            raise InvalidConfig(
                f"selective_attention.{option}={value} would be ignored with "
                f"selector={selector!r}. Leave it out, or set selector={owner!r}."
            )
    chosen = {option: given[option] for option in known}
    return {o: known[o] if value is None else value for o, value in chosen.items()}


def require_gate(name: str, settings: dict[str, int | float]) -> None:
    """InvalidConfig unless a learned selector's options are in range."""
    if settings["num_rows"] < 1:
        raise InvalidConfig(
            f"{name}.num_rows={settings['num_rows']} must be at least 1; for no row at all use "
            f"selective_attention with selector='none'."
        )
    for option in ("noise", "auxiliary_weight"):
        if settings[option] < 0.0:
            raise InvalidConfig(f"{name}.{option}={settings[option]} must be at least 0.")
