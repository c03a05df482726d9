"""Blocks computed again in the backward pass have the gradients of blocks that are kept."""

import functools

import pytest
import torch
from torch import Tensor

from recallzoo.presets import SPECIAL, preset
from recallzoo.train import _large_model as large

DRAWING = ["topk", "learned", "hash"]
"""Special mixers that draw random numbers while training, two of which add losses as well."""


def gradients(special: str, *, again: bool, compiled: bool = False) -> dict[str, Tensor | None]:
    small = preset(f"base_conv_{special}-70m").resized(64, 4, context=40)
    model = large.build_model(small.model, 20, 40, seed=0)
    training = large.TrainingModel(model, 20)
    if compiled:
        large.compile_model(training, "blocks")
    if again:
        large.checkpoint_activations(training)
    tokens = torch.randint(0, 20, (2, 41), generator=torch.Generator().manual_seed(0))
    training(tokens, torch.tensor(1)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("special", SPECIAL)
def test_what_is_computed_again_draws_the_same_numbers(special):
    torch.testing.assert_close(
        gradients(special, again=True), gradients(special, again=False), rtol=0, atol=0
    )


@pytest.mark.unchecked
@pytest.mark.parametrize("special", DRAWING)
def test_so_do_compiled_blocks(special, monkeypatch):
    # Traced as on a GPU, but run without generated code, which takes a minute to compile.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    got = gradients(special, again=True, compiled=True)
    # Sums of a few hundred terms of size 1 in another order.
    torch.testing.assert_close(got, gradients(special, again=False), rtol=1e-4, atol=1e-3)
