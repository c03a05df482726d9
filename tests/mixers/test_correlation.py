"""The kernel for correlations of rows equals the sum over products, alone, packed and compiled.

It runs in Triton's interpreter, which needs no GPU.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from recallzoo.mixers._correlation import by_kernel, in_pytorch

pytestmark = pytest.mark.unchecked


def by_definition(b: Tensor, c: Tensor) -> Tensor:
    """One output at a time."""
    N = b.shape[-1]
    return torch.stack([(b[:, : N - n] * c[:, n:]).sum(-1) for n in range(N)], dim=-1)


def with_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    y = function(*inputs)
    return [y, *torch.autograd.grad((y * y).sum(), inputs)]


def draw(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("function", [by_kernel, in_pytorch])
@pytest.mark.parametrize("length", [1, 2, 7, 130])
def test_it_is_the_sum_over_shifted_products_with_its_gradients(function, length):
    inputs = draw(2, length)
    got, wanted = with_gradients(function, inputs), with_gradients(by_definition, inputs)
    # Up to 130 products of size 1, and gradients of up to 130 sums of them, in float32.
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pack_of_runs_equals_runs_alone(compiled):
    inputs = draw(3, 2, 9)

    def mapped(*tensors):
        return torch.func.vmap(by_kernel)(*tensors)

    function = torch.compile(mapped, backend="aot_eager", fullgraph=True) if compiled else mapped
    got = with_gradients(function, inputs)
    for run in range(3):
        alone = [tensor[run].detach().requires_grad_() for tensor in inputs]
        torch.testing.assert_close([t[run] for t in got], with_gradients(by_definition, alone))


def test_the_operator_keeps_the_rules_of_custom_operators():
    torch.library.opcheck(by_kernel, tuple(draw(2, 5)))
