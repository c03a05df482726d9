"""Convolutions with input-dependent shift filters: what the paper's constructions say of them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from recallzoo.errors import InvalidConfig
from recallzoo.mixers import Context, Mixer, mixer
from recallzoo.mixers.autocorrelation_conv import AutocorrelationConv, _largest_in_turn
from recallzoo.tasks import task

NEEDED, SPURIOUS = 8, 3
KEYS, VALUE, QUERIES = (1, 2, 3, 4, 5), 20, (11, 12, 13, 14, 3)
TRIPLES = torch.tensor(
    [[part for k, q in zip(KEYS, QUERIES, strict=True) for part in (k, VALUE, q)]]
)
"""MQAR as triples (key, value, query): the keys are different, the last query asks for the third
key, 8 tokens back, and all values are equal: 4 pairs of equal tokens lie 3 apart."""


def passing(module: Mixer) -> Mixer:
    """W = 0, b1 = 1, b2 = 0: what the filter brings is the output."""
    with torch.no_grad():
        module.gate.weight.zero_()  # pyright: ignore
    return module


def one_hot(tokens: torch.Tensor, width: int) -> torch.Tensor:
    """Token 0, the filler, is the zero vector."""
    return F.one_hot(tokens, width).float() * (tokens != 0)[..., None]


def theorem_4_5(tokens: torch.Tensor, lags, width: int) -> torch.Tensor:
    """y = sum over s in S of (Q * shift(K, s)) 1 1^T * shift(V, s - 1), Q = K = V one-hot."""
    u = one_hot(tokens, width)

    def shift(x, by):
        return F.pad(x, (0, 0, by, 0))[:, : x.shape[1]]

    return sum(
        ((u * shift(u, s)).sum(-1, keepdim=True) * shift(u, s - 1) for s in lags),
        torch.zeros_like(u),
    )


@given(seed=st.integers(0, 2**16), num_pairs=st.integers(1, 8))
def test_shift_conv_answers_every_mqar_query_exactly(seed, num_pairs):
    batch = task("mqar", seq_len=40, num_pairs=num_pairs, vocab_size=32).sample(
        torch.arange(4), seed
    )
    module = passing(mixer("shift_conv", normalise=False).build(32, 40))
    y = module(one_hot(batch.tokens, 32), Context(tokens=batch.tokens))
    at_queries = torch.gather(y, 1, batch.query_positions[..., None].expand(-1, -1, 32))
    assert torch.equal(at_queries, one_hot(batch.answers, 32))


@given(seed=st.integers(0, 2**16), seq_len=st.integers(1, 50), vocab_size=st.integers(2, 9))
def test_shift_conv_is_the_construction_of_theorem_4_5_over_all_lags(seed, seq_len, vocab_size):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab_size, (2, seq_len), generator=generator)
    module = passing(mixer("shift_conv", normalise=False).build(9, seq_len))
    y = module(one_hot(tokens, 9), Context(tokens=tokens))
    # Sums of ones are exact.
    assert torch.equal(y, theorem_4_5(tokens, range(1, seq_len + 1), 9))


def test_normalised_shift_conv_is_the_mean_of_what_followed():
    tokens = torch.tensor([[1, 2, 1, 3, 1, 1]])
    module = passing(mixer("shift_conv").build(4, 6))
    y = module(one_hot(tokens, 4), Context(tokens=tokens))[0]
    wanted = torch.zeros(6, 4)
    wanted[2, 2] = 1.0
    wanted[4, 2] = wanted[4, 3] = 0.5
    wanted[5, 1] = wanted[5, 2] = wanted[5, 3] = 1 / 3
    torch.testing.assert_close(y, wanted)


def test_shift_conv_over_long_sequences_is_its_definition_and_forgets_nothing_of_the_past():
    torch.manual_seed(0)
    module = mixer("shift_conv").build(8, 2000)
    x, tokens = torch.randn(1, 2000, 8, requires_grad=True), torch.randint(30, (1, 2000))
    equal = (tokens[:, :, None] == tokens[:, None]).float().tril(-1)
    following = F.pad(x, (0, 0, 0, 1))[:, 1:]
    c = equal @ following / equal.sum(-1, keepdim=True).clamp(min=1)
    wanted = module.gate(x) * (c + module.bias)  # pyright: ignore
    got = module(x, Context(tokens=tokens))
    weights = torch.randn_like(got)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (got, wanted)]
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


def autocorrelation_conv(seq_len: int, width: int = 32, **options) -> AutocorrelationConv:
    module = mixer("autocorrelation_conv", **options).build(width, seq_len)
    assert isinstance(passing(module), AutocorrelationConv)
    return module  # pyright: ignore[reportReturnType]


def test_the_spurious_lag_scores_four_and_the_needed_one_scores_one():
    module = autocorrelation_conv(15)
    scores = module.autocorrelation(torch.zeros(1, 15, 32), Context(tokens=TRIPLES))[0, -1]
    assert scores[NEEDED - 1] == 1
    assert scores[SPURIOUS - 1] == 4
    assert int(scores.argmax()) + 1 == SPURIOUS


@pytest.mark.parametrize("num_lags", [1, 2])
def test_plain_autocorrelation_picks_the_wrong_lag_where_shift_conv_answers(num_lags):
    assert TRIPLES[0, -1] == TRIPLES[0, -1 - NEEDED]
    x, context = one_hot(TRIPLES, 32), Context(tokens=TRIPLES)
    answer = F.one_hot(torch.tensor(VALUE), 32).float()
    module = autocorrelation_conv(15, num_lags=num_lags)
    lags, is_spike = module._top(module.autocorrelation(x, context))
    assert is_spike[0, -1].all()
    assert SPURIOUS in lags[0, -1].tolist()
    assert NEEDED not in lags[0, -1].tolist()
    assert not torch.equal(module(x, context)[0, -1], answer)
    assert torch.equal(passing(mixer("shift_conv").build(32, 15))(x, context)[0, -1], answer)


@given(seed=st.integers(0, 2**16), seq_len=st.integers(2, 40), max_lag=st.integers(1, 50))
def test_running_scores_count_equal_tokens_of_the_prefix(seed, seq_len, max_lag):
    tokens = torch.randint(4, (2, seq_len), generator=torch.Generator().manual_seed(seed))
    module = autocorrelation_conv(seq_len, max_lag=max_lag)
    scores = module.autocorrelation(torch.zeros(2, seq_len, 32), Context(tokens=tokens))
    for b, row in enumerate(tokens.tolist()):
        for s in range(1, module.max_lag + 1):
            count = 0
            for t in range(seq_len):
                count += t >= s and row[t] == row[t - s]
                assert scores[b, t, s - 1] == count


@pytest.mark.parametrize("max_lag", [3, 7, 39])
def test_running_scores_of_hidden_states_are_sums_of_inner_products(max_lag):
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32)
    module = autocorrelation_conv(40, match="hidden", max_lag=max_lag)
    unit = F.normalize(x, dim=-1)
    products = unit @ unit.transpose(1, 2)
    wanted = torch.stack(
        [F.pad(products.diagonal(-s, 1, 2), (s, 0)).cumsum(1) for s in range(1, max_lag + 1)], -1
    )
    torch.testing.assert_close(module.autocorrelation(x, Context()), wanted, rtol=0, atol=1e-5)


@given(seed=st.integers(0, 2**16), size=st.integers(1, 40), number=st.integers(1, 40))
def test_the_largest_found_in_turn_are_those_of_a_sort(seed, size, number):
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(3 * size, generator=generator)[:size] for _ in range(3)])
    number = min(number, size)
    wanted = ranks.sort(dim=-1, descending=True).values[:, :number]
    assert torch.equal(_largest_in_turn(ranks, number), wanted)


def test_the_shorter_of_two_lags_with_equal_scores_wins():
    tokens = torch.tensor([[1, 2, 1, 2, 1, 2, 3]])
    module = autocorrelation_conv(7, num_lags=2)
    lags, is_spike = module._top(
        module.autocorrelation(torch.zeros(1, 7, 32), Context(tokens=tokens))
    )
    assert lags[0, -1].tolist() == [2, 4]
    assert is_spike[0, :, 0].tolist() == [False, False, True, True, True, True, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_lags": 0}, "num_lags=0 must be at least 1"),
        ({"max_lag": -3}, "max_lag=-3 must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(InvalidConfig, match=words):
        mixer("autocorrelation_conv", **options).build(16, 24)


@pytest.mark.parametrize("name", ["shift_conv", "autocorrelation_conv"])
def test_continuous_input_is_refused_where_tokens_are_compared(name):
    with pytest.raises(InvalidConfig, match=f"{name} reads one token id at each step"):
        mixer(name).build(16, 24)(torch.zeros(2, 24, 16), Context())
