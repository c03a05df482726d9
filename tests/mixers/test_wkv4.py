"""RWKV-4's kernels equal the forms in PyTorch: alone, packed and compiled, with every gradient.

The kernels run in Triton's interpreter, which needs no GPU.
"""

import functools

import pytest
import torch

from recallzoo.mixers import Context, mixer
from recallzoo.mixers import rwkv4 as rwkv4_module
from recallzoo.mixers import rwkv4_channel as rwkv4_channel_module
from recallzoo.mixers.rwkv4 import weighted_mean

pytest.importorskip("triton", reason="Triton is not installed")
from recallzoo.mixers._token_shift import token_shift_mix, token_shift_pair
from recallzoo.mixers._wkv4 import wkv4

# Checks wrap every function, and in Triton's interpreter a wrapped kernel does not find another.
pytestmark = pytest.mark.unchecked

RUNS = 3


def leaves(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def with_gradients(function, tensors, seed: int = 9):
    """Outputs, in one tensor, and the gradients of a random mixture of them."""
    y = function(*tensors)
    y = y if isinstance(y, torch.Tensor) else torch.stack(y)
    (cotangent,) = leaves(seed, tuple(y.shape))
    # Rounded, so that it is the same number whatever the precision of y.
    gradients = torch.autograd.grad(y, tensors, cotangent.detach().bfloat16().to(y.dtype))
    return [y.detach(), *gradients]


def assert_all_close(got, wanted, **tolerance) -> None:
    for value, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, exact.to(value.dtype), **tolerance)


def mean(projected, decay, first):
    """What `wkv4` is, in PyTorch and float32."""
    k, v, *r = projected.float()
    wkv = weighted_mean(k, v, decay, first)
    return torch.sigmoid(r[0]) * wkv if r else wkv


def wkv_inputs(
    seed: int,
    seq_len: int,
    width: int,
    number: int = 1,
    runs: tuple[int, ...] = (),
    parts: int = 3,
):
    shapes = (*runs, parts, number, seq_len, width), (*runs, width), (*runs, width)
    projected, decay, first = leaves(seed, *shapes)
    return [projected, decay.detach().exp().requires_grad_(), first]


def mixtures(x, mix):
    """What the token shifts are, in PyTorch and float32."""
    x = x.float()
    before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
    return before + (x - before) * mix[:, None, None]


SHIFTS = {3: token_shift_mix, 2: token_shift_pair}
# Chunks and tiles are of 16 positions, blocks of 32 and 64 channels.
LENGTHS_AND_WIDTHS = [(1, 48), (2, 16), (15, 16), (16, 16), (17, 48), (65, 16)]


