"""For the same weights our mixers compute what HazyResearch/zoology at dbcb60d computes.

tests/golden holds its inputs, weights, outputs and gradients; README.md there tells how they
were made. Each entry below maps one file's weights to ours, by name.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from recallzoo.mixers import Context, Mixer, OptionValue, mixer
from recallzoo.mixers._convolution import position_features
from recallzoo.model import LanguageModel, ModelConfig

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5
"""Largest difference over largest value. Both sides are float32, whose rounding is 6e-8; sums over
33 positions and 16 channels, in another order and partly by FFT, were seen to move results by up
to 2e-6. A wrong sign, order or missing term moves them by 1e-2 or more."""

Transform = Callable[[Tensor], Tensor]


def same(weight: Tensor) -> Tensor:
    return weight


def taps_by_lag(weight: Tensor) -> Tensor:
    """A Conv1d's [D, 1, K], oldest first, as [D, K], present first."""
    return weight[:, 0].flip(-1)


def first(weight: Tensor) -> Tensor:
    return weight[0]


def flat(weight: Tensor) -> Tensor:
    return weight.flatten()


def by_head(weight: Tensor) -> Tensor:
    """Columns ordered (value index, head) to (head, value index), two value indices."""
    return weight.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)


def linear(ours: str, theirs: str, bias: bool = True) -> dict[str, tuple[str, Transform]]:
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{ours}.{kind}": (f"{theirs}.{kind}", same) for kind in kinds}


@dataclass(frozen=True)
class Parity:
    """A mixer, its options, and where each of its parameters comes from.

    zero     our parameters that the reference lacks
    unused   the reference's constants, which we compute
    """

    mixer: str
    options: dict[str, OptionValue]
    max_seq_len: int
    weights: dict[str, tuple[str, Transform]]
    zero: tuple[str, ...] = ()
    unused: tuple[str, ...] = field(default=())


ATTENTION = {**linear("qkv", "Wqkv"), **linear("out_proj", "out_proj")}
H3 = {
    **linear("q_proj", "q_proj"),
    **linear("k_proj", "k_proj"),
    **linear("v_proj", "v_proj"),
    **linear("output", "output_linear"),
    "shift_b": ("ssm_k_kernel.kernel.B", same),
    "shift_c": ("ssm_k_kernel.kernel.C", first),
    "shift_d": ("ssm_k_D", same),
    "log_dt": ("kernel.kernel.log_dt", same),
    "a_log_decay": ("kernel.kernel.inv_A_real", same),
    "a_frequency": ("kernel.kernel.A_imag", same),
    "b": ("kernel.kernel.B", same),
    "c": ("kernel.kernel.C", first),
    "d": ("D", same),
}

PARITIES = {
    "attention": Parity("attention", {}, 33, ATTENTION),
    "attention_2_heads": Parity("attention", {"num_heads": 2}, 33, ATTENTION),
    "sliding_window": Parity("sliding_window", {"window": 6}, 33, ATTENTION),
    "base_conv_short": Parity(
        "base_conv",
        {"kernel_size": 3, "skip": True},
        40,
        {
            **linear("gate", "projection"),
            "conv.filter": ("conv.conv.weight", taps_by_lag),
            "conv.bias": ("conv.conv.bias", same),
        },
    ),
    "base_conv_implicit": Parity(
        "base_conv",
        {"kernel_size": -1, "skip": True, "filter_skip": True},
        40,
        {
            **linear("gate", "projection"),
            **linear("conv.filter_in", "conv.mlp.0"),
            **linear("conv.filter_out", "conv.mlp.2"),
        },
        zero=("conv.bias",),
        unused=("conv.pos_emb.z",),
    ),
    "base_conv_explicit": Parity(
        "base_conv",
        {
            "kernel_size": -1,
            "implicit": False,
            "activation": "silu",
            "skip": True,
            "filter_skip": True,
        },
        33,
        {**linear("gate", "projection"), "conv.filter": ("conv.filter", same)},
        zero=("conv.bias",),
    ),
    "h3_head_dim_1": Parity("h3", {"d_state": 8}, 40, H3),
    "h3_head_dim_2": Parity(
        "h3",
        {"d_state": 32, "head_dim": 2},
        32,
        {**H3, "output.weight": ("output_linear.weight", by_head)},
    ),
    "hyena": Parity(
        "hyena",
        {"filter_width": 12, "num_features": 5, "modulation_shift": 0.05},
        40,
        {
            **linear("in_proj", "in_proj"),
            **linear("out_proj", "out_proj"),
            "short.filter": ("short_filter.weight", taps_by_lag),
            "short.bias": ("short_filter.bias", same),
            "filter.positions": ("filter_fn.pos_emb.z", first),
            "filter.frequency": ("filter_fn.implicit_filter.1.freq", first),
            **linear("filter.hidden.0", "filter_fn.implicit_filter.0"),
            **linear("filter.hidden.1", "filter_fn.implicit_filter.2"),
            **linear("filter.hidden.2", "filter_fn.implicit_filter.4"),
            **linear("filter.last", "filter_fn.implicit_filter.6", bias=False),
            "filter.direct": ("filter_fn.bias", same),
        },
    ),
    "rwkv4": Parity(
        "rwkv4",
        {"layer_index": 1, "num_layers": 4},
        40,
        {
            "time_decay": ("time_decay", same),
            "time_first": ("time_first", same),
            **{f"time_mix_{x}": (f"time_mix_{x}", flat) for x in "kvr"},
            **{
                f"{name}.weight": (f"{name}.weight", same)
                for name in ("key", "value", "receptance", "output")
            },
        },
    ),
    "language_model": Parity(
        "attention",
        {"num_heads": 2},
        20,
        {
            "embedding.tokens.weight": ("backbone.embeddings.word_embeddings.weight", same),
            "embedding.positions.weight": ("backbone.embeddings.position_embeddings.weight", same),
            **linear("norm", "backbone.ln_f"),
            **{
                name: pair
                for i in range(2)
                for ours, theirs in (
                    ("mixer.qkv", "sequence_mixer.Wqkv"),
                    ("mixer.out_proj", "sequence_mixer.out_proj"),
                    ("state_mixer.fc1", "state_mixer.fc1"),
                    ("state_mixer.fc2", "state_mixer.fc2"),
                    ("norm1", "norm1"),
                    ("norm2", "norm2"),
                )
                for name, pair in linear(
                    f"blocks.{i}.{ours}", f"backbone.layers.{i}.{theirs}"
                ).items()
            },
        },
    ),
}


