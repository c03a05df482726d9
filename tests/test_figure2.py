"""The three protocols of Figure 2: how many runs, which ones, and what sets them apart."""

import dataclasses
import functools

import pytest
import torch

from recallzoo.errors import InvalidConfig
from recallzoo.mixers import Context, mixer
from recallzoo.model import Block, ModelConfig
from recallzoo.recipes.figure2 import figure2
from recallzoo.recipes.figure2_2023 import figure2_2023
from recallzoo.recipes.figure2_iclr24 import figure2_iclr24
from recallzoo.run import Run
from recallzoo.state_mixers import build_state_mixer
from recallzoo.train._stack import stack_models

BOTH = pytest.mark.parametrize("recipe", [figure2, figure2_iclr24])
ALL = pytest.mark.parametrize("recipe", [figure2, figure2_iclr24, figure2_2023])
SMALL = {"seq_lens": (64,), "widths": (16,), "mixers": ("attention", "base_conv")}


@functools.cache
def all_runs(recipe) -> list:
    """A recipe's runs by default: hundreds, so they are made once."""
    return recipe()


def differing(first: Run, second: Run) -> set[str]:
    """Dotted names of what differs between two runs."""

    def walk(a, b, name):
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return set().union(*(walk(a[key], b[key], f"{name}.{key}") for key in a))
        return set() if a == b else {name.removeprefix(".")}

    return walk(first.config, second.config, "")


@pytest.mark.parametrize(
    ("recipe", "seeds"), [(figure2, 3), (figure2_iclr24, 1), (figure2_2023, 1)]
)
def test_all_cells_of_the_figure_are_there_once(recipe, seeds):
    runs = all_runs(recipe)
    assert len(runs) == 5 * 4 * 4 * 4 * seeds
    assert len({run.hash for run in runs}) == len(runs)
    cells = {(run.label, run.data.max_seq_len, run.model.d_model) for run in runs}
    assert len(cells) == 5 * 4 * 4
    assert {label for label, _, _ in cells} == {"Attention", "BaseConv", "H3", "Hyena", "RWKV"}
    assert len({run.pack_key for run in runs}) == len(cells)


@BOTH
def test_each_length_has_its_pairs_and_batch_size(recipe):
    found = {
        (run.data.max_seq_len, run.data.train[0].task.num_pairs, run.budget.batch_size)
        for run in all_runs(recipe)
    }
    assert found == {(64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128)}


def test_the_released_protocol_has_four_layers_but_for_attention_and_figure2_two():
    for run in all_runs(figure2_iclr24):
        assert run.model.num_layers == (2 if run.label == "Attention" else 4)
    assert {run.model.num_layers for run in all_runs(figure2)} == {2}


def test_with_as_many_layers_the_protocols_differ_in_what_they_say_alone():
    options = {**SMALL, "seeds": (0,), "num_layers": 2}
    for one, other in zip(figure2(**options), figure2_iclr24(**options), strict=True):
        assert differing(one, other) == {
            "optimizer.decayed",
            "optimizer.schedule",
            "optimizer.warmup_fraction",
            "precision",
        }


def test_the_launched_protocol_has_networks_where_there_were_and_mixers_twice_where_there_were():
    found = {
        run.label: (run.model.num_layers, run.model.state_mixer) for run in all_runs(figure2_2023)
    }
    assert found == {
        "Attention": (2, "tanh_mlp"),
        "BaseConv": (8, "none"),
        "H3": (4, "none"),
        "Hyena": (2, "tanh_mlp"),
        "RWKV": (2, "tanh_mlp"),
    }
    run, *_ = figure2_2023(**{**SMALL, "mixers": ("base_conv",)})
    sizes = [dict(config.options)["kernel_size"] for config in run.model.layer_mixers()]
    assert sizes == [3, 3, -1, -1, 3, 3, -1, -1]


def test_the_launched_protocol_has_large_batches_but_for_attention_and_long_examples():
    found = {
        (run.label, run.data.max_seq_len): run.budget.batch_size for run in all_runs(figure2_2023)
    }
    assert [found["Attention", length] for length in (64, 128, 256, 512)] == [256, 256, 256, 128]
    assert [found["H3", length] for length in (64, 128, 256, 512)] == [1024, 1024, 256, 128]
    assert [found["RWKV", length] for length in (64, 128, 256, 512)] == [1024, 1024, 1024, 128]


def test_h3_was_launched_with_higher_rates_from_128_tokens_on():
    def rates(**options):
        runs = figure2_2023(**{**SMALL, "mixers": ("h3",), **options})
        return [run.optimizer.learning_rate for run in runs]

    assert rates() == [1e-4, 0.000464159, 0.00215443, 0.01]
    assert rates(seq_lens=(128,)) == pytest.approx([5.01e-4, 1.36e-3, 3.69e-3, 1e-2], rel=2e-3)
    assert set(rates(seq_lens=(128,))) < set(rates(seq_lens=(128,), num_learning_rates=7))


