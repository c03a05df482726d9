"""The named models: the paper's sizes, built without memory; other sizes of them."""

import pytest
import torch

from recallzoo.errors import InvalidConfig, UnknownName
from recallzoo.presets import GPT2_VOCAB_SIZE, SPECIAL, preset, registry

PAPERS = [name for name, one in registry.items() if one.paper_parameters is not None]
FAMILIES = {"attention": 4, "long_conv": 3, "h3": 3, "hyena": 4, "rwkv": 3}


def parameters(name: str, vocab_size: int = GPT2_VOCAB_SIZE) -> int:
    with torch.device("meta"):
        return preset(name).build(vocab_size).num_parameters()


def test_the_papers_17_models_are_there():
    for family, number in FAMILIES.items():
        sizes = {name.rsplit("-", 1)[1] for name in registry if name.rsplit("-", 1)[0] == family}
        assert len(sizes & {"70m", "125m", "360m", "1.4b"}) == number


@pytest.mark.parametrize("name", PAPERS)
def test_parameters_are_within_3_percent_of_the_papers(name):
    wanted = registry[name].paper_parameters
    assert wanted is not None
    assert parameters(name) / 1e6 == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("name", [name for name in registry if name.endswith("-70m")])
def test_the_smallest_scale_has_about_70_million_parameters(name):
    assert parameters(name) / 1e6 == pytest.approx(70, rel=0.05)


def test_every_preset_says_whose_widths_it_has():
    for one in registry.values():
        assert one.widths in (one.__doc__ or "")
        assert one.context == 2048


def test_a_smaller_vocabulary_takes_its_rows_from_the_embedding_alone():
    name, width = "attention-70m", preset("attention-70m").model.d_model
    assert parameters(name) - parameters(name, 16_384) == (GPT2_VOCAB_SIZE - 16_384) * width


@pytest.mark.parametrize("name", registry)
def test_every_preset_trains_at_a_tiny_size(name):
    has_heads = any("num_heads" in dict(m.options) for m in preset(name).model.mixers)
    tiny = preset(name).resized(128 if has_heads else 16, 2)
    model = tiny.build(vocab_size=11, context=6)
    tokens = torch.arange(6)[None] % 11
    model.loss(tokens, torch.arange(5)[None], tokens[:, 1:]).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    # Keys of H3 and the like may be without influence at six tokens; most must have some.
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in gradients.values()) > 0.8 * len(
        gradients
    )
    assert all(g is None or bool(g.isfinite().all()) for g in gradients.values())


def test_a_width_that_splits_no_heads_is_refused_with_one_that_does():
    with pytest.raises(InvalidConfig, match="192"):
        preset("attention-125m").resized(d_model=200)


def test_rwkv_at_another_depth_has_that_depths_initial_decays():
    model = preset("rwkv-70m").resized(num_layers=4).model
    assert [dict(m.options)["layer_index"] for m in model.mixers] == [0, 0, 1, 1]
    assert {dict(m.options)["num_layers"] for m in model.mixers} == {2}


def test_an_unknown_model_suggests_near_names():
    with pytest.raises(UnknownName, match="attention-125m"):
        preset("atention-125m")


HYBRIDS = [one for one in registry.values() if one.special_layers]


@pytest.mark.parametrize("one", HYBRIDS, ids=lambda one: one.name)
def test_a_hybrid_differs_from_base_conv_in_6_to_9_percent_of_its_layers(one):
    special, size = one.name.removeprefix("base_conv_").rsplit("-", 1)
    plain = preset(f"base_conv-{size}").model.layer_mixers()
    differing = [i for i, m in enumerate(one.model.layer_mixers()) if m != plain[i]]
    assert tuple(differing) == one.special_layers
    assert 0.06 < len(differing) / len(plain) < 0.09
    assert special in SPECIAL


def test_a_hybrid_of_another_depth_keeps_its_special_layers_as_deep():
    lookups = preset("base_conv_lookup-360m").resized(num_layers=16).model.layer_mixers()
    found = [i for i, m in enumerate(lookups) if m.name == "lookup_attention"]
    assert found == [3, 7, 11]
    two = preset("base_conv_lookup-70m").resized(num_layers=2).model.layer_mixers()
    assert [m.name for m in two] == ["base_conv", "lookup_attention"]


def test_a_selection_keeps_its_share_of_the_context():
    for name in ("base_conv_learned-70m", "base_conv_topk-70m"):
        (special,) = preset(name).special_layers
        options = dict(preset(name).resized(context=1024).model.mixers[special].options)
        assert options["num_rows"] == 128


def test_a_filters_network_does_not_rule_hyenas_gradient():
    """With PyTorch's own initial maps and sines of frequency 14 it has 98 % of it at first, and
    clipping by the whole norm leaves the other weights next to nothing."""
    model = preset("hyena-70m").resized(128, 4, 64).build(vocab_size=100, context=64)
    tokens = torch.randint(100, (8, 65), generator=torch.Generator().manual_seed(0))
    model.loss(tokens[:, :-1], torch.arange(64).expand(8, -1), tokens[:, 1:]).backward()
    squares = {
        n: float(p.grad.square().sum()) for n, p in model.named_parameters() if p.grad is not None
    }
    filters = sum(square for name, square in squares.items() if ".filter." in name)
    assert filters < 0.1 * sum(squares.values())
