"""Rows moved to other places are those of `gather`, gradients included, and cost what they hold."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recallzoo.mixers import Context, mixer
from recallzoo.mixers._distinct_rows import distinct_rows

RUNS = 3


def inputs(num_rows: int, *outer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x of 9 rows, and `num_rows` of them in any order, and a gradient."""
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(*outer, 2, 9, 4, generator=generator).requires_grad_()
    order = torch.rand(*outer, 2, 9, generator=generator).argsort(-1)[..., :num_rows]
    return x, order, torch.randn(*outer, 2, num_rows, 4, generator=generator)


def gathered(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return torch.gather(x, -2, positions[..., None].expand(*positions.shape, x.shape[-1]))


def with_gradient(function, x, positions, dy):
    y = function(x, positions)
    return y, torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("num_rows", [1, 5, 9])
def test_rows_and_their_gradient_are_those_of_gather(num_rows):
    x, positions, dy = inputs(num_rows)
    got = with_gradient(distinct_rows, x, positions, dy)
    for one, wanted in zip(got, with_gradient(gathered, x, positions, dy), strict=True):
        assert torch.equal(one, wanted)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.unchecked)])
@pytest.mark.parametrize("shared", [False, True])
def test_packed_runs_move_rows_of_their_own(shared, compiled):
    x, positions, dy = inputs(5, RUNS)
    if shared:
        positions = positions[0]
    mapped = torch.vmap(distinct_rows, in_dims=(0, None if shared else 0))
    if compiled:
        mapped = torch.compile(mapped, backend="aot_eager", fullgraph=True)
    wanted = with_gradient(gathered, x, positions.expand(RUNS, -1, -1), dy)
    for one, other in zip(with_gradient(mapped, x, positions, dy), wanted, strict=True):
        assert torch.equal(one, other)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lookup_attention", {}),
        ("lookup_attention", {"match": "hash", "num_heads": 2}),
        ("shift_conv", {}),
        ("selective_attention", {"selector": "repeated"}),
        ("selective_attention", {"selector": "learned", "num_rows": 512}),
    ],
)
def test_moving_rows_as_on_a_gpu_holds_nothing_of_the_square_of_the_length(
    name, options, monkeypatch
):
    seq_len, width = 2048, 8
    module = mixer(name, **options).build(width, seq_len).bfloat16()
    x = torch.randn(1, seq_len, width).bfloat16().requires_grad_()
    tokens = torch.randint(1000, (1, seq_len), generator=torch.Generator().manual_seed(0))
    # What tells a GPU apart where rows are moved; its attention is left as it is here.
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr("recallzoo.mixers._selective.attend_rows", lambda q, *_, **__: q)
    monkeypatch.setattr("recallzoo.mixers._selective.can_flex", lambda *_: True)
    monkeypatch.setattr("recallzoo.mixers._selective.can_look", lambda _: False)
    with Largest() as largest:
        module(x, Context(tokens=tokens)).float().sum().backward()
    assert largest.num_elements < seq_len * seq_len / 8
