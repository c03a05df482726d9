"""The language model around any mixers: decoding, asked positions, heads, the optimiser's rules."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recallzoo.errors import ContractViolation, InvalidConfig, UnknownName
from recallzoo.mixers import Mixer, ParameterRule, mixer, registry
from recallzoo.model import LanguageModel, ModelConfig

VOCAB_SIZE, MAX_SEQ_LEN = 13, 24
HYBRID = (mixer("sliding_window", window=3), mixer("rwkv4"), mixer("attention", num_heads=2))


def build(num_streams: int = 1, **options) -> LanguageModel:
    """A model with noise on its weights, so that every part of it shows in the output."""
    settings = {"mixers": (mixer("attention"),), "d_model": 16, **options}
    torch.manual_seed(0)
    model = LanguageModel(
        ModelConfig(**settings),
        vocab_size=VOCAB_SIZE,
        max_seq_len=MAX_SEQ_LEN,
        num_streams=num_streams,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tokens_of(seq_len: int, *streams: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(VOCAB_SIZE, (2, seq_len, *streams))


def decoded(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    cache, logits = model.init_cache(tokens.shape[0]), []
    for t in range(tokens.shape[1]):
        logits_t, cache = model.step(tokens[:, t], cache)
        logits.append(logits_t)
    return torch.stack(logits, dim=1)


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))


CONFIGS: dict[str, dict[str, Any]] = {
    "hybrid": {"mixers": HYBRID, "num_layers": 4},
    "learned_positions": {"mixers": HYBRID, "num_layers": 3, "position": "learned"},
    "mlp": {"state_mixer": "mlp"},
    "gated_mlp_rms_untied": {
        "state_mixer": "gated_mlp",
        "norm": "rms",
        "tie_embeddings": False,
        "mlp_ratio": 1.5,
    },
    "one_layer": {"num_layers": 1},
} | {name: {"mixers": (mixer(name),)} for name in registry}


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in registry or registry[n].causal])
def test_step_equals_forward(name):
    model, tokens = build(**CONFIGS[name]), tokens_of(MAX_SEQ_LEN)
    with torch.no_grad():
        assert_same(decoded(model, tokens), model(tokens))


def test_step_equals_forward_with_two_streams():
    model, tokens = build(num_streams=2), tokens_of(9, 2)
    with torch.no_grad():
        assert_same(decoded(model, tokens), model(tokens))


@pytest.mark.parametrize("name", CONFIGS)
def test_asked_positions_get_the_logits_and_gradients_of_all(name):
    model, tokens = build(**CONFIGS[name]), tokens_of(17)
    positions = torch.tensor([[16, 0, 5], [3, 3, 11]])
    weights = torch.randn(2, 3, VOCAB_SIZE)
    asked = model(tokens, positions)
    full = torch.stack([row[at] for row, at in zip(model(tokens), positions, strict=True)])
    assert_same(asked, full)
    parameters = list(model.parameters())
    gradients = [
        torch.autograd.grad(
            (y * weights).sum(), parameters, allow_unused=True, materialize_grads=True
        )
        for y in (asked, full)
    ]
    largest = max(float(gradient.abs().max()) for gradient in gradients[1])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("tie", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_logits(tie):
    model, tokens = build(tie_embeddings=tie), tokens_of(12)
    positions, answers = torch.tensor([[2, 7], [11, 0]]), torch.tensor([[1, 0], [12, 4]])
    wanted = torch.nn.functional.cross_entropy(
        model(tokens, positions).flatten(0, 1), answers.flatten()
    )
    torch.testing.assert_close(model.loss(tokens, positions, answers), wanted)


@given(num_layers=st.integers(1, 7), num_mixers=st.integers(1, 3))
def test_a_pattern_of_mixers_repeats_over_the_layers(num_layers, num_mixers):
    pattern = HYBRID[:num_mixers]
    if num_mixers > num_layers:
        with pytest.raises(InvalidConfig, match="would be ignored"):
            ModelConfig(mixers=pattern, num_layers=num_layers)
        return
    config = ModelConfig(mixers=pattern, d_model=16, num_layers=num_layers)
    model = LanguageModel(config, vocab_size=4, max_seq_len=4)
    for i, block in enumerate(model.blocks):
        assert isinstance(block.mixer, registry[pattern[i % num_mixers].name])


def test_a_tied_head_is_the_embedding():
    tied, untied = build(), build(tie_embeddings=False)
    assert untied.num_parameters() - tied.num_parameters() == VOCAB_SIZE * 16
    tied(tokens_of(5)).sum().backward()
    assert tied.head is None
    with torch.no_grad():
        tied.embedding.tokens.weight[3] = 0.0
    assert not tied(tokens_of(5))[..., 3].any()


def test_several_streams_have_a_head_of_their_own():
    model = build(num_streams=2)
    assert model.embedding.tokens.weight.shape == (VOCAB_SIZE, 8)
    assert model.head is not None
    assert model(tokens_of(5, 2)).shape == (2, 5, VOCAB_SIZE)


def test_every_stream_reaches_the_logits():
    model, tokens = build(num_streams=2), tokens_of(5, 2)
    for stream in range(2):
        changed = tokens.clone()
        changed[:, 4, stream] = (changed[:, 4, stream] + 1) % VOCAB_SIZE
        assert (model(tokens)[:, 4] != model(changed)[:, 4]).any()


def test_learned_positions_tell_equal_tokens_apart():
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    without, with_positions = build(), build(position="learned")
    assert_same(without(tokens)[:, 0], without(tokens)[:, 5])
    assert (with_positions(tokens)[:, 0] - with_positions(tokens)[:, 5]).abs().max() > 1e-2


def test_more_tokens_than_learned_positions_are_refused():
    model = build(position="learned")
    with pytest.raises(InvalidConfig, match="learned positions for 24 tokens and was given 25"):
        model(tokens_of(MAX_SEQ_LEN + 1))
    with pytest.raises(InvalidConfig, match="24 tokens and was given 25"):
        decoded(model, tokens_of(MAX_SEQ_LEN + 1))


def test_weight_decay_skips_vectors_norms_biases_and_positions():
    model = build(
        mixers=(mixer("rwkv4"), mixer("attention")), position="learned", state_mixer="mlp"
    )
    decayed = {name for name, rule in model.parameter_rules().items() if rule.decay}
    assert decayed == {
        "embedding.tokens.weight",
        *(f"blocks.0.mixer.{name}.weight" for name in ("key", "value", "receptance", "output")),
        *(f"blocks.1.mixer.{name}.weight" for name in ("qkv", "out_proj")),
        *(f"blocks.{i}.state_mixer.fc{j}.weight" for i in range(2) for j in (1, 2)),
    }
    assert set(model.parameter_rules()) == {name for name, _ in model.named_parameters()}


def test_a_mixers_own_rules_win(monkeypatch):
    model = build()
    rule = ParameterRule(decay=False, learning_rate=1e-3)
    monkeypatch.setattr(Mixer, "parameter_rules", lambda self: {"qkv.weight": rule})
    rules = model.parameter_rules()
    assert rules["blocks.1.mixer.qkv.weight"] == rule
    assert rules["blocks.1.mixer.out_proj.weight"] == ParameterRule()
    monkeypatch.setattr(Mixer, "parameter_rules", lambda self: {"qvk.weight": rule})
    with pytest.raises(ContractViolation, match=r"'qvk.weight', which is none of its parameters"):
        model.parameter_rules()


def test_projections_into_the_residual_stream_start_smaller_in_deeper_models():
    def spread(**options) -> tuple[float, float]:
        torch.manual_seed(0)
        config = ModelConfig(
            mixers=(mixer("attention"),), d_model=64, state_mixer="mlp", num_layers=8, **options
        )
        block = LanguageModel(config, vocab_size=8, max_seq_len=8).blocks[3]
        return block.mixer.out_proj.weight.std().item(), block.state_mixer.fc2.weight.std().item()  # pyright: ignore

    assert spread() == pytest.approx((0.02 / 4, 0.02 / 4), rel=0.1)
    assert spread(rescale_out_proj=False) == pytest.approx((0.02, 0.02), rel=0.1)


def test_dropout_follows_its_key_and_is_off_without_one():
    model, tokens = build(embed_dropout=0.3, residual_dropout=0.3).train(), tokens_of(9)
    key, other = torch.tensor(5), torch.tensor(6)
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens, dropout_key=key), model(tokens, dropout_key=key))
    assert not torch.equal(model(tokens, dropout_key=key), model(tokens, dropout_key=other))


def test_state_is_summed_over_layers_by_kind():
    model = build(mixers=HYBRID, num_layers=3)
    assert model.state_size(10) == {"kv": 2 * 16 * 3 + 2 * 16 * 10, "conv": 16, "matrix": 48}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mixers": ()}, InvalidConfig, "model.mixers is empty"),
        ({"d_model": 0}, InvalidConfig, "model.d_model=0 must be at least 1"),
        ({"num_layers": 0}, InvalidConfig, "model.num_layers=0"),
        ({"norm": "layernorm"}, UnknownName, "'layernorm'. Did you mean 'layer'"),
        ({"position": "rotary"}, UnknownName, "model.position is called 'rotary'"),
        ({"state_mixer": "gated"}, UnknownName, "Did you mean 'gated_mlp'"),
        ({"mlp_ratio": 0.0}, InvalidConfig, "model.mlp_ratio=0.0"),
        ({"embed_dropout": 1.0}, InvalidConfig, r"model.embed_dropout=1.0 must be in \[0, 1\)"),
        ({"residual_dropout": -0.1}, InvalidConfig, "model.residual_dropout=-0.1"),
    ],
)
def test_a_model_that_cannot_be_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        ModelConfig(**{"mixers": (mixer("attention"),), **options})


def test_a_width_that_the_streams_do_not_divide_is_refused():
    with pytest.raises(InvalidConfig, match=r"model.d_model=16 must be a multiple of 3"):
        build(num_streams=3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_built_on_the_device_asked_for_whatever_other_libraries_do(name, monkeypatch):
    # transformers makes linspace give numbers on the CPU while it builds a model on `meta`, and
    # the first time it does, PyTorch forgets for good that `meta` applies to linspace.
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *a, **k: linspace(*a, **{"device": "cpu", **k}))
    with torch.device("meta"):
        model = build(**CONFIGS[name])
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
