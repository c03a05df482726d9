"""The named language models: those of the paper's Table 1, 2 and 5, and room for ours.

    recallzoo list models
    recallzoo pretrain attention-125m --data DATA --out runs/attention-125m

A name is a mixer and the paper's scale (70m, 125m, 360m, 1.4b), or 30m, which is ours: attention
small enough to ask whether it recalls more than larger models without it. Sizes count GPT-2's
vocabulary; a run takes its vocabulary from its data, so that the same preset is smaller on a
smaller one.
Hybrids, base_conv_SPECIAL, have an input-dependent mixer in place of BaseConv's at 6 to 9 % of
layers: 1 of 12, 2 of 24 or 3 of 48, evenly spaced.

Sources  Parameter counts: Arora et al. 2023, arXiv:2312.04927, Tables 1, 2 and 5. Their widths
         were not available to us; each preset says whose it follows and where it is ours:
         Based is HazyResearch/based at 32c1bd4 (train/configs/experiment/reference), safari is
         HazyResearch/safari (configs/experiment/pile), both of the paper's authors. Where only
         the depth is ours, it is the one that meets the count. The paper prints no exact count
         at 70M: those are 6 to 9 layers of about 704. Linear maps start with standard deviation
         0.02, as in both, Hyena's filter networks included, which learn at the model's rate.
         Optimisation: Based's reference (AdamW, peak 8e-4, cosine to a tenth, 1 % warm-up, weight
         decay 0.1, betas 0.9 and 0.95, clip 1.0, 256 contexts of 2,048 tokens a step).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recallzoo.errors import InvalidConfig, UnknownName
from recallzoo.mixers import MixerConfig, mixer
from recallzoo.model import LanguageModel, ModelConfig, place

GPT2_VOCAB_SIZE = 50_257
HYENA = mixer(
    "hyena",
    num_features=33,
    filter_width=64,
    sine_frequency=14.0,
    filter_learning_rate=None,
    position_learning_rate=None,
    init="normal",
)
BASE_CONV = (
    mixer("base_conv", kernel_size=3, filter_skip=True, init="normal"),
    mixer("base_conv", kernel_size=-1, filter_skip=True, init="normal"),
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model by name, with what the paper trained it on."""

    name: str
    model: ModelConfig
    widths: str
    """Whose depth and width these are."""
    paper_parameters: int | None = None
    """Parameters that the paper prints, in millions; None where it prints none."""
    tokens: int = 10_000_000_000
    """Training tokens in the paper."""
    context: int = 2_048
    """Tokens a context."""
    learning_rate: float = 8e-4
    global_batch: int = 256
    """Contexts a step."""
    base: tuple[MixerConfig, ...] = ()
    """Of a hybrid, the mixers of the layers that are not special, repeated in this order."""
    special_layers: tuple[int, ...] = ()
    """Of a hybrid, the layers that carry the special mixer."""

    def __post_init__(self) -> None:
        printed = f"{self.paper_parameters}M in the paper; " if self.paper_parameters else ""
        summary = f"{self.model.num_layers} x {self.model.d_model}, {printed}widths: {self.widths}."
        object.__setattr__(self, "__doc__", summary)

    def build(self, vocab_size: int = GPT2_VOCAB_SIZE, context: int | None = None) -> LanguageModel:
        """The model, freshly initialised."""
        return LanguageModel(self.model, vocab_size=vocab_size, max_seq_len=context or self.context)

    def resized(
        self,
        d_model: int | None = None,
        num_layers: int | None = None,
        context: int | None = None,
    ) -> "Preset":
        """The preset at another width, depth or context. Heads keep their width where that divides
        d_model; a pattern of layers is cut, or repeated as it was; a hybrid's special layers keep
        their depth, and a selection its share of the context. A mixer of a user's own keeps its
        options. InvalidConfig if it cannot."""
        model = self.model
        layers = num_layers or model.num_layers
        mixers, special = model.mixers, self.special_layers
        if special and layers != model.num_layers:
            one = mixers[special[0]]
            special = _same_depths(special, model.num_layers, layers)
            mixers = place(self.base, one, layers, layers=special)
        mixers = mixers[:layers]
        if num_layers is not None and any("layer_index" in dict(m.options) for m in mixers):
            mixers = _rwkv_layers(num_layers)
        base = self.base
        if d_model is not None:
            mixers, base = (
                tuple(_with_width(one, model.d_model, d_model) for one in some)
                for some in (mixers, base)
            )
        if context is not None:
            mixers = tuple(_with_context(one, self.context, context) for one in mixers)
        model = replace(model, mixers=mixers, d_model=d_model or model.d_model, num_layers=layers)
        return replace(
            self,
            model=model,
            base=base,
            special_layers=special,
            context=context or self.context,
            paper_parameters=None,
        )

    def with_mixer(self, config: MixerConfig) -> "Preset":
        """The preset with another mixer: in a hybrid's special layers, in any other's all layers.
        InvalidConfig for RWKV, whose layers are time and channel mixing in turn."""
        if any("layer_index" in dict(m.options) for m in self.model.mixers):
            raise InvalidConfig(
                f"{self.name} has time mixing and channel mixing in turn, so that a mixer has no "
                f"place of its own there. Choose another model, attention-70m for example."
            )
        if not getattr(config.find_class(), "causal", True):
            raise InvalidConfig(
                f"{config.name} says of itself that it is not causal: a language model that sees "
                f"what comes next has a loss that means nothing."
            )
        mixers = (config,)
        if self.special_layers:
            layers = self.model.num_layers
            mixers = place(self.base, config, layers, layers=self.special_layers)
        return replace(
            self,
            name=f"{self.name} with {config}",
            model=replace(self.model, mixers=mixers),
            paper_parameters=None,
        )


