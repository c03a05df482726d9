"""A language model around any mixer or pattern of mixers.

    x = dropout(embed(tokens) (+ learned positions))
    for each layer:  x = x + mixer(norm(x));  x = x + state_mixer(norm(x))
    logits = norm(x) @ head

Only the positions that are asked need the head: `forward` takes them and computes no other.

Source   HazyResearch/zoology at dbcb60d, zoology/model.py: pre-norm blocks, tied head,
         embedding dropout once, residual dropout on each branch.
Differs  Mixers keep their own initialisation; the reference draws every Linear anew with
         standard deviation 0.02. `rescale_out_proj` (on by default, as there) divides the
         projections back into the residual stream by sqrt(2 num_layers).
Letters  B batch, T time, D width, V vocabulary, Q queries, C token streams.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args, get_type_hints

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from recallzoo.errors import ContractViolation, InvalidConfig, UnknownName
from recallzoo.mixers import (
    Cache,
    Context,
    Mixer,
    MixerConfig,
    ParameterRule,
    select_positions,
    state_size,
)
from recallzoo.norms import added_and_normed, is_fused, normed
from recallzoo.options import checked
from recallzoo.state_mixers import StateMixer, build_state_mixer


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything about a model but its vocabulary and longest sequence, which its task sets."""

    mixers: tuple[MixerConfig, ...]
    """Sequence mixers by layer; repeated in this order if shorter than `num_layers`."""
    d_model: int = 64
    """Width, D."""
    num_layers: int = 2
    state_mixer: StateMixer = "none"
    """What follows each mixer: none, identity (x + norm(x)), mlp, tanh_mlp or gated_mlp."""
    mlp_ratio: float = 4.0
    """Hidden width of the state mixer over d_model."""
    position: Literal["none", "learned"] = "none"
    """Whether a learned vector of its position is added to each token."""
    norm: Literal["layer", "rms"] = "layer"
    tie_embeddings: bool = True
    """Whether the head shares the embedding's weights. A task with several token streams has
    embeddings of another width and always has a head of its own."""
    embed_dropout: float = 0.0
    residual_dropout: float = 0.0
    rescale_out_proj: bool = True
    """Divide the initial `out_proj` and `fc2` weights by sqrt(2 num_layers) (GPT-2)."""

    def __post_init__(self) -> None:
        self._check_types()
        if not self.mixers:
            raise InvalidConfig("model.mixers is empty: name at least one sequence mixer.")
        for field, low in (("d_model", 1), ("num_layers", 1)):
            if getattr(self, field) < low:
                raise InvalidConfig(f"model.{field}={getattr(self, field)} must be at least {low}.")
        if len(self.mixers) > self.num_layers:
            raise InvalidConfig(
                f"model.mixers names {len(self.mixers)} mixers for num_layers={self.num_layers}: "
                f"the last {len(self.mixers) - self.num_layers} would be ignored."
            )
        hints = get_type_hints(type(self))
        for field in ("state_mixer", "position", "norm"):
            known = get_args(hints[field])
            if getattr(self, field) not in known:
                raise UnknownName(f"model.{field}", str(getattr(self, field)), known)
        if self.mlp_ratio <= 0 or round(self.d_model * self.mlp_ratio) < 1:
            raise InvalidConfig(
                f"model.mlp_ratio={self.mlp_ratio} leaves the state mixer no hidden units at "
                f"d_model={self.d_model}."
            )
        for field in ("embed_dropout", "residual_dropout"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise InvalidConfig(f"model.{field}={getattr(self, field)} must be in [0, 1).")

    def _check_types(self) -> None:
        """Hold every number to its type, so that equal configurations have one hash."""
        mixers: Any = self.mixers
        if not isinstance(mixers, list | tuple) or not all(
            isinstance(each, MixerConfig) for each in mixers
        ):
            raise InvalidConfig(
                f"model.mixers={mixers!r} must be configured mixers in a tuple, such as "
                f'(mixer("attention"),).'
            )
        object.__setattr__(self, "mixers", tuple(mixers))
        for field, wanted in get_type_hints(type(self)).items():
            if wanted in (int, float, bool):
                value = checked(f"model.{field}", getattr(self, field), wanted)
                object.__setattr__(self, field, value)

    def layer_mixers(self) -> list[MixerConfig]:
        """The mixer of each layer."""
        return [self.mixers[i % len(self.mixers)] for i in range(self.num_layers)]


def place(
    base: MixerConfig | Sequence[MixerConfig],
    special: MixerConfig,
    num_layers: int,
    *,
    layers: Sequence[int] | None = None,
    every: int | None = None,
    at: Sequence[float] | None = None,
) -> tuple[MixerConfig, ...]:
    """The mixers of a hybrid: `special` at some layers, `base`, one mixer or several in turn, at
    the others.

    Which ones is said in one of three ways:

        layers   their numbers, from 0; negative ones count from the last, -1
        every    each so many layers, the last of them: every=4 of 8 layers is layers 3 and 7
        at       their depths from 0.0, the first layer, to 1.0, the last, rounded to layers

    `layers=()` leaves `base` alone. InvalidConfig for none or several of the ways, a layer that
    does not exist or is named twice, or depths that fall on one layer.
    """
    given = [n for n, v in (("layers", layers), ("every", every), ("at", at)) if v is not None]
    if len(given) != 1:
        raise InvalidConfig(
            f"place() was given {' and '.join(given) or 'no position'}; one of layers, every and "
            f"at is wanted."
        )
    if num_layers < 1:
        raise InvalidConfig(f"place(): num_layers={num_layers} must be at least 1.")
    if every is not None:
        if not 1 <= every <= num_layers:
            raise InvalidConfig(
                f"place(): every={every} must be between 1 and num_layers={num_layers}, or no "
                f"layer would be special."
            )
        layers = range(every - 1, num_layers, every)
    elif at is not None:
        if not all(0.0 <= depth <= 1.0 for depth in at):
            raise InvalidConfig(f"place(): at={list(at)} holds a depth outside of [0, 1].")
        layers = [math.floor(depth * (num_layers - 1) + 0.5) for depth in at]
    assert layers is not None
    wrong = [layer for layer in layers if not -num_layers <= layer < num_layers]
    if wrong:
        raise InvalidConfig(f"place(): there is no layer {wrong[0]} of {num_layers}.")
    chosen = [layer % num_layers for layer in layers]
    if len(set(chosen)) < len(chosen):
        raise InvalidConfig(
            f"place(): of {num_layers} layers, {sorted(chosen)} are asked for, one of them more "
            f"than once."
        )
    pattern = (base,) if isinstance(base, MixerConfig) else tuple(base)
    return tuple(
        special if layer in chosen else pattern[layer % len(pattern)] for layer in range(num_layers)
    )


def _norm(config: ModelConfig) -> nn.Module:
    return nn.LayerNorm(config.d_model) if config.norm == "layer" else nn.RMSNorm(config.d_model)


class Embedding(nn.Module):
    """Token vectors, of C streams side by side, plus learned positions if configured."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, max_seq_len: int, num_streams: int
    ) -> None:
        super().__init__()
        if config.d_model % num_streams:
            raise InvalidConfig(
                f"model.d_model={config.d_model} must be a multiple of {num_streams}, the number "
                f"of tokens that the task gives each step."
            )
        self.tokens = nn.Embedding(vocab_size, config.d_model // num_streams)
        self.positions = (
            nn.Embedding(max_seq_len, config.d_model) if config.position == "learned" else None
        )
        for embedding in self.children():
            if isinstance(embedding, nn.Embedding):
                nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Int[Tensor, "B T *C"], start: int = 0) -> Float[Tensor, "B T D"]:
        return self.place(self.tokens(tokens), start)

    def place(self, vectors: Float[Tensor, "B T *C E"], start: int = 0) -> Float[Tensor, "B T D"]:
        """Streams side by side, positions from `start` on added; in the dtype of the vectors."""
        x = vectors.flatten(-2) if vectors.ndim == 4 else vectors
        if self.positions is not None:
            max_seq_len = self.positions.weight.shape[0]
            if start + x.shape[1] > max_seq_len:
                raise InvalidConfig(
                    f"the model has learned positions for {max_seq_len} tokens and was given "
                    f"{start + x.shape[1]}. Build it with a larger max_seq_len."
                )
            x = x + self.positions.weight[start : start + x.shape[1]].to(x.dtype)
        return x


class Block(nn.Module):
    """One layer: mixer and state mixer, each behind a norm and added to the residual."""

    def __init__(self, config: ModelConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.residual_dropout = config.residual_dropout
        self.norm1 = _norm(config)
        self.mixer = mixer
        self.state_mixer = build_state_mixer(config.state_mixer, config.d_model, config.mlp_ratio)
        self.norm2 = _norm(config) if self.state_mixer is not None else None

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        y = self.mixer(_normed(self.norm1, x), context)
        return self.mix_state(self._added(x, y, context), context)

    def forward_at(
        self,
        x: Float[Tensor, "B T D"],
        positions: Int[Tensor, "B Q"],
        context: Context,
        normed: Float[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Outputs at some positions alone: what `forward` gives there, for less work. `normed`
        is the norm of x where the caller has it."""
        normed = _normed(self.norm1, x) if normed is None else normed
        if hasattr(self.mixer, "forward_at"):
            y = _mixer(self).forward_at(normed, positions, context)
        else:
            y = select_positions(self.mixer(normed, context), positions)
        return self.mix_state(self._added(select_positions(x, positions), y, context), context)

    def mix_state(self, x: Float[Tensor, "*S D"], context: Context) -> Float[Tensor, "*S D"]:
        """The half of the block that treats each position alone."""
        if self.state_mixer is None or self.norm2 is None:
            return x
        return self._added(x, self.state_mixer(_normed(self.norm2, x)), context)

    def _added(
        self, x: Float[Tensor, "*S D"], y: Float[Tensor, "*S D"], context: Context
    ) -> Float[Tensor, "*S D"]:
        return x + context.dropout(y, self.residual_dropout).to(x.dtype)


def _normed(norm: nn.Module, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
    # Under autocast a norm returns float32, where the residual stream may be in bfloat16.
    return norm(x).to(x.dtype)


class LanguageModel(nn.Module):
    """Next-token model over `vocab_size` words and up to `max_seq_len` tokens."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocab_size: int,
        max_seq_len: int,
        num_streams: int = 1,
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        self.embedding = Embedding(config, vocab_size, max_seq_len, num_streams)
        self.blocks = nn.ModuleList(
            Block(config, mixer.build(config.d_model, max_seq_len))
            for mixer in config.layer_mixers()
        )
        self.norm = _norm(config)
        tied = config.tie_embeddings and num_streams == 1
        self.head = None if tied else nn.Linear(config.d_model, vocab_size, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)
        if config.rescale_out_proj:
            with torch.no_grad():
                for name, parameter in self.blocks.named_parameters():
                    if name.endswith(("out_proj.weight", "fc2.weight")):
                        parameter.div_(math.sqrt(2 * config.num_layers))

    def hidden(
        self,
        tokens: Int[Tensor, "B T *C"],
        positions: Int[Tensor, "B Q"] | None = None,
        dropout_key: Int[Tensor, ""] | None = None,
        context: Context | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """The normed residual stream that the head reads, at `positions` (all if None).

        A `context` of the caller's own, in place of `dropout_key`, holds the auxiliary losses
        of the mixers afterwards.
        """
        context = context or Context(tokens=tokens, dropout_key=dropout_key)
        return self.mix(self.embedding.tokens(tokens), positions, context)

    def mix(
        self,
        vectors: Float[Tensor, "B T *C E"],
        positions: Int[Tensor, "B Q"] | None,
        context: Context,
    ) -> Float[Tensor, "B Q D"]:
        """`hidden` from the vectors of the tokens: all between the embedding and the head. The
        residual stream is in their dtype."""
        x = context.dropout(self.embedding.place(vectors), self.config.embed_dropout)
        if positions is not None and self._norms_are_fused(x, context):
            return _normed(self.norm, self._mix_fused(x, positions, context))
        *earlier, last = self.blocks
        for block in earlier:
            x = block(x, context)
        assert isinstance(last, Block)
        x = last(x, context) if positions is None else last.forward_at(x, positions, context)
        return _normed(self.norm, x)

    def _norms_are_fused(self, x: Float[Tensor, "B T D"], context: Context) -> bool:
        """Whether what happens between the mixers can be done in one pass."""
        if self.config.state_mixer != "identity":
            return False
        if context.training and self.config.residual_dropout > 0.0:
            return False
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        return is_fused(x, *(norm for b in blocks for norm in (b.norm1, b.norm2) if norm))

    def _mix_fused(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "B Q"], context: Context
    ) -> Float[Tensor, "B Q D"]:
        """All blocks, their norms and additions in one pass from each mixer to the next."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        n = normed(blocks[0].norm1, x)
        for block, following in pairwise(blocks):
            assert block.norm2 is not None
            y = block.mixer(n, context)
            x, n = added_and_normed(x, y, block.norm2, following.norm1)
        return blocks[-1].forward_at(x, positions, context, n)

    def forward(
        self,
        tokens: Int[Tensor, "B T *C"],
        positions: Int[Tensor, "B Q"] | None = None,
        dropout_key: Int[Tensor, ""] | None = None,
    ) -> Float[Tensor, "B Q V"]:
        """Logits at `positions`, [B, Q, V]; at all of them if None."""
        return self.logits(self.hidden(tokens, positions, dropout_key))

    def loss(
        self,
        tokens: Int[Tensor, "B T *C"],
        positions: Int[Tensor, "B Q"],
        answers: Int[Tensor, "B Q"],
        dropout_key: Int[Tensor, ""] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of the answers at `positions`, in nats.

        -log p[a] = logsumexp(x W^T) - x . W[a]: the answer's logit is computed on its own, so
        that the gradient never scatters into a tensor of the logits' size.

        In training the gradient is that of the cross-entropy plus the mixers' auxiliary
        losses, while the value stays the cross-entropy.
        """
        context = Context(tokens=tokens, dropout_key=dropout_key)
        x = self.hidden(tokens, positions, context=context)
        answer_logits = (x.float() * F.embedding(answers, self.head_weight())).sum(-1)
        loss = (torch.logsumexp(self.logits(x).float(), dim=-1) - answer_logits).mean()
        for auxiliary in context.losses.values():
            loss = loss + (auxiliary - auxiliary.detach())
        return loss

    def head_weight(self) -> Float[Tensor, "V D"]:
        """The head's weights, those of the embedding if they are tied."""
        return self.embedding.tokens.weight if self.head is None else self.head.weight

    def logits(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S V"]:
        """The head."""
        return x @ self.head_weight().transpose(-1, -2)

    def init_cache(self, batch_size: int) -> Cache:
        """The decoding state before the first token."""
        layers: Cache = {
            str(i): _mixer(b).init_cache(batch_size) for i, b in enumerate(self.blocks)
        }
        return {"layers": layers, "position": torch.zeros(1, dtype=torch.int64)}

    def step(
        self, token_t: Int[Tensor, "B *C"], cache: Cache
    ) -> tuple[Float[Tensor, "B V"], Cache]:
        """Logits after one more token, and the new cache."""
        position, layers = cache["position"], cache["layers"]
        assert isinstance(position, Tensor)
        assert isinstance(layers, dict)
        x = self.embedding(token_t[:, None], int(position))[:, 0]
        context, new_layers = Context(tokens=token_t), dict(layers)
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            layer_cache = layers[str(i)]
            assert isinstance(layer_cache, dict)
            y, new_layers[str(i)] = _mixer(block).step(block.norm1(x), layer_cache, context)
            x = block.mix_state(x + y, context)
        return self.logits(self.norm(x)), {"layers": new_layers, "position": position + 1}

    def parameter_rules(self) -> dict[str, ParameterRule]:
        """The optimiser's rule for every parameter, by name.

        Weight decay applies to everything with two or more axes but position vectors, unless
        a mixer says otherwise.
        """
        rules = {
            name: ParameterRule(decay=parameter.ndim >= 2 and name != "embedding.positions.weight")
            for name, parameter in self.named_parameters()
        }
        for i, block in enumerate(self.blocks):
            own = getattr(block.mixer, "parameter_rules", dict)()
            for name, rule in own.items():
                full_name = f"blocks.{i}.mixer.{name}"
                if full_name not in rules:
                    raise ContractViolation(
                        f"{type(block.mixer).__name__}.parameter_rules names {name!r}, which is "
                        f"none of its parameters."
                    )
                rules[full_name] = rule
        return rules

    def num_parameters(self) -> int:
        """Elements of all parameters, shared ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def state_size(self, seq_len: int) -> dict[str, int]:
        """Elements carried while decoding after `seq_len` tokens, over all layers, by kind."""
        total: dict[str, int] = {}
        for block in self.blocks:
            for kind, size in state_size(_mixer(block), seq_len).items():
                total[kind] = total.get(kind, 0) + size
        return total


def _mixer(block: nn.Module) -> Mixer:
    """The block's mixer; anything with `step` and `init_cache` serves as one."""
    return block.mixer  # pyright: ignore[reportReturnType]
