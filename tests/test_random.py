"""Laws of the counter-based random numbers."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from recallzoo.errors import InvalidConfig
from recallzoo.random import RowRandom, dropout, mix64, permutation, seed_of

ROWS = torch.arange(20_000)


def chi_square_excess(observed: torch.Tensor, expected: float) -> float:
    """Chi-square against equal counts, in standard deviations above its mean."""
    freedom = observed.numel() - 1
    chi_square = ((observed.double() - expected) ** 2 / expected).sum()
    return float((chi_square - freedom) / (2 * freedom) ** 0.5)


@given(
    seed=st.integers(0, 2**62),
    rows=st.lists(st.integers(0, 2**62), min_size=1, max_size=8),
    at=st.integers(0, 8),
)
def test_numbers_do_not_depend_on_the_batch_a_row_is_in(seed: int, rows: list[int], at: int):
    whole, ids = RowRandom(seed, torch.tensor(rows)), torch.tensor(rows)
    weights = torch.linspace(-1, 1, 9, dtype=torch.float64)
    draws = [
        lambda r: r.bits("a", 3, 2),
        lambda r: r.uniform("b", 4),
        lambda r: r.integers("c", -5, 90, 6),
        lambda r: r.distinct("d", 2, 9, 6),
        lambda r: r.distinct("e", 0, 30, 7),
        lambda r: r.weighted_order("f", weights, 4),
    ]
    for draw in draws:
        parts = [draw(RowRandom(seed, part)) for part in (ids[:at], ids[at:])]
        assert torch.equal(draw(whole), torch.cat(parts))
        assert torch.equal(draw(whole).flip(0), draw(RowRandom(seed, ids.flip(0))))


def test_row_seed_and_name_each_change_the_numbers():
    first = RowRandom(0, ROWS).bits("x", 4)
    assert len(first.unique()) == first.numel()
    for other in (RowRandom(1, ROWS).bits("x", 4), RowRandom(0, ROWS).bits("y", 4)):
        assert not torch.isin(first, other).any()
        agreement = ((first ^ other) & 1).double().mean()
        assert abs(agreement - 0.5) < 0.01


def test_each_bit_is_fair_and_neighbouring_rows_and_columns_are_unrelated():
    bits = RowRandom(5, ROWS).bits("x", 8)
    for shift in range(64):
        bit = (bits >> shift) & 1
        assert abs(bit.double().mean() - 0.5) < 0.006
        assert abs((bit[1:] ^ bit[:-1]).double().mean() - 0.5) < 0.006
        assert abs((bit[:, 1:] ^ bit[:, :-1]).double().mean() - 0.5) < 0.006


def test_uniform_numbers_are_uniform_and_inside_the_open_interval():
    values = RowRandom(0, ROWS).uniform("x", 5)
    assert values.min() > 0
    assert values.max() < 1
    counts = torch.histc(values, 100, 0, 1)
    assert chi_square_excess(counts, values.numel() / 100) < 4


def test_the_largest_uniform_number_is_below_one(monkeypatch: pytest.MonkeyPatch):
    """Its Gumbel noise would be infinite otherwise."""
    random = RowRandom(0, torch.arange(2))
    monkeypatch.setattr(random, "bits", lambda *_: torch.tensor([[-1], [0]]))
    values = random.uniform("x", 1).flatten()
    assert 0 < values[1] < values[0] < 1


@pytest.mark.parametrize(("low", "high"), [(0, 7), (-3, 4), (100, 107)])
def test_integers_are_uniform_over_the_half_open_range(low: int, high: int):
    values = RowRandom(0, ROWS).integers("x", low, high, 3)
    assert (values.min(), values.max()) == (low, high - 1)
    assert chi_square_excess(torch.bincount((values - low).flatten()), 3 * len(ROWS) / 7) < 4


def test_integers_take_a_bound_for_each_row():
    high = 1 + ROWS[:, None] % 5
    values = RowRandom(0, ROWS).integers("x", 0, high, 4)
    assert (values < high).all()
    for bound in range(1, 6):
        assert values[high[:, 0] == bound].max() == bound - 1


@pytest.mark.parametrize(("domain", "n"), [(4, 2), (4, 3), (9, 2), (13, 3)])
def test_every_ordered_choice_of_distinct_values_is_equally_likely(domain: int, n: int):
    """Domains of four times n and more take the path that redraws repeats."""
    values = RowRandom(0, torch.arange(60_000)).distinct("x", 0, domain, n)
    code = sum(values[:, i] * domain**i for i in range(n))
    _, counts = torch.unique(torch.as_tensor(code), return_counts=True)
    possible = 1
    for i in range(n):
        possible *= domain - i
    assert len(counts) == possible
    assert chi_square_excess(counts, 60_000 / possible) < 4


@given(low=st.integers(-50, 50), size=st.integers(1, 60), data=st.data())
def test_distinct_values_are_distinct_and_in_range(low: int, size: int, data: st.DataObject):
    n = data.draw(st.integers(0, size))
    values = RowRandom(3, ROWS[:20]).distinct("x", low, low + size, n)
    assert values.shape == (20, n)
    for row in values.tolist():
        assert len(set(row)) == n
        assert all(low <= value < low + size for value in row)


def test_more_distinct_values_than_there_are_is_refused():
    with pytest.raises(InvalidConfig, match=r"5 different values .* 3\.\.6 holds 4"):
        RowRandom(0, ROWS).distinct("x", 3, 7, 5)


def test_weighted_order_follows_the_weights_without_replacement():
    weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    order = RowRandom(0, ROWS).weighted_order("x", weights.log(), 3)
    assert (order.sort(dim=1).values == torch.arange(3)).all()
    for a in range(3):
        for b in set(range(3)) - {a}:
            share = ((order[:, 0] == a) & (order[:, 1] == b)).double().mean()
            expected = weights[a] / 7 * weights[b] / (7 - weights[a])
            assert abs(share - expected) < 0.015


@given(n=st.integers(0, 300), key=st.integers(), name=st.text(max_size=5))
def test_permutation_is_a_permutation_of_its_key(n: int, key: int, name: str):
    order = permutation(n, key, name)
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, permutation(n, key, name))


def test_permutations_of_different_keys_are_unrelated_and_uniform():
    orders = torch.stack([permutation(4, "epoch", key) for key in range(6000)])
    code = (orders * torch.tensor([64, 16, 4, 1])).sum(1)
    _, counts = torch.unique(code, return_counts=True)
    assert len(counts) == 24
    assert chi_square_excess(counts, 6000 / 24) < 4


def test_mix64_is_splitmix64():
    """First outputs of splitmix64 seeded with 0, as published with its reference code."""
    golden = -7046029254386353131
    state = torch.tensor([1, 2, 3]) * golden
    unsigned = [value % 2**64 for value in mix64(state).tolist()]
    assert unsigned == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_seed_of_tells_numbers_from_names_and_is_stable():
    assert seed_of("a", 1) != seed_of("a", "1") != seed_of("a1")
    assert seed_of("task", 0) == 4584575640910507388
    assert all(0 <= seed_of(i) < 2**63 for i in range(100))


def key_of(*parts: int | str) -> torch.Tensor:
    return torch.tensor(seed_of(*parts))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_at_its_rate_and_keeps_the_mean(rate: float):
    out = dropout(torch.ones(400, 500), rate, key_of(1), 0)
    assert abs((out == 0).double().mean() - rate) < 0.005
    assert torch.equal(out.unique(), torch.tensor([0.0, 1 / (1 - rate)]))
    assert abs(out.mean() - 1) < 0.03


def test_dropout_at_rate_zero_changes_nothing():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropout(x, 0.0, key_of(1), 0), x)


def test_dropout_masks_of_sites_keys_and_elements_are_independent():
    ones = torch.ones(300, 400)
    first = dropout(ones, 0.5, key_of("run", 1), 0) == 0
    assert torch.equal(first, dropout(ones, 0.5, key_of("run", 1), 0) == 0)
    others = [
        dropout(ones, 0.5, key_of("run", 1), 1) == 0,
        dropout(ones, 0.5, key_of("run", 2), 0) == 0,
        first.roll(1, 0),
        first.roll(1, 1),
    ]
    for other in others:
        assert abs((first == other).double().mean() - 0.5) < 0.01


def test_dropout_in_a_pack_equals_dropout_alone():
    keys = torch.stack([key_of(i) for i in range(3)])
    x = torch.ones(3, 20, 10)
    packed = torch.func.vmap(lambda x, key: dropout(x, 0.3, key, 2))(x, keys)
    for i in range(3):
        assert torch.equal(packed[i], dropout(x[i], 0.3, keys[i], 2))
