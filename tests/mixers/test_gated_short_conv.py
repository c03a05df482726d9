"""Short filters and the first gate of Hyena: the kernel equals the form in PyTorch, alone, packed
and compiled; and products that write channels first equal einsums.

The kernel runs in Triton's interpreter, which needs no GPU.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from recallzoo.mixers._gated_short_conv import _operator, by_kernel, in_pytorch

pytestmark = pytest.mark.unchecked
RUNS = 3
SIZES = [
    *((1, 1, 1, 1), (1, 2, 4, 4), (5, 3, 2, 2), (1, 65, 2, 3), (5, 65, 5, 3), (9, 130, 1, 4)),
    *((3, 4, 2, 4), (7, 12, 3, 3), (40, 64, 2, 3), (1, 1100, 1, 4), (2, 8, 2, 7)),
]
"""Batch, time, width, taps: shorter than the filter, more positions than a program takes, and times
that are multiples of 1, 2 and 4, which threads take at once."""


def draw(B: int, T: int, D: int, K: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = [normal(3 * D, B, T), normal(3 * D), normal(3 * D, K) / K**0.5, normal(3 * D)]
    return inputs, [normal(D, B, T), normal(D, B, T)]


def with_gradients(function, inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*inputs)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, cotangents)]


def assert_close(got: list[Tensor], wanted: list[Tensor], relative: float) -> None:
    """To a tolerance relative to the largest number of each tensor."""
    for one, other in zip(got, wanted, strict=True):
        tolerance = relative * (float(other.abs().max()) + 1.0)
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("B", "T", "D", "K"), SIZES)
def test_the_kernel_equals_the_form_in_pytorch(B, T, D, K):
    inputs, cotangents = draw(B, T, D, K)
    wanted = with_gradients(
        in_pytorch, [t.double() for t in inputs], [c.double() for c in cotangents]
    )
    # Sums of up to 2600 products in float32, against float64.
    assert_close(with_gradients(by_kernel, inputs, cotangents), wanted, 1e-5)
    assert_close(with_gradients(in_pytorch, inputs, cotangents), wanted, 1e-5)


@pytest.mark.parametrize("T", [65, 72])
@pytest.mark.parametrize("function", [by_kernel, in_pytorch])
def test_bfloat16_inputs_are_rounded_once_and_summed_in_float32(function, T):
    inputs, cotangents = draw(2, T, 3, 3)
    low = [t.bfloat16() for t in (inputs[0], *cotangents)]
    got = with_gradients(function, [low[0], *inputs[1:]], low[1:])
    exact = [t.double() for t in low]
    wanted = with_gradients(in_pytorch, [exact[0], *(t.double() for t in inputs[1:])], exact[1:])
    assert [t.dtype for t in got] == [torch.bfloat16] * 3 + [torch.float32] * 3
    # bfloat16 keeps 8 bits: results are off by 2 ** -8 of their size, and by 2 ** -7 where bits are
    # cut off, as Triton's interpreter does.
    for one, other in zip(got[:3], wanted[:3], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2**-7, atol=1e-5)
    # PyTorch rounds intermediate gradients where it changes dtype, the kernel none.
    assert_close(got[3:], wanted[3:], 1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pack_of_runs_equals_runs_alone(compiled):
    drawn = [draw(2, 65, 2, 3, seed) for seed in range(RUNS)]
    inputs = [torch.stack(t) for t in zip(*(inputs for inputs, _ in drawn), strict=True)]
    cotangents = [torch.stack(t) for t in zip(*(given for _, given in drawn), strict=True)]

    def mapped(*tensors):
        return torch.func.vmap(by_kernel)(*tensors)

    function = torch.compile(mapped, backend="aot_eager", fullgraph=True) if compiled else mapped
    got = with_gradients(function, inputs, cotangents)
    for run, (alone, given) in enumerate(drawn):
        assert_close([t[run] for t in got], with_gradients(in_pytorch, alone, given), 1e-5)


def test_weights_that_all_runs_share_are_mapped_too():
    (p, *weights), _ = draw(2, 7, 2, 3)
    both = torch.stack([p, -p])
    got = torch.func.vmap(by_kernel, in_dims=(0, None, None, None))(both, *weights)
    for run in range(2):
        assert_close([t[run] for t in got], list(in_pytorch(both[run], *weights)), 1e-6)


def test_the_operator_keeps_the_rules_of_custom_operators():
    inputs, _ = draw(2, 5, 2, 3)
    torch.library.opcheck(_operator, tuple(t[None].requires_grad_() for t in inputs))
