"""The recipes of input-dependent layers: what they vary, and nothing else."""

import pytest
import torch

from recallzoo.errors import InvalidConfig, UnknownName
from recallzoo.mixers import mixer
from recallzoo.model import LanguageModel
from recallzoo.recipes.frontier import (
    ALL,
    hybrids,
    lookup_size,
    parameter_efficiency,
    placement,
    selection_size,
)

SMALL = {"learning_rates": (1e-3,), "seeds": (0,)}


@pytest.mark.parametrize("name", ALL)
def test_every_model_builds_at_the_smallest_width_with_its_special_layer_last(name):
    (run,) = hybrids((name,), (64,), (4,), (8,), **SMALL)
    model = LanguageModel(run.model, vocab_size=32, max_seq_len=64)
    assert len(model.blocks) == 2
    first, last = run.model.layer_mixers()
    assert (first == mixer("base_conv")) == (name != "attention")
    assert (last == mixer("base_conv")) == (name == "base_conv")


def test_a_base_without_a_special_layer_may_end_in_a_filter_that_sees_all_tokens():
    (run,) = hybrids(("base_conv_long",), (64,), (4,), (8,), **SMALL)
    model = LanguageModel(run.model, vocab_size=32, max_seq_len=64).eval()
    tokens = torch.zeros(1, 64, dtype=torch.long)
    other = tokens.index_fill(1, torch.tensor([0]), 1)
    assert not torch.equal(model(tokens)[:, -1], model(other)[:, -1])
    (run,) = hybrids(("base_conv",), (64,), (4,), (8,), **SMALL)
    short = LanguageModel(run.model, vocab_size=32, max_seq_len=64).eval()
    assert torch.equal(short(tokens)[:, -1], short(other)[:, -1])


def test_placement_moves_one_special_layer_through_the_depth_and_spreads_several():
    runs = placement(("lookup",), num_layers=8, num_special=(1, 2), **SMALL)
    placed = [
        tuple(i for i, one in enumerate(run.model.layer_mixers()) if one.name != "base_conv")
        for run in runs
    ]
    assert placed == [(0,), (2,), (4,), (5,), (7,), (3, 7), (6, 7)]
    assert len({run.label for run in runs}) == 7


def test_sizes_vary_by_their_option_alone():
    rows = selection_size((8, 16, 128), (64,), (4,), **SMALL)
    assert [dict(run.model.mixers[1].options)["num_rows"] for run in rows] == [8, 16]
    matches = lookup_size((1, 4), tasks=("mqar",), **SMALL)
    options = [dict(run.model.mixers[1].options) for run in matches]
    assert [(one["match"], one["num_latest"]) for one in options] == [
        ("token", 1),
        ("token", 4),
        ("hash", 1),
        ("hash", 4),
    ]


def test_parameter_efficiency_lowers_the_width():
    runs = parameter_efficiency(("lookup",), (64,), (4,), (8, 16), **SMALL)
    assert [run.model.d_model for run in runs] == [8, 16]


def test_lookups_of_one_kind_alone_are_asked_for_by_name():
    runs = lookup_size((4,), ("token",), ("mqar",), **SMALL)
    assert [run.label for run in runs] == ["token lookup, m = 4"]


@pytest.mark.parametrize(
    "recipe", [hybrids, placement, selection_size, lookup_size, parameter_efficiency]
)
def test_learning_rates_of_a_cell_stop_together_where_that_is_asked_for(recipe):
    assert not any(run.budget.stop_group for run in recipe(**SMALL))
    assert all(run.budget.stop_group for run in recipe(**SMALL, stop_group=True))


def test_an_unknown_model_and_unequal_lists_are_refused():
    with pytest.raises(UnknownName, match=r"'lookups'\. Did you mean 'lookup'"):
        hybrids(("lookups",))
    with pytest.raises(InvalidConfig, match="names 2 lengths and --num-pairs 1"):
        hybrids(seq_lens=(64, 128), num_pairs=(4,))
    with pytest.raises(InvalidConfig, match="--models attention has no special layer to place"):
        placement(("lookup", "attention"))
    with pytest.raises(InvalidConfig, match="--num-rows 65 or more is beyond every length"):
        selection_size((128, 65), (32, 64), (2, 4))
    with pytest.raises(InvalidConfig, match="--num-special 9 must be between 1 and"):
        placement(num_special=(9,))
