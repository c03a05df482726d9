"""The kernel for filters of diagonal models equals the sum over powers, alone, packed and compiled.

It runs in Triton's interpreter, which needs no GPU.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from recallzoo.mixers._diagonal_taps import by_kernel, in_pytorch

pytestmark = pytest.mark.unchecked


def by_definition(
    log_radius: Tensor, angle: Tensor, real: Tensor, imag: Tensor, seq_len: int
) -> Tensor:
    """One power at a time, in float64."""
    z = torch.exp(torch.complex(log_radius.double(), angle.double()))
    w = torch.complex(real.double(), imag.double())
    taps = [(w * z**t).real.sum(-1) for t in range(seq_len)]
    return torch.stack(taps, dim=-1).float()


def with_gradients(function, inputs: list[Tensor], seq_len: int) -> list[Tensor]:
    y = function(*inputs, seq_len)
    return [y, *torch.autograd.grad((y * y).sum(), inputs)]


def draw(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    log_radius = -0.3 * torch.rand(*shape, generator=generator) - 0.01
    angle = 3 * torch.rand(*shape, generator=generator)
    weights = torch.randn(2, *shape, generator=generator)
    return [tensor.requires_grad_() for tensor in (log_radius, angle, *weights.unbind(0))]


@pytest.mark.parametrize("function", [by_kernel, in_pytorch])
@pytest.mark.parametrize(("states", "seq_len"), [(1, 1), (3, 2), (33, 40), (32, 513)])
def test_it_is_the_sum_over_powers_with_its_gradients(function, states, seq_len):
    inputs = draw(2, states)
    got = with_gradients(function, inputs, seq_len)
    wanted = with_gradients(by_definition, inputs, seq_len)
    # Angles up to 1,500 have 1e-4 of a unit left in float32, of which powers keep what has not
    # decayed; gradients are sums over up to 513 positions of products with t.
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pack_of_runs_equals_runs_alone(compiled):
    inputs = draw(3, 2, 5)

    def mapped(*tensors):
        return torch.func.vmap(by_kernel, in_dims=(0, 0, 0, 0, None))(*tensors)

    function = torch.compile(mapped, backend="aot_eager", fullgraph=True) if compiled else mapped
    got = with_gradients(function, inputs, 9)
    for run in range(3):
        alone = [tensor[run].detach().requires_grad_() for tensor in inputs]
        wanted = with_gradients(by_definition, alone, 9)
        torch.testing.assert_close([t[run] for t in got], wanted, rtol=1e-4, atol=1e-4)


def test_the_operator_keeps_the_rules_of_custom_operators():
    torch.library.opcheck(by_kernel, (*draw(2, 5), 7))
