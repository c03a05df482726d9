"""Attention's long and windowed forms agree with the plain one, at the cost they state."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recallzoo.errors import InvalidConfig
from recallzoo.mixers import Context, mixer, state_size
from recallzoo.mixers import _softmax as softmax


def masked(q, k, v, window):
    """The definition: all scores, those outside of the window at minus infinity."""
    seq_len = q.shape[-2]
    lag = torch.arange(seq_len)[:, None] - torch.arange(seq_len)
    outside = (lag < 0) | (lag >= (window or seq_len))
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(outside, -torch.inf)
    return torch.softmax(scores, -1) @ v


@pytest.mark.parametrize(
    ("seq_len", "window"),
    [(512, None), (513, None), (129, 64), (200, 3), (512, 64), (515, 65), (600, 1), (600, 400)],
)
def test_every_form_is_masked_softmax(seq_len, window):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, seq_len, 8).unbind()
    q.requires_grad_()
    got = softmax.attend(q, k, v, Context(), window=window)
    wanted = masked(q, k, v, window)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)
    weights = torch.randn_like(got)
    gradients = [torch.autograd.grad((y * weights).sum(), q)[0] for y in (got, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=2e-6)


def test_a_window_beyond_the_plain_limit_is_masked_softmax():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 1500, 4).unbind()
    got = softmax.attend(q, k, v, Context(), window=600)
    torch.testing.assert_close(got, masked(q, k, v, 600), rtol=0, atol=2e-6)


def test_the_work_of_a_window_grows_with_the_length_not_with_its_square():
    def operations(seq_len: int) -> int:
        module = mixer("sliding_window", window=32).build(16, seq_len)
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(1, seq_len, 16), Context())
        return counter.get_total_flops()

    assert operations(4096) == 2 * operations(2048)


def test_a_window_larger_than_the_sequence_is_attention():
    torch.manual_seed(0)
    windowed = mixer("sliding_window", window=100).build(16, 40)
    full = mixer("attention").build(16, 40)
    full.load_state_dict(windowed.state_dict())
    x = torch.randn(2, 40, 16)
    assert torch.equal(windowed(x, Context()), full(x, Context()))


def test_the_cache_of_a_window_stops_growing():
    module = mixer("sliding_window", window=5).build(16, 40)
    assert [state_size(module, n)["kv"] for n in (1, 4, 5, 6, 20)] == [32, 128, 160, 160, 160]


@pytest.mark.parametrize("name", ["attention", "sliding_window"])
def test_step_equals_forward_where_the_fused_operator_is_used(name):
    torch.manual_seed(0)
    module = mixer(name, num_heads=2, positions="rotary").build(16, 530).eval()
    x = torch.randn(1, 530, 16)
    with torch.no_grad():
        got, wanted = module.scan(x, Context()), module(x, Context())
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_scores_depend_on_distance_alone_under_rotary_positions():
    torch.manual_seed(0)
    module = mixer("attention", positions="rotary").build(16, 40)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, 20, 16)
    late = torch.cat([x[:, :1].expand(-1, 3, -1), x], dim=1)
    windowed = mixer("sliding_window", positions="rotary", window=4).build(16, 40)
    windowed.load_state_dict(module.state_dict())
    got, wanted = windowed(late, Context())[:, 6:], windowed(x, Context())[:, 3:]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide d_model=16"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"rotary_fraction": 0.5}, "rotary_fraction=0.5 would be ignored"),
        ({"positions": "rotary", "rotary_fraction": 0.05}, "turns 0 channels"),
        ({"positions": "rotary", "rotary_fraction": 2.0}, "turns 32 channels"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(InvalidConfig, match=words):
        mixer("attention", **options).build(16, 8)


def test_an_empty_window_is_refused():
    with pytest.raises(InvalidConfig, match=r"sliding_window.window=0 must be at least 1"):
        mixer("sliding_window", window=0).build(16, 8)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attention", {}),
        ("attention", {"num_heads": 4, "bias": False}),
        ("attention", {"num_heads": 2, "dropout": 0.3}),
        ("sliding_window", {"window": 5, "num_heads": 2}),
    ],
)
def test_few_queries_read_inputs_as_they_would_keys_and_values(name, options, monkeypatch):
    torch.manual_seed(0)
    module = mixer(name, **options).build(16, 20).double()
    for parameter in module.parameters():  # biases begin at zero
        torch.nn.init.normal_(parameter)
    x, positions = torch.randn(3, 20, 16).double().requires_grad_(), torch.tensor([[19, 0, 7]] * 3)
    found = []
    for reads_inputs in (True, False):
        monkeypatch.setattr(module, "_is_read_from_inputs", lambda *_, r=reads_inputs: r)
        y = module.forward_at(x, positions, Context(dropout_key=torch.tensor(3)))
        gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
        found.append([y.detach(), *gradients])
    for got, wanted in zip(*found, strict=True):
        # The gradient of the keys' bias is zero, but for rounding.
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_keys_and_values_are_made_where_that_is_less_work():
    def operations(num_queries: int, **options: int) -> int:
        module = mixer("attention", **options).build(64, 64)
        positions = torch.arange(num_queries)[None]
        with FlopCounterMode(display=False) as counter:
            module.forward_at(torch.randn(1, 64, 64), positions, Context())
        return counter.get_total_flops()

    making = 2 * 2 * 64 * 64 * 64
    assert operations(4) < making / 3
    assert operations(4, num_heads=32) > making > operations(4, num_heads=8)