@pytest.mark.parametrize("parts", [3, 2])
@pytest.mark.parametrize(("seq_len", "width"), LENGTHS_AND_WIDTHS)
def test_the_mean_gated_or_not_equals_the_form_in_pytorch(seq_len, width, parts):
    tensors = wkv_inputs(0, seq_len, width, parts=parts)
    # float32 sums of up to 65 terms, in another order.
    assert_all_close(
        with_gradients(wkv4, tensors),
        with_gradients(mean, tensors),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_mean_holds_however_far_keys_and_receptances_lie_apart():
    projected, decay, first = wkv_inputs(1, 33, 5)
    tensors = [(60 * projected).detach().requires_grad_(), decay, first]
    # Exponents near 200 are rounded to 1e-5 and so are the weights; decay's gradient sums them.
    assert_all_close(
        with_gradients(wkv4, tensors),
        with_gradients(mean, tensors),
        rtol=1e-3,
        atol=1e-4,
    )


def test_gradients_go_back_through_a_late_key_that_outweighs_all_others():
    projected, decay, first = wkv_inputs(2, 40, 4)
    with torch.no_grad():
        projected[0, :, 30] = 500.0
        projected[0, :, 5] = -500.0
        decay[0] = 20.0
    tensors = [projected, decay, first]
    assert_all_close(
        with_gradients(wkv4, tensors),
        with_gradients(mean, tensors),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("num_mixtures", SHIFTS)
@pytest.mark.parametrize(("seq_len", "width"), [*LENGTHS_AND_WIDTHS, (150, 80)])
def test_token_shifts_equal_the_form_in_pytorch(seq_len, width, num_mixtures):
    tensors = leaves(3, (2, seq_len, width), (num_mixtures, width))
    # float32 sums of up to 300 terms, in another order.
    assert_all_close(
        with_gradients(SHIFTS[num_mixtures], tensors),
        with_gradients(mixtures, tensors),
        rtol=1e-4,
        atol=3e-5,
    )


@pytest.mark.parametrize("operator", ["wkv4", "token_shift_mix", "token_shift_pair"])
def test_in_bfloat16_only_what_is_stored_is_rounded(operator):
    if operator == "wkv4":
        first, *rest = wkv_inputs(4, 17, 16)
        function, reference = wkv4, mean
    else:
        first, *rest = leaves(4, (2, 17, 16), (3 if operator == "token_shift_mix" else 2, 16))
        function, reference = SHIFTS[len(rest[0])], mixtures
    first = first.detach().bfloat16().requires_grad_()
    got = with_gradients(function, [first, *rest])
    wanted = with_gradients(reference, [first, *rest])
    assert [part.dtype for part in got] == [torch.bfloat16] * 2 + [torch.float32] * len(rest)
    # bfloat16 keeps 8 bits; a sum that ends near two of its numbers may be rounded to either.
    assert_all_close(got[:2], wanted[:2], rtol=2**-7, atol=1e-5)
    assert_all_close(got[2:], wanted[2:], rtol=1e-4, atol=3e-5)


def test_under_autocast_token_shifts_come_in_the_dtype_of_products():
    x, mix = leaves(5, (1, 3, 4), (2, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair = token_shift_pair(x, mix)
    assert [y.dtype for y in pair] == [torch.bfloat16] * 2
    assert [y.dtype for y in token_shift_pair(x, mix)] == [torch.float32] * 2


@pytest.mark.parametrize("runs", [1, RUNS])
@pytest.mark.parametrize("operator", ["wkv4", "ungated", "token_shift_mix", "token_shift_pair"])
def test_a_pack_of_runs_equals_runs_alone(operator, runs):
    if operator in ("wkv4", "ungated"):
        parts = 3 if operator == "wkv4" else 2
        tensors = wkv_inputs(6, 3, 5, number=2, runs=(runs,), parts=parts)
        function, reference = wkv4, mean
    else:
        num_mixtures = 3 if operator == "token_shift_mix" else 2
        tensors = leaves(6, (runs, 2, 3, 5), (runs, num_mixtures, 5))
        function, reference = SHIFTS[num_mixtures], mixtures
    packed = torch.func.vmap(function)
    got = with_gradients(packed, tensors)
    wanted = with_gradients(
        lambda *all_runs: torch.stack(
            [reference(*own) for own in zip(*all_runs, strict=True)],
            dim=1 if operator == "token_shift_pair" else 0,
        ),
        tensors,
    )
    assert_all_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_what_all_runs_share_is_mapped_too():
    projected, decay, first = wkv_inputs(7, 3, 5, number=2, runs=(RUNS,))
    got = torch.func.vmap(wkv4, in_dims=(0, None, None))(projected, decay[0], first[0])
    x, mix = leaves(7, (2, 3, 5), (RUNS, 3, 5))
    mixed = torch.func.vmap(token_shift_mix, in_dims=(None, 0))(x, mix)
    for run in range(RUNS):
        wanted = mean(projected[run], decay[0], first[0])
        torch.testing.assert_close(got[run], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed[run], mixtures(x, mix[run]), rtol=1e-4, atol=1e-5)


MIXERS = {"rwkv4": rwkv4_module, "rwkv4_channel": rwkv4_channel_module}


def modules(name: str, number: int) -> list[torch.nn.Module]:
    """Mixers with weights large enough to matter."""
    built = []
    for seed in range(number):
        torch.manual_seed(seed)
        module = mixer(name, layer_index=1, num_layers=3).build(6, 5)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        built.append(module)
    return built


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXERS)
def test_a_compiled_pack_of_mixers_with_kernels_equals_mixers_without(name, precision, monkeypatch):
    built = modules(name, 2)
    stacked = {
        key: torch.stack([dict(m.named_parameters())[key].detach() for m in built])
        for key, _ in built[0].named_parameters()
    }
    (x,) = leaves(8, (2, 2, 5, 6))
    x = x.detach().to(precision).requires_grad_()
    tensors = [x, *(value.requires_grad_() for value in stacked.values())]

    def of_run(x, *parameters):
        named = dict(zip(stacked, parameters, strict=True))
        return torch.func.functional_call(built[0], named, (x, Context()))

    def packed(*tensors):
        enabled = precision != torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return torch.func.vmap(of_run)(*tensors)

    wanted = with_gradients(packed, tensors)
    monkeypatch.setattr(MIXERS[name], "has_kernels", lambda x: True)
    compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True)
    got = with_gradients(compiled(packed, backend="aot_eager"), tensors)
    if precision == torch.float32:
        assert_all_close(got, wanted, rtol=1e-4, atol=1e-4)
    else:
        # Either form rounds to 8 bits after each of four products, and here they add up to 30.
        for value, exact in zip(got, wanted, strict=True):
            error = (value.float() - exact.float()).norm() / exact.float().norm()
            assert error < 0.03


@pytest.mark.parametrize("operator", ["wkv4", "token_shift_mix", "token_shift_pair"])
def test_operators_keep_the_rules_of_custom_operators(operator):
    checked = getattr(torch.ops.recallzoo, operator).default
    if operator == "wkv4":
        inputs = [tensor[None].detach().requires_grad_() for tensor in wkv_inputs(8, 2, 3)]
    else:
        x, mix = leaves(8, (2, 2, 3), (1, 3 if operator == "token_shift_mix" else 2, 3))
        inputs = [x, mix, torch.float32]
    torch.library.opcheck(checked, tuple(inputs))
