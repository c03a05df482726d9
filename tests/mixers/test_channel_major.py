"""Products that write channels first equal einsums, alone, packed and compiled, and write their
gradients as their operands lie."""

import pytest
import torch
from torch import Tensor

from recallzoo.mixers._channel_major import (
    columns_by_columns,
    from_channels,
    rows_by_rows,
    to_channels,
)

B, T, D, E, RUNS = 3, 5, 4, 6, 2

FORMS = {
    "to": (to_channels, lambda w, x: torch.einsum("ed,btd->ebt", w, x), [(E, D), (B, T, D)], 1),
    "from": (from_channels, lambda z, w: torch.einsum("dbt,ed->bte", z, w), [(D, B, T), (E, D)], 0),
}
"""Function, definition, shapes of its inputs, and which of them is the large one."""


def draw(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def with_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    y = function(*inputs)
    cotangent = torch.arange(y.numel(), dtype=y.dtype).view(y.shape) / y.numel()
    return [y, *torch.autograd.grad(y, inputs, cotangent)]


@pytest.mark.parametrize("form", FORMS)
def test_linear_maps_to_and_from_channels_equal_einsums(form):
    function, einsum, shapes, large = FORMS[form]
    inputs = draw(shapes)
    got, wanted = with_gradients(function, inputs), with_gradients(einsum, inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert got[0].is_contiguous()
    assert got[1 + large].is_contiguous()


@pytest.mark.unchecked
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_pack_of_maps_is_one_product_without_copies(form, compiled):
    function, einsum, shapes, large = FORMS[form]
    inputs = draw([(RUNS, *shape) for shape in shapes])

    def mapped(*tensors):
        return torch.func.vmap(function)(*tensors)

    used = torch.compile(mapped, backend="aot_eager", fullgraph=True) if compiled else mapped
    got, wanted = with_gradients(used, inputs), with_gradients(torch.func.vmap(einsum), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    # The gradient lies as its operand, so that nothing has to be copied.
    assert got[0].is_contiguous()
    assert got[1 + large].is_contiguous()


@pytest.mark.parametrize("form", FORMS)
def test_autocast_decides_the_precision(form):
    function, einsum, shapes, _ = FORMS[form]
    inputs = draw(shapes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(*inputs)
    assert y.dtype == torch.bfloat16
    wanted = einsum(*(tensor.bfloat16().float() for tensor in inputs))
    torch.testing.assert_close(y.float(), wanted, rtol=2**-8, atol=1e-5)
    assert [g.dtype for g in torch.autograd.grad(y.sum(), inputs)] == [torch.float32] * 2


@pytest.mark.parametrize("operator", [rows_by_rows, columns_by_columns])
def test_the_operators_keep_the_rules_of_custom_operators(operator):
    torch.library.opcheck(operator, tuple(draw([(2, 3, 3), (2, 3, 3)])))
