"""Selecting positions of what lies channels first equals indexing: alone, packed and compiled.

The kernels run in Triton's interpreter, which needs no GPU.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from recallzoo.mixers._select_channels import _select, by_kernel, select_from_channels

# Checks wrap every function, and in Triton's interpreter a wrapped kernel does not find another.
pytestmark = pytest.mark.unchecked

RUNS = 2


def draw(
    D: int, B: int, T: int, Q: int, *runs: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T)
    z = torch.randn(*runs, D, B, T, generator=generator).to(dtype).requires_grad_()
    return z, torch.randint(T, (*runs, B, Q), generator=generator)


def indexed(z: Tensor, positions: Tensor) -> Tensor:
    return torch.stack([z[:, b, positions[b]].T for b in range(z.shape[1])])


def with_gradient(function, z: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    y = function(z, positions)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, z, cotangent)[0]


# Tiles have 32 channels, 64 positions and 16 to 64 queries.
@pytest.mark.parametrize("select", [by_kernel, select_from_channels])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (33, 2, 65, 17), (32, 3, 64, 16), (5, 1, 130, 70), (40, 2, 7, 3)]
)
def test_positions_are_selected_as_by_index(select, sizes):
    inputs = draw(*sizes)
    (y, d_z), (wanted, d_wanted) = (with_gradient(f, *inputs) for f in (select, indexed))
    assert torch.equal(y, wanted)
    # A position that is asked for several times has a sum for its gradient.
    torch.testing.assert_close(d_z, d_wanted, rtol=1e-6, atol=1e-6)


def test_in_half_precision_values_are_moved_as_they_are():
    inputs = draw(8, 2, 20, 5, dtype=torch.float16)  # the interpreter has no bfloat16 products
    y, d_z = with_gradient(by_kernel, *inputs)
    assert torch.equal(y, indexed(*inputs))
    assert d_z.dtype == torch.float16


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pack_of_runs_equals_runs_alone(compiled):
    z, positions = draw(6, 2, 9, 4, RUNS)
    packed = torch.func.vmap(by_kernel)
    if compiled:
        packed = torch.compile(packed, backend="aot_eager", fullgraph=True, dynamic=False)
    y, d_z = with_gradient(packed, z, positions)
    wanted, d_wanted = with_gradient(
        lambda z, at: torch.stack([indexed(*own) for own in zip(z, at, strict=True)]), z, positions
    )
    assert torch.equal(y, wanted)
    torch.testing.assert_close(d_z, d_wanted, rtol=1e-6, atol=1e-6)


def test_the_operator_keeps_the_rules_of_custom_operators():
    z, positions = draw(3, 2, 5, 2, 1)
    torch.library.opcheck(_select, (z, positions))
