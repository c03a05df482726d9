"""What cannot train is refused before anything does, whichever run of a list it is."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from recallzoo.errors import ContractViolation, InvalidConfig, UserError
from recallzoo.executors import local
from recallzoo.mixers import MixerConfig, mixer
from recallzoo.model import ModelConfig
from recallzoo.preflight import check_runs
from recallzoo.recipes import load
from recallzoo.run import Budget, Run
from recallzoo.store import Store
from recallzoo.sweep import SweepOptions, sweep
from recallzoo.tasks import Data, task

SIZES = {"seq_len": 16, "num_pairs": 2, "vocab_size": 16}


def run_of(own: MixerConfig, width: int = 16, task_name: str = "mqar") -> Run:
    return Run(
        data=Data.of(task(task_name, **SIZES), train=32, valid=8, test=8),
        model=ModelConfig(mixers=(own,), d_model=width, num_layers=1),
        budget=Budget(batch_size=32),
    )


GOOD = run_of(mixer("short_conv"))
REFUSED = [
    (run_of(mixer("attention", num_heads=3)), "attention.num_heads=3 does not divide d_model=16"),
    (run_of(mixer("lookup_attention", num_latest=0)), "num_latest=0 must be at least 1"),
    (run_of(mixer("sliding_window", window=0)), "window=0"),
    (
        run_of(mixer("selective_attention", selector="learned", num_rows=0)),
        "num_rows=0 must be at least 1",
    ),
    (run_of(mixer("short_conv"), 15, "stacked"), "d_model=15 must be a multiple of 2"),
    (run_of(mixer("shift_conv"), 16, "stacked"), "shift_conv reads one token id at each step"),
    (
        run_of(mixer("selective_attention", selector="repeated"), 16, "stacked"),
        "selective_attention reads one token id",
    ),
]


@pytest.mark.parametrize(("bad", "words"), REFUSED)
def test_a_model_that_cannot_train_is_refused_though_it_is_last(bad, words, tmp_path, monkeypatch):
    def never(*_: object) -> Any:
        raise AssertionError("a pack was trained")

    monkeypatch.setattr(local, "Pack", never)
    with pytest.raises(InvalidConfig, match=words):
        sweep([GOOD, bad], Store(tmp_path), None, SweepOptions(device="cpu"))  # pyright: ignore[reportArgumentType]


def test_a_task_with_too_few_different_rows_is_refused_before_another_trains():
    narrow = task("mqar", seq_len=8, num_pairs=1, vocab_size=4)
    bad = dataclasses.replace(GOOD, data=Data.of(narrow, train=256, valid=8, test=8))
    with pytest.raises(InvalidConfig, match="too few different rows"):
        check_runs([GOOD, bad])


def test_mixers_of_hidden_states_read_several_streams():
    check_runs([run_of(mixer("lookup_attention", match="hash"), 16, "stacked"), GOOD])


OWN = """
import torch
from torch import nn

class OnlyEven(nn.Module):
    needs_tokens = True

    def __init__(self, d_model, max_seq_len):
        super().__init__()
        torch.rand(1).item()
        if d_model % 2:
            raise ValueError("width must be even")
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x, context):
        return self.out(x)
"""


@pytest.fixture
def only_even(tmp_path: Path) -> MixerConfig:
    (tmp_path / "own.py").write_text(OWN)
    return mixer(f"{tmp_path / 'own.py'}:OnlyEven")


def test_a_mixer_of_ones_own_that_fails_at_one_width_is_named_with_the_line(only_even):
    words = r"OnlyEven cannot be built at width 15 for 16 tokens: own.py:12: ValueError: width must"
    with pytest.raises(ContractViolation, match=words):
        check_runs([run_of(only_even, 16), run_of(only_even, 15)])


def test_what_a_mixer_of_ones_own_makes_of_several_streams_is_its_own_affair(only_even):
    check_runs([run_of(only_even, 16, "stacked")])


def test_the_global_random_state_is_left_as_it_was(only_even):
    before = torch.random.get_rng_state()
    check_runs([GOOD, run_of(only_even)])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, {"executor": "ray"}])
def test_a_device_that_cannot_be_is_refused_with_the_options(options):
    with pytest.raises(UserError, match=r"'cuda:99'"):
        SweepOptions(device="cuda:99", **options)


@pytest.mark.parametrize("option", ["num_epochs", "num_examples"])
def test_a_size_of_zero_is_refused_and_not_taken_for_none_given(option):
    with pytest.raises(InvalidConfig, match=f"{option}=0"):
        load("ladder").runs(**{option: 0})


@pytest.mark.parametrize("option", ["widths", "learning_rates", "seq_lens", "seeds", "mixers"])
def test_an_empty_option_is_not_taken_for_none_given(option):
    with pytest.raises(UserError, match=f"no value was given for --{option.replace('_', '-')},"):
        load("ladder").runs(**{option: ()})
