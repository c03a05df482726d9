"""The wkv kernel equals the form in PyTorch, alone, packed and compiled.

The kernel runs in Triton's interpreter, which needs no GPU.
"""

import pytest
import torch

from recallzoo.mixers.rwkv4 import weighted_mean

pytest.importorskip("triton", reason="Triton is not installed")
from recallzoo.mixers._wkv4 import wkv4

N, T, D = 2, 18, 5
RUNS = 3


def inputs(seed: int, spread: float = 1.0, runs: tuple[int, ...] = ()):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*runs, *shape, generator=generator)

    tensors = [spread * draw(N, T, D), draw(N, T, D), draw(1, D).exp(), draw(1, D)]
    return [tensor.requires_grad_() for tensor in tensors], draw(N, T, D)


def reference(k, v, decay, first):
    return weighted_mean(k, v, decay[0], first[0])


def with_gradients(function, tensors, cotangent):
    y = function(*tensors)
    return y.detach(), *torch.autograd.grad(y, tensors, cotangent)


@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_the_kernel_equals_the_form_in_pytorch(spread):
    tensors, cotangent = inputs(0, spread)
    got = with_gradients(wkv4, tensors, cotangent)
    wanted = with_gradients(reference, tensors, cotangent)
    for value, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pack_of_runs_equals_runs_alone(compiled):
    tensors, cotangent = inputs(1, runs=(RUNS,))

    def mapped(*inputs):
        return torch.func.vmap(wkv4)(*inputs)

    function = torch.compile(mapped, backend="aot_eager", fullgraph=True) if compiled else mapped
    got = with_gradients(function, tensors, cotangent)
    for run in range(RUNS):
        alone = [tensor[run].detach().requires_grad_() for tensor in tensors]
        wanted = with_gradients(reference, alone, cotangent[run])
        for value, exact in zip(got, wanted, strict=True):
            torch.testing.assert_close(value[run], exact, rtol=1e-4, atol=1e-5)


def test_weights_that_all_runs_share_are_mapped_too():
    (k, v, decay, first), _ = inputs(2, runs=(RUNS,))
    got = torch.func.vmap(wkv4, in_dims=(0, 0, None, None))(k, v, decay[0], first[0])
    for run in range(RUNS):
        wanted = reference(k[run], v[run], decay[0], first[0])
        torch.testing.assert_close(got[run], wanted, rtol=1e-4, atol=1e-5)


def test_the_operator_keeps_the_rules_of_custom_operators():
    tensors, _ = inputs(3)
    torch.library.opcheck(torch.ops.recallzoo.wkv4.default, tuple(tensors))