def read(name: str) -> dict[str, Tensor]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        made = json.loads(file.metadata()["made"])
        assert made["commit"] == "dbcb60d"
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def build(name: str) -> nn.Module:
    parity = PARITIES[name]
    config = mixer(parity.mixer, **parity.options)
    if name != "language_model":
        return config.build(16, parity.max_seq_len)
    model = ModelConfig(
        mixers=(config,), d_model=16, num_layers=2, state_mixer="mlp", position="learned"
    )
    return LanguageModel(model, vocab_size=24, max_seq_len=parity.max_seq_len)


def load(module: nn.Module, parity: Parity, golden: dict[str, Tensor]) -> None:
    """Put the reference's weights into our module. Every weight of either side is accounted for."""
    theirs = {name for name, _ in parity.weights.values()} | set(parity.unused)
    assert theirs == {k.removeprefix("weight.") for k in golden if k.startswith("weight.")}
    parameters = dict(module.named_parameters())
    assert set(parameters) == set(parity.weights) | set(parity.zero)
    with torch.no_grad():
        for ours, (name, transform) in parity.weights.items():
            weight = transform(golden[f"weight.{name}"])
            assert weight.shape == parameters[ours].shape, ours
            parameters[ours].copy_(weight)
        for ours in parity.zero:
            parameters[ours].zero_()


def run(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, LanguageModel):
        return module(x)
    return module(x, Context())


def assert_agrees(ours: Tensor | None, theirs: Tensor, what: str) -> None:
    assert ours is not None, what
    assert ours.shape == theirs.shape, what
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    assert difference <= TOLERANCE, f"{what}: relative difference {difference:.1e}"


@pytest.mark.parametrize("name", PARITIES)
def test_output_and_gradients_agree_with_the_reference(name):
    golden, parity = read(name), PARITIES[name]
    module = build(name)
    load(module, parity, golden)
    x = golden["input"].requires_grad_(golden["input"].is_floating_point())
    y = run(module, x)
    y.backward(golden["cotangent"])

    assert_agrees(y, golden["output"], "output")
    if x.requires_grad:
        assert_agrees(x.grad, golden["input_grad"], "gradient of the input")
    parameters = dict(module.named_parameters())
    for ours, (theirs, transform) in parity.weights.items():
        wanted = transform(golden[f"grad.{theirs}"])
        assert_agrees(parameters[ours].grad, wanted, f"gradient of {ours}")


@pytest.mark.parametrize("name", [name for name in PARITIES if name != "language_model"])
def test_the_recurrent_form_agrees_with_the_reference(name):
    golden, parity = read(name), PARITIES[name]
    module = build(name)
    load(module, parity, golden)
    assert isinstance(module, Mixer)
    assert_agrees(module.scan(golden["input"], Context()), golden["output"], "output")


def test_filter_features_are_those_of_the_reference():
    ours = position_features(num_features=3, max_seq_len=40, seq_len=40)
    assert_agrees(ours, read("base_conv_implicit")["weight.conv.pos_emb.z"][0], "features")


def test_every_golden_file_is_read():
    assert {path.stem for path in GOLDEN.glob("*.safetensors")} == set(PARITIES)
