"""Causal convolution: the ways to compute it, and what the convolutional mixers refuse."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from recallzoo.errors import InvalidConfig
from recallzoo.mixers import Context, mixer
from recallzoo.mixers._contract import HAS_TRITON
from recallzoo.mixers._convolution import (
    MAX_SHIFTS,
    MAX_TOEPLITZ,
    causal_conv,
    conv_by_shifts,
    conv_channels_by_fft,
    conv_channels_by_toeplitz,
    is_hopper,
    way_of_channels,
)
from recallzoo.mixers._fft_products import conv_channels_by_fft_products
from recallzoo.mixers._long_convolution import conv_channels_by_tiles


def positions_first(way: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, taps: way(x.movedim(-1, 0), taps).movedim(0, -1)


WAYS = {
    "shifts": conv_by_shifts,
    "toeplitz": positions_first(conv_channels_by_toeplitz),
    "fft": positions_first(conv_channels_by_fft),
}


def by_definition(x: Tensor, taps: Tensor) -> Tensor:
    """The sum over lags, in float64, one output at a time."""
    x, taps = x.double(), taps.double()
    outputs = []
    for t in range(x.shape[1]):
        y_t = torch.zeros_like(x[:, 0])
        for lag in range(min(t + 1, taps.shape[1])):
            y_t = y_t + taps[:, lag] * x[:, t - lag]
        outputs.append(y_t)
    return torch.stack(outputs, dim=1)


def draw(B: int, T: int, D: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B + 10 * T + 1000 * D + 10000 * K)
    x = torch.randn(B, T, D, generator=generator, requires_grad=True)
    taps = torch.randn(D, K, generator=generator, requires_grad=True)
    return x, taps, torch.randn(B, T, D, generator=generator)


@pytest.mark.parametrize("way", WAYS)
@given(st.data())
def test_each_way_gives_the_sum_over_lags_and_its_gradients(way, data):
    T = data.draw(st.integers(1, 40), "T")
    K = data.draw(st.integers(1, T), "K")
    x, taps, cotangent = draw(data.draw(st.integers(1, 3)), T, data.draw(st.integers(1, 3)), K)
    y, wanted = WAYS[way](x, taps), by_definition(x, taps)
    assert y.dtype == x.dtype
    gradients = torch.autograd.grad(y, (x, taps), cotangent)
    wanted_gradients = torch.autograd.grad(wanted, (x, taps), cotangent.double())
    # Up to 40 terms of size 1 in float32: rounding errors stay below 1e-5.
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("T", "K"),
    [
        (MAX_TOEPLITZ["cpu"], MAX_SHIFTS),
        (MAX_TOEPLITZ["cpu"], MAX_SHIFTS + 1),
        (MAX_TOEPLITZ["cpu"] + 1, MAX_SHIFTS),
        (MAX_TOEPLITZ["cpu"] + 1, MAX_SHIFTS + 1),
        (5, 300),
        (129, 300),
    ],
)
def test_the_choice_of_way_changes_no_value_and_taps_past_the_start_are_not_used(T, K):
    x, taps, _ = draw(1, T, 2, K)
    wanted = by_definition(x, taps).float()
    torch.testing.assert_close(causal_conv(x, taps), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("K", [3, 20, 150])
def test_each_way_packs_under_vmap(K):
    x, taps, _ = draw(2, 150 if K == 150 else 20, 3, K)
    many_x, many_taps = torch.stack([x, 2 * x]), torch.stack([taps, taps.flip(1)])
    packed = torch.func.vmap(causal_conv)(many_x, many_taps)
    single = [causal_conv(*pair) for pair in zip(many_x, many_taps, strict=True)]
    torch.testing.assert_close(packed, torch.stack(single), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["long_conv", "implicit_long_conv", "hyena"])
def test_an_input_longer_than_the_filter_is_refused(name):
    module = mixer(name).build(4, 8)
    with pytest.raises(InvalidConfig, match="8 tokens and was given 9"):
        module(torch.zeros(1, 9, 4), Context())
    with pytest.raises(InvalidConfig, match="8 tokens and was given 9"):
        module.scan(torch.zeros(1, 9, 4), Context())


def test_a_shorter_input_is_filtered_by_the_same_first_taps():
    for name in ("long_conv", "implicit_long_conv", "base_conv", "h3", "hyena"):
        module = mixer(name).build(4, 24)
        x = torch.randn(2, 24, 4)
        torch.testing.assert_close(module(x[:, :7], Context()), module(x, Context())[:, :7])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("short_conv", {"kernel_size": 0}, "short_conv.kernel_size=0 must be at least 1"),
        ("base_conv", {"kernel_size": 0}, "kernel_size=0 must be at least 1, or -1"),
        ("base_conv", {"implicit": False}, "implicit=False would be ignored with kernel_size=3"),
        ("implicit_long_conv", {"num_features": 4}, "num_features=4 must be odd"),
        ("hyena", {"num_features": 1}, "num_features=1 must be odd and at least 3"),
        ("hyena", {"modulate": False, "modulation_shift": 0.1}, "would be ignored with modulate"),
        ("hyena", {"filter_learning_rate": 0.0}, "filter_learning_rate=0.0 must be above 0"),
        ("hyena", {"dropout": 1.0}, "dropout=1.0 must be in"),
        ("h3", {"d_state": 5}, "d_state=5 must be even"),
        ("h3", {"head_dim": 3}, "head_dim=3 does not divide d_model=4"),
        ("h3", {"dt_min": 0.2}, "dt_min=0.2 and h3.dt_max=0.1 must be positive and in this order"),
    ],
)
def test_options_that_cannot_work_are_refused(name, options, message):
    with pytest.raises(InvalidConfig, match=message):
        mixer(name, **options).build(4, 8)


def test_weight_decay_and_learning_rates_are_those_of_the_papers():
    h3 = mixer("h3").build(4, 8).parameter_rules()
    assert {name for name, rule in h3.items() if not rule.decay} == {
        "shift_b",
        "log_dt",
        "a_log_decay",
        "a_frequency",
        "b",
    }
    hyena = mixer("hyena", position_learning_rate=None).build(4, 8).parameter_rules()
    assert not any(rule.decay for rule in hyena.values())
    assert hyena["filter.last.weight"].learning_rate == 1e-3
    assert hyena["filter.positions"].learning_rate is None
    assert "in_proj.weight" not in hyena


def test_h3_starts_as_its_paper_says():
    module = mixer("h3", d_state=8, head_dim=2).build(8, 16)
    parameters = dict(module.named_parameters())
    a = -parameters["a_log_decay"].exp()
    torch.testing.assert_close(a, torch.full((4, 4), -0.5))
    torch.testing.assert_close(parameters["a_frequency"][0], torch.pi * torch.arange(4.0))
    step = parameters["log_dt"].exp()
    assert ((step >= 0.001) & (step <= 0.1)).all()


@pytest.mark.parametrize("discretization", ["bilinear", "zoh"])
def test_h3_filters_with_the_discretized_state_space_model(discretization):
    """Against complex matrices: both state-space models run by their own equations."""
    D, N, T, dtype = 4, 6, 19, torch.complex128
    module = mixer("h3", d_state=N, discretization=discretization).build(D, T)
    w = {name: p.detach().double() for name, p in module.named_parameters()}
    a = torch.complex(-w["a_log_decay"].exp(), w["a_frequency"])
    b, c = torch.view_as_complex(w["b"]), torch.view_as_complex(w["c"])
    dt = w["log_dt"].exp()[:, None]
    if discretization == "bilinear":
        A, B = (1 + dt * a / 2) / (1 - dt * a / 2), dt * b / (1 - dt * a / 2)
    else:
        A, B = (dt * a).exp(), b * ((dt * a).exp() - 1) / a
    shift = torch.diag(torch.ones(N - 1, dtype=torch.float64), -1)

    x = torch.randn(2, T, D)
    q, k, v = (
        x.double() @ w[f"{name}_proj.weight"].T + w[f"{name}_proj.bias"] for name in ("q", "k", "v")
    )
    past = torch.zeros(2, D, N, dtype=torch.float64)
    state = torch.zeros(2, D, N // 2, dtype=dtype)
    outputs = []
    for t in range(T):
        past = past @ shift.T + w["shift_b"] * k[:, t, :, None]
        key = (w["shift_c"] * past).sum(-1) + w["shift_d"] * k[:, t]
        product = key * v[:, t]
        state = A * state + B * product[..., None]
        outputs.append(q[:, t] * (2 * (c * state).sum(-1).real + w["d"] * product))
    wanted = torch.stack(outputs, dim=1) @ w["output.weight"].T + w["output.bias"]
    torch.testing.assert_close(module(x, Context()).double(), wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(module.scan(x, Context()).double(), wanted, rtol=0, atol=2e-5)


HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is missing")
@pytest.mark.parametrize(
    ("gpu", "seq_len", "num_taps", "way"),
    [
        (HOPPER, 1024, 1024, conv_channels_by_tiles),
        (HOPPER, 1500, 1500, conv_channels_by_tiles),
        (HOPPER, 2048, 2048, conv_channels_by_fft_products),
        (HOPPER, 2048, 64, conv_channels_by_tiles),
        (HOPPER, 2300, 2300, conv_channels_by_tiles),
        (HOPPER, 4096, 4096, conv_channels_by_fft_products),
        (HOPPER, 16_384, 64, conv_channels_by_tiles),
        (HOPPER, 65_536, 64, conv_channels_by_tiles),
        (HOPPER, 65_536, 65_536, conv_channels_by_fft_products),
        (HOPPER, 131_072, 131_072, conv_channels_by_fft),
        (AMPERE, 2048, 2048, conv_channels_by_tiles),
        (AMPERE, 4096, 4096, conv_channels_by_tiles),
        (AMPERE, 16_384, 64, conv_channels_by_tiles),
        (AMPERE, 16_384, 16_384, conv_channels_by_fft),
    ],
)
def test_on_a_gpu_in_16_bits_the_way_depends_on_its_kind_length_and_taps(
    gpu, seq_len, num_taps, way, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    with FakeTensorMode():  # as nothing is computed, no GPU is needed
        x = torch.empty(1, 1, seq_len, device="cuda", dtype=torch.bfloat16)
        assert way_of_channels(x, seq_len, num_taps) is way


def test_an_amd_gpu_is_no_hopper_whatever_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert is_hopper(1)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not is_hopper(1)


def test_asking_for_the_kind_of_gpu_does_not_cut_a_compiled_program(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)

    def shifted(x: Tensor) -> Tensor:
        return x + 1 if is_hopper(0) else x - 1

    compiled = torch.compile(shifted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.zeros(2)), torch.ones(2))
