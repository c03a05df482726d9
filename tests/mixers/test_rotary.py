"""Rotary positions: a rotation of pairs, and tables that are equal however they are made."""

import functools

import pytest
import torch

from recallzoo.mixers import _rotary
from recallzoo.mixers._rotary import by_operator, rotate, written_out

# Compiled code, which cannot be checked.
pytestmark = pytest.mark.unchecked

HALF, BASE = 3, 100.0
RUNS, B, H, T, K = 2, 4, 3, 5, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_positions(*shape: int) -> torch.Tensor:
    return torch.randint(2000, shape, generator=torch.Generator().manual_seed(0))


def require_same(got, wanted) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def with_gradient(function, x, *inputs):
    y = function(x, *inputs)
    return y, *torch.autograd.grad(y, x, draw(*y.shape, seed=1))


@pytest.fixture
def operator_everywhere(monkeypatch):
    """`rotate` as it is on CUDA."""
    monkeypatch.setattr(_rotary, "rotary_tables", by_operator)


@pytest.mark.parametrize("rotary_dim", [0, 6, K])
def test_pairs_are_turned_as_complex_numbers_and_the_rest_passes(rotary_dim):
    x, position, half = draw(B, T, K), torch.arange(T), rotary_dim // 2
    frequency = BASE ** (-torch.arange(half, dtype=torch.float64) / max(half, 1))
    turn = torch.exp(1j * position[:, None] * frequency)
    turned = torch.complex(x[..., :half].double(), x[..., half:rotary_dim].double()) * turn
    wanted = torch.cat([turned.real, turned.imag, x[..., rotary_dim:].double()], dim=-1)
    # Angles of up to 4 and values of up to 4 in float32.
    torch.testing.assert_close(
        rotate(x, position, rotary_dim, BASE).double(), wanted, rtol=0, atol=4e-6
    )


@pytest.mark.parametrize("shape", [(), (1,), (T,), (B, 1, T)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_operator_makes_the_same_tables(shape, dtype):
    position = draw_positions(*shape).to(dtype)
    got = by_operator(position, HALF, BASE)
    require_same(got, written_out(position, HALF, BASE))
    assert [(t.shape, t.dtype) for t in got] == [((*shape, HALF), torch.float32)] * 2


@pytest.mark.parametrize(
    "position",
    [
        torch.arange(T),
        draw_positions(B, T).T,
        draw_positions(B, T).permute(1, 0)[:, None],
        torch.arange(T).expand(B, 1, T),
        draw_positions(B, 2 * T)[:, ::2],
    ],
    ids=["range", "transposed", "permuted", "expanded", "strided"],
)
def test_the_operator_is_what_it_tells_the_compiler(position):
    torch.library.opcheck(by_operator, (position, HALF, BASE))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
def test_positions_are_mapped_along_any_axis(in_dim, compiled):
    position = draw_positions(B, 3, T)

    def tables(make):
        table = functools.partial(make, half=HALF, base=BASE)
        return torch.func.vmap(table, in_dims=in_dim)

    mapped = tables(by_operator)
    if compiled:
        mapped = torch.compile(mapped, backend="aot_eager", fullgraph=True)
    require_same(mapped(position), tables(written_out)(position))


def test_positions_are_mapped_along_two_axes():
    position = draw_positions(B, 3, T)

    def tables(make):
        table = functools.partial(make, half=HALF, base=BASE)
        return torch.func.vmap(torch.func.vmap(table, in_dims=1), in_dims=0)(position)

    require_same(tables(by_operator), tables(written_out))


ROTATIONS = {
    "all at the same positions": (torch.arange(T), None),
    "each run at its own": (draw_positions(RUNS, B, 1, T), 0),
    "runs last": (draw_positions(B, 1, T, RUNS), -1),
}


@pytest.mark.parametrize("rotary_dim", [6, K])
@pytest.mark.parametrize(("position", "in_dim"), ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_runs_rotate_the_same_with_the_operator(
    position, in_dim, rotary_dim, compiled, monkeypatch
):
    x = draw(RUNS, B, H, T, K).requires_grad_()

    def packed(x, position):
        one = functools.partial(rotate, rotary_dim=rotary_dim, base=BASE)
        return torch.func.vmap(one, in_dims=(0, in_dim))(x, position)

    wanted = with_gradient(packed, x, position)
    monkeypatch.setattr(_rotary, "rotary_tables", by_operator)
    function = torch.compile(packed, backend="aot_eager", fullgraph=True) if compiled else packed
    require_same(with_gradient(function, x, position), wanted)


@pytest.mark.usefixtures("operator_everywhere")
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd])
def test_gradients_of_functions_pass_the_operator(transform):
    x, position = draw(T, K), torch.arange(T)

    def energy(x):
        return (rotate(x, position, K, BASE) ** 2).sum()

    # A rotation keeps lengths, to float32's rounding.
    torch.testing.assert_close(transform(energy)(x), 2 * x, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("operator_everywhere")
def test_tables_are_made_once_for_each_call_and_not_again_backward(monkeypatch):
    calls = []
    x, position = draw(B, H, T, K).requires_grad_(), torch.arange(T)

    def counted(*inputs, **options):
        calls.append(tuple(inputs[0].shape))
        return written_out(*inputs, **options)

    function = torch.compile(
        functools.partial(rotate, rotary_dim=K), backend="aot_eager", fullgraph=True
    )
    with_gradient(function, x, position)
    monkeypatch.setattr(_rotary, "written_out", counted)
    with_gradient(function, x, position)
    assert calls == [(T,)]