def _with_context(config: MixerConfig, before: int, context: int) -> MixerConfig:
    options: dict[str, Any] = dict(config.options)
    if options.get("num_rows") is None or config.source_sha256 is not None:
        return config
    options["num_rows"] = max(1, round(options["num_rows"] * context / before))
    return mixer(config.name, **options)


def _with_width(config: MixerConfig, before: int, d_model: int) -> MixerConfig:
    options: dict[str, Any] = dict(config.options)
    if "num_heads" not in options or config.source_sha256 is not None:
        return config
    head_dim = before // options["num_heads"]
    if d_model % head_dim:
        raise InvalidConfig(
            f"d_model={d_model} is no multiple of {head_dim}, the preset's head width. Choose "
            f"{max(1, round(d_model / head_dim)) * head_dim}, for example."
        )
    return mixer(config.name, **{**options, "num_heads": d_model // head_dim})


def _up_to_multiple(value: float, of: int) -> int:
    return -(-int(value) // of) * of


def _attention(num_heads: int) -> MixerConfig:
    return mixer(
        "attention", num_heads=num_heads, positions="rotary", rotary_fraction=0.5, bias=False
    )


def _llama(num_layers: int, d_model: int, num_heads: int, *, tied: bool = True) -> ModelConfig:
    """Rotary, SwiGLU, RMSNorm, no biases; the hidden width is 8/3 D, up to a multiple of 128."""
    return ModelConfig(
        mixers=(_attention(num_heads),),
        d_model=d_model,
        num_layers=num_layers,
        state_mixer="gated_mlp",
        mlp_ratio=_up_to_multiple(8 * d_model / 3, 128) / d_model,
        norm="rms",
        tie_embeddings=tied,
    )


def _with_mlp(
    mixers: Sequence[MixerConfig],
    num_layers: int,
    d_model: int,
    mlp_ratio: float = 4.0,
    *,
    tied: bool = True,
) -> ModelConfig:
    return ModelConfig(
        mixers=tuple(mixers),
        d_model=d_model,
        num_layers=num_layers,
        state_mixer="mlp",
        mlp_ratio=mlp_ratio,
        tie_embeddings=tied,
    )


def _long_conv(num_layers: int, d_model: int) -> ModelConfig:
    return _with_mlp([mixer("long_conv", init="decay")], num_layers, d_model)


def _h3(num_layers: int, d_model: int) -> ModelConfig:
    return _with_mlp([mixer("h3", d_state=64, init="normal")], num_layers, d_model)


def _hyena(num_layers: int, d_model: int, *, tied: bool = True) -> ModelConfig:
    return _with_mlp([HYENA], num_layers, d_model, 2.0, tied=tied)


def _rwkv_layers(num_mixers: int) -> tuple[MixerConfig, ...]:
    """Time and channel mixing in turn."""
    num_layers = -(-num_mixers // 2)
    return tuple(
        mixer(name, layer_index=i, num_layers=num_layers)
        for i in range(num_layers)
        for name in ("rwkv4", "rwkv4_channel")
    )[:num_mixers]


def _rwkv(num_layers: int, d_model: int) -> ModelConfig:
    mixers = _rwkv_layers(2 * num_layers)
    return ModelConfig(mixers=mixers, num_layers=len(mixers), d_model=d_model)


def _base_conv(num_layers: int, d_model: int) -> ModelConfig:
    """48 layers is the paper's depth at 360M; an MLP of 2.5 D then meets its count."""
    return _with_mlp(BASE_CONV, num_layers, d_model, 2.5)


def _rows(selector: str, **options: Any) -> Callable[[int], MixerConfig]:
    """Selective attention with the heads, positions and biases of the attention presets."""
    name = "selective_attention_topk" if selector == "topk" else "selective_attention"
    given = options if selector == "topk" else {"selector": selector, **options}
    return lambda num_heads: mixer(name, **given, **dict(_attention(num_heads).options))


SPECIAL: dict[str, Callable[[int], MixerConfig]] = {
    "attention": _attention,
    "random": _rows("random", rate=0.125),
    "sliding": _rows("sliding", window=128),
    "repeated": _rows("repeated"),
    "topk": _rows("topk", num_rows=256),
    "learned": _rows("learned", num_rows=256),
    "lookup": lambda num_heads: mixer("lookup_attention", num_heads=num_heads, bias=False),
    "hash": lambda num_heads: mixer(
        "lookup_attention", num_heads=num_heads, bias=False, match="hash", hash_bits=12
    ),
    "shift": lambda _: mixer("shift_conv"),
}
"""The special mixer of each hybrid, a function of the number of heads. The paper selects 256 of
2,048 rows by learning; `random` selects as many. `topk` is the paper's form, which looks ahead."""


def _same_depths(layers: Sequence[int], before: int, num_layers: int) -> tuple[int, ...]:
    """Layers as deep in a model of another depth. Not the first: a special layer looks up what a
    convolution before it put together."""
    depths = (round((layer + 1) * num_layers / before) - 1 for layer in layers)
    return tuple(sorted({min(num_layers - 1, max(1, layer)) for layer in depths}))


def _hybrid(special: str, size: str) -> Preset:
    """A preset of BaseConv with special layers, evenly spaced."""
    num_special, num_layers, d_model = {"70m": (1, 12, 704), "125m": (2, 24, 768),
                                        "360m": (3, 48, 1024)}[size]  # fmt: skip
    layers = tuple((i + 1) * num_layers // (num_special + 1) - 1 for i in range(num_special))
    config = SPECIAL[special](d_model // 64)
    mixers = place(BASE_CONV, config, num_layers, layers=layers)
    return Preset(
        name=f"base_conv_{special}-{size}",
        model=replace(_base_conv(num_layers, d_model), mixers=mixers),
        widths=f"base_conv-{size}'s; {config.name} at layer{'s' * (num_special > 1)} "
        f"{', '.join(map(str, layers))}",
        base=BASE_CONV,
        special_layers=layers,
    )


_SAFARI_360M = "twice safari's 355M depth at half its MLP, as safari does at 125M"
_B50 = 50_000_000_000
_ALL = [
    Preset(name="attention-30m", model=_llama(6, 384, 6), widths="ours"),
    Preset(name="attention-70m", model=_llama(6, 704, 11), widths="ours"),
    Preset(name="attention-125m", model=_llama(12, 768, 12), widths="GPT-2 small's",
           paper_parameters=125),
    Preset(name="attention-360m", model=_llama(24, 1024, 16), widths="Based's attn-360m",
           paper_parameters=360),
    Preset(name="attention-1.4b", model=_llama(24, 2048, 16, tied=False), tokens=_B50,
           widths="GPT-NeoX's 1-4B (Based's attn-1b has 36 x 1680, which is 1.30B)",
           paper_parameters=1_400),
    Preset(name="long_conv-70m", model=_long_conv(6, 704), widths="ours"),
    Preset(name="long_conv-125m", model=_long_conv(14, 768), widths="depth ours",
           paper_parameters=128),
    Preset(name="long_conv-360m", model=_long_conv(29, 1024), widths="depth ours",
           paper_parameters=360),
    Preset(name="h3-70m", model=_h3(6, 704), widths="ours"),
    Preset(name="h3-125m", model=_h3(18, 768), widths="safari's h3, depth ours",
           paper_parameters=168),
    Preset(name="h3-360m", model=_h3(24, 1024), widths="safari's h3-355m",
           paper_parameters=357),
    Preset(name="hyena-70m", model=_hyena(9, 704), widths="ours"),
    Preset(name="hyena-125m", model=_hyena(18, 864), widths="safari's hyena",
           paper_parameters=158),
    Preset(name="hyena-360m", model=_hyena(36, 1024), widths=_SAFARI_360M,
           paper_parameters=358),
    Preset(name="hyena-1.4b", model=_hyena(36, 2048, tied=False), tokens=_B50,
           widths="hyena-360m's at twice the width", paper_parameters=1_400),
    Preset(name="rwkv-70m", model=_rwkv(6, 688), widths="ours"),
    Preset(name="rwkv-125m", model=_rwkv(17, 768), widths="depth ours", paper_parameters=169),
    Preset(name="rwkv-360m", model=_rwkv(22, 1024), widths="depth ours", paper_parameters=351),
    Preset(name="base_conv-70m", model=_base_conv(12, 704), widths="ours"),
    Preset(name="base_conv-125m", model=_base_conv(24, 768), widths="ours"),
    Preset(name="base_conv-360m", model=_base_conv(48, 1024), widths="the paper's depth",
           paper_parameters=354),
    *(_hybrid(special, size) for size in ("70m", "125m", "360m") for special in SPECIAL),
]  # fmt: skip

registry: dict[str, Preset] = {one.name: one for one in _ALL}


def preset(name: str) -> Preset:
    """A preset by name; UnknownName, near names suggested."""
    if name not in registry:
        raise UnknownName("model", name, registry)
    return registry[name]
