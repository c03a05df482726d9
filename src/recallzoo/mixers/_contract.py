"""What a sequence mixer is.

A mixer maps [B, T, D] to [B, T, D], each position from itself and earlier ones. It has two
forms of one function:

    step(x_t, cache, context) -> y_t, cache     the definition: one token at a time
    forward(x, context) -> y                    the parallel form, equal to scanning `step`

It owns its initialisation and knows nothing of packing, sweeps or losses. Its options are
the keyword-only arguments of `__init__`, each annotated, each with a default. Its state size
is the number of elements that `step` carries in its cache, counted, never declared.

Letters   B batch, T time, D width (d_model), H heads, K key width or filter taps.
"""

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recallzoo.errors import InvalidConfig
from recallzoo.options import OptionValue
from recallzoo.random import dropout, dropout_words, mix64, uniform

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether kernels of our own can be compiled for CUDA."""

# Checkers of types at run time cannot follow an alias into itself.
if TYPE_CHECKING:
    Cache = dict[str, "Tensor | Cache"]
else:
    Cache = dict
"""What `step` carries. Leaves are tensors with the batch first; a leaf's key names the kind of
state it is: `kv` (keys and values of past tokens), `conv` (past inputs a filter reaches back
to), `matrix` (a recurrent state of fixed size) or `index` (whole numbers). Nested
dictionaries keep the caches of parts apart."""


@dataclass
class Context:
    """What a mixer may know beside its input.

    tokens        the token ids, [B, T] in `forward`, [B] in `step`; None on continuous input
    dropout_key   a random 64-bit number for this step of this run; None outside of training
    losses        what mixers have added to the loss of this step, by name; empty outside of
                  training
    """

    tokens: Int[Tensor, "B *T"] | None = None
    dropout_key: Int[Tensor, ""] | None = None
    losses: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    _sites: int = field(default=0, repr=False)

    def copy(self) -> "Context":
        """As it is now: what is computed with the copy draws the numbers that would come next
        here, and adds its losses to the copy."""
        return Context(self.tokens, self.dropout_key, dict(self.losses), self._sites)

    def is_as(self, before: "Context") -> bool:
        """Whether nothing was drawn and no loss added since `before` was copied."""
        losses = zip(self.losses.values(), before.losses.values(), strict=False)
        is_same = len(self.losses) == len(before.losses) and all(a is b for a, b in losses)
        return is_same and self._sites == before._sites

    @property
    def training(self) -> bool:
        """Whether this is a step of training."""
        return self.dropout_key is not None

    def dropout(self, x: Float[Tensor, "*S"], rate: float) -> Float[Tensor, "*S"]:
        """Dropout while training, nothing otherwise. Every call has masks of its own, which
        depend on the run's seed and step alone and not on what it trains beside."""
        if self.dropout_key is None or rate == 0.0:
            return x
        self._sites += 1
        return dropout(x, rate, mix64(self.dropout_key), self._sites)

    def dropout_words(self) -> tuple[Int[Tensor, ""], Int[Tensor, ""]] | None:
        """What a kernel that drops as `dropout` would draws its masks from: `random.dropout_words`
        of one more call. None outside of training."""
        if self.dropout_key is None:
            return None
        self._sites += 1
        return dropout_words(mix64(self.dropout_key), self._sites)

    def uniform(self, x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Random numbers in (0, 1) in the shape of `x`, drawn as dropout's masks are; 0.5
        everywhere outside of training."""
        if self.dropout_key is None:
            return torch.full_like(x, 0.5, dtype=torch.float32)
        self._sites += 1
        return uniform(x, mix64(self.dropout_key), self._sites)

    def add_loss(self, name: str, value: Float[Tensor, ""]) -> None:
        """Add an auxiliary term to the loss of this training step; terms of one name are summed.

        The trainer minimises cross-entropy plus all of them, each mixer having weighed its
        own, and reports the cross-entropy alone. Nothing happens outside of training.
        """
        if self.training:
            self.losses[name] = self.losses[name] + value if name in self.losses else value

    def token_ids(self, who: str, num_axes: int) -> Int[Tensor, "B *T"]:
        """The token ids, with as many axes as asked. InvalidConfig, naming the mixer `who`,
        where there are none (continuous input) or each step has several (stacked streams)."""
        if self.tokens is not None and self.tokens.ndim == num_axes:
            return self.tokens
        given = "none (continuous input)" if self.tokens is None else "several to a step (streams)"
        raise InvalidConfig(
            f"{who} reads one token id at each step and was given {given}. Use it on a task with "
            f"one stream of tokens, or a mixer that reads hidden states instead."
        )


@dataclass(frozen=True)
class ParameterRule:
    """How the optimiser treats one parameter.

    decay           whether weight decay applies
    learning_rate   a fixed peak learning rate in place of the run's, where the mixer's paper
                    prescribes one; None follows the run
    """

    decay: bool = True
    learning_rate: float | None = None


class Mixer(nn.Module):
    """Base class of the sequence mixers."""

    name: ClassVar[str]
    causal: ClassVar[bool] = True
    """False for a mixer whose own definition looks ahead; it is then refused wherever that
    would make a number false."""
    needs_tokens: ClassVar[bool] = False
    """True for a mixer that reads `context.tokens`."""
    contract_options: ClassVar[tuple[dict[str, OptionValue], ...]] = ()
    """Settings, beside the defaults, under which the contract suite checks the mixer at width
    16. Name those that take another path through its code."""

    def __init__(self, d_model: int, max_seq_len: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.max_seq_len = max_seq_len

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        """All positions at once."""
        raise NotImplementedError(f"{type(self).__name__} lacks forward")

    def forward_at(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "B Q"], context: Context
    ) -> Float[Tensor, "B Q D"]:
        """Outputs at some positions alone, [B, Q, D]. A mixer that can leave work out for the
        others overrides this; the outputs must be those of `forward`."""
        return select_positions(self(x, context), positions)

    def init_cache(self, batch_size: int) -> Cache:
        """The cache before the first token, on the device of the parameters."""
        raise NotImplementedError(f"{type(self).__name__} lacks init_cache")

    def step(
        self, x_t: Float[Tensor, "B D"], cache: Cache, context: Context
    ) -> tuple[Float[Tensor, "B D"], Cache]:
        """One token. Returns the output and the new cache; the given one is not changed."""
        raise NotImplementedError(f"{type(self).__name__} lacks step")

    def parameter_rules(self) -> dict[str, ParameterRule]:
        """Rules by parameter name, for those that differ from the default: weight decay on
        everything with two or more axes, the run's learning rate."""
        return {}

    def scan(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        """`step` over all positions: what `forward` must equal."""
        cache = self.init_cache(x.shape[0])
        outputs = []
        for t in range(x.shape[1]):
            tokens = None if context.tokens is None else context.tokens[:, t]
            y_t, cache = self.step(x[:, t], cache, Context(tokens=tokens))
            outputs.append(y_t)
        return torch.stack(outputs, dim=1)

    @property
    def has_step(self) -> bool:
        """Whether the recurrent form is given. Without it the state size is unknown."""
        cls = type(self)
        return cls.step is not Mixer.step and cls.init_cache is not Mixer.init_cache


def select_positions(
    x: Float[Tensor, "B T D"], positions: Int[Tensor, "B Q"]
) -> Float[Tensor, "B Q D"]:
    """Row b of the result holds x[b, positions[b]]."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        # A product with one 1 a row is exact, and its gradient is a product as well, where that
        # of `gather` fills a tensor with zeros and adds to it atomically.
        chosen = positions[:, :, None] == torch.arange(x.shape[1], device=x.device)
        return chosen.to(x.dtype) @ x
    return torch.gather(x, 1, positions[:, :, None].expand(-1, -1, x.shape[-1]))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product of `x` is taken here: autocast's, or its own."""
    kind = x.device.type
    # The meta device has no autocast, and asking whether a device has it cuts compiled programs.
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def cache_parts(cache: Cache) -> dict[str, int]:
    """Elements in a cache by kind of state (`kv`, `conv`, `matrix`, `index`)."""
    parts: dict[str, int] = {}
    for key, value in cache.items():
        inner = cache_parts(value) if isinstance(value, dict) else {key: value.numel()}
        for kind, size in inner.items():
            parts[kind] = parts.get(kind, 0) + size
    return parts


@torch.no_grad()
def state_size(mixer: Mixer, seq_len: int) -> dict[str, int]:
    """Elements that `step` carries for one sequence after `seq_len` tokens, by kind."""
    parameter = next(mixer.parameters(), torch.empty(0))
    x_t = torch.zeros(1, mixer.d_model, dtype=parameter.dtype, device=parameter.device)
    tokens = torch.zeros(1, dtype=torch.int64, device=parameter.device)
    cache = mixer.init_cache(1)
    for _ in range(seq_len):
        _, cache = mixer.step(x_t, cache, Context(tokens=tokens))
    return cache_parts(cache)
