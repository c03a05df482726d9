"""RWKV-4 beyond the common contract: long sequences and keys far apart."""

import math

import pytest
import torch

from recallzoo.errors import InvalidConfig
from recallzoo.mixers import Context, mixer
from recallzoo.mixers.rwkv4 import RWKV4, _decayed_sums


def build(d_model: int, max_seq_len: int, **options: int) -> RWKV4:
    module = mixer("rwkv4", **options).build(d_model, max_seq_len)
    assert isinstance(module, RWKV4)
    return module


def wkv_in_float64(k, v, decay, first):
    """The quotient of sums of the paper's eq. 16, term by term."""
    seq_len = k.shape[1]
    k, v, decay, first = (part.double() for part in (k, v, decay, first))
    rows = []
    for t in range(seq_len):
        lag = (t - 1 - torch.arange(t, dtype=torch.float64))[:, None]
        exponent = torch.cat([k[:, :t] - lag * decay, k[:, t : t + 1] + first], dim=1)
        rows.append((torch.softmax(exponent, dim=1) * v[:, : t + 1]).sum(1))
    return torch.stack(rows, dim=1)


def wkv_of(module, x):
    """Its wkv, by making every other part of the module the identity."""
    eye = torch.eye(module.d_model)
    with torch.no_grad():
        for linear in (module.value, module.output):
            linear.weight.copy_(eye)
        for ratio in (module.time_mix_k, module.time_mix_v, module.time_mix_r):
            ratio.fill_(1.0)
        module.receptance.weight.zero_()
    return 2.0 * module(x, Context())


@pytest.mark.parametrize("seq_len", [1, 3, 4, 5, 16, 17, 300])
@pytest.mark.parametrize("key_scale", [1.0, 300.0])
def test_wkv_is_the_quotient_of_sums_however_far_keys_lie_apart(seq_len, key_scale):
    torch.manual_seed(0)
    module = build(6, seq_len)
    with torch.no_grad():
        module.key.weight.copy_(key_scale * torch.randn(6, 6))
    x = torch.randn(2, seq_len, 6)
    got = wkv_of(module, x)
    k = x @ module.key.weight.T
    wanted = wkv_in_float64(k, x, module.time_decay.exp(), module.time_first)
    # Exponents near 1000 are rounded to 6e-5, and so are the weights they give.
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-6 + 1e-6 * key_scale)


def test_gradients_stay_finite_over_long_sequences_with_large_keys():
    torch.manual_seed(0)
    module = build(4, 4096)
    with torch.no_grad():
        module.key.weight.mul_(5000.0)
    x = torch.randn(1, 4096, 4, requires_grad=True)
    module(x, Context()).square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in module.parameters())]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def test_a_late_large_key_leaves_earlier_outputs_exactly_as_they_were():
    torch.manual_seed(0)
    exponent, total = torch.randn(1, 64, 3), torch.randn(1, 64, 3)
    decay = torch.tensor([0.01, 1.0, 20.0])
    before = _decayed_sums(exponent, total, None, decay)
    exponent[:, 40] = 500.0
    after = _decayed_sums(exponent, total, None, decay)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, :40], new[:, :40])
    assert torch.isfinite(torch.stack(after)).all()


def test_initial_decays_follow_the_depth():
    """Peng et al. 2023, appendix D, by hand for four channels."""
    first = build(4, 8, layer_index=0, num_layers=3)
    last = build(4, 8, layer_index=2, num_layers=3)
    thirds = torch.tensor([0.0, 1.0, 2.0, 3.0]) / 3
    torch.testing.assert_close(first.time_decay.detach(), -5 + 8 * thirds**0.7)
    torch.testing.assert_close(last.time_decay.detach(), -5 + 8 * thirds**2.0)
    quarters = torch.tensor([0.0, 0.25, 0.5, 0.75])
    torch.testing.assert_close(first.time_mix_k.detach(), quarters)
    torch.testing.assert_close(last.time_mix_v.detach(), quarters ** (1 / 3) + 0.3)
    torch.testing.assert_close(last.time_mix_r.detach(), quarters ** (1 / 6))
    zigzag = math.log(0.3) + 0.5 * torch.tensor([0.0, 1.0, -1.0, 0.0])
    torch.testing.assert_close(first.time_first.detach(), zigzag)


MATRICES = ("key", "value", "receptance", "output")


@pytest.mark.parametrize(
    ("init", "std", "kurtosis"), [("torch", 1 / 192**0.5, 1.8), ("normal", 0.02, 3.0)]
)
def test_matrices_are_drawn_as_pytorch_does_or_with_a_deviation_of_two_hundredths(
    init, std, kurtosis
):
    torch.manual_seed(0)
    module = mixer("rwkv4", init=init).build(64, 8)
    for name in MATRICES:
        weight = getattr(module, name).weight.detach()
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert (weight / weight.std()).pow(4).mean().item() == pytest.approx(kurtosis, abs=0.2)


def test_a_layer_beyond_the_last_is_refused():
    with pytest.raises(InvalidConfig, match=r"rwkv4.layer_index=2 must be in 0\.\.1"):
        mixer("rwkv4", layer_index=2, num_layers=2).build(4, 8)