@pytest.mark.parametrize(
    ("recipe", "init", "num_layers"),
    [(figure2, "normal", 12), (figure2_iclr24, "torch", 12), (figure2_2023, "torch", 2)],
)
def test_rwkv_begins_as_it_did_in_each_protocol(recipe, init, num_layers):
    run, *_ = recipe(**{**SMALL, "mixers": ("rwkv4",)})
    options = [dict(config.options) for config in run.model.layer_mixers()]
    assert {(each["init"], each["num_layers"]) for each in options} == {(init, num_layers)}
    assert [each["layer_index"] for each in options] == list(range(len(options)))


def test_beside_model_and_batches_the_launched_protocol_differs_from_the_release_in_its_decay():
    options = {"seq_lens": (64,), "widths": (16,), "mixers": ("attention",), "seeds": (0,)}
    for one, other in zip(figure2_2023(**options), figure2_iclr24(**options), strict=True):
        assert differing(one, other) == {
            "budget.batch_size",
            "model.state_mixer",
            "optimizer.weight_decay",
        }


def test_a_tanh_mlp_is_two_maps_with_tanh_between():
    block = build_state_mixer("tanh_mlp", 4, 2.0)
    assert isinstance(block, torch.nn.Module)
    x = torch.randn(3, 4)
    parameters = dict(block.named_parameters())
    hidden = torch.tanh(x @ parameters["fc1.weight"].T + parameters["fc1.bias"])
    expected = hidden @ parameters["fc2.weight"].T + parameters["fc2.bias"]
    torch.testing.assert_close(block(x), expected)


@BOTH
def test_filters_of_base_conv_are_short_and_long_in_turn(recipe):
    runs = recipe(**{**SMALL, "mixers": ("base_conv",)}, num_layers=4)
    sizes = [dict(config.options)["kernel_size"] for config in runs[0].model.layer_mixers()]
    assert sizes == [3, -1, 3, -1]


@ALL
@pytest.mark.parametrize("num_rates", [7, 10, 13])
def test_denser_grids_hold_the_runs_of_the_published_one(recipe, num_rates):
    published = {run.hash for run in recipe(**SMALL)}
    denser = {run.hash for run in recipe(**SMALL, num_learning_rates=num_rates)}
    assert published < denser
    assert len(denser) * 4 == len(published) * num_rates


@ALL
def test_runs_of_a_cell_train_together_and_stop_together_if_asked(recipe):
    runs = recipe(seq_lens=(64,), widths=(16,), mixers=("h3",), seeds=(0, 1), stop_group=True)
    assert len({run.pack_key for run in runs}) == 1
    assert len({run.group_key for run in runs}) == 2
    assert all(run.budget.stop_group for run in runs)


@ALL
def test_any_mixer_may_take_part(recipe):
    run, *_ = recipe(seq_lens=(64,), widths=(16,), mixers=("short_conv",))
    assert run.model.mixers == (mixer("short_conv"),)
    assert run.model_label.startswith("short_conv")


@ALL
@pytest.mark.parametrize(
    "options",
    [
        {"seq_lens": (96,)},
        {"num_learning_rates": 1},
        {"num_learning_rates": 7, "learning_rates": (1e-3,)},
        {"num_examples": 100},
    ],
)
def test_what_cannot_be_is_refused(recipe, options):
    with pytest.raises(InvalidConfig):
        recipe(**options)


def test_an_identity_state_mixer_adds_the_norm_of_the_residual_stream():
    torch.manual_seed(0)
    config = ModelConfig(mixers=(mixer("attention"),), d_model=8, state_mixer="identity")
    block = Block(config, config.mixers[0].build(8, 6))
    x = torch.randn(2, 6, 8)
    mixed = x + block.mixer(block.norm1(x), Context())
    assert block.norm2 is not None
    torch.testing.assert_close(block(x, Context()), mixed + block.norm2(mixed))
    positions = torch.tensor([[1, 4], [0, 5]])
    at = block.forward_at(x, positions, Context())
    torch.testing.assert_close(at, block(x, Context())[torch.arange(2)[:, None], positions])


def test_weight_decay_falls_on_matrices_or_on_everything():
    run = figure2(seq_lens=(64,), widths=(16,), mixers=("hyena",), seeds=(0,))[0]
    everything = dataclasses.replace(run.optimizer, decayed="all")
    rules = stack_models(
        [dataclasses.replace(run, optimizer=everything)], torch.device("cpu")
    ).rules
    assert all(rule.decay for rule in rules.values())
    rules = stack_models([run], torch.device("cpu")).rules
    assert not rules["norm.weight"].decay
    assert rules["blocks.0.mixer.in_proj.weight"].decay
