"""The distributions that tasks state: slots, gaps, updates, shared words."""

import pytest
import torch

from recallzoo.tasks import task
from recallzoo.tasks._layout import power_law

ROWS = torch.arange(20_000)


def chi_square_excess(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square, in standard deviations above its mean; cells under 5 expected are merged."""
    observed, expected = observed.double(), expected.double()
    large = expected >= 5
    observed = torch.cat([observed[large], observed[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]]).clamp(min=1e-9)
    freedom = len(expected) - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("name", ["mqar", "forgetting", "compositional", "multi_token", "stacked"])
@pytest.mark.parametrize("power", [0.01, 0.5, 1.0, 2.0])
def test_the_slot_of_the_first_pair_follows_the_power_law(name: str, power: float):
    config = task(name, seq_len=96, power=power, filler="zero")
    batch = config.sample(ROWS, 0)
    context_len, slot_len = {
        "mqar": (8, 2),
        "forgetting": (12, 2),
        "compositional": (12, 3),
        "multi_token": (16, 4),
        "stacked": (4, 1),
    }[name]
    slot = (batch.query_positions[:, 0] - context_len) // slot_len
    num_slots = (96 - context_len) // slot_len
    observed = torch.bincount(slot, minlength=num_slots)
    for assumed in (0.01, 0.5, 1.0, 2.0):
        expected = len(ROWS) * torch.softmax(power_law(num_slots, assumed), dim=0)
        excess = chi_square_excess(observed, expected)
        assert excess < 4 if assumed == power else excess > 20


def test_further_slots_are_drawn_without_replacement_from_the_same_weights():
    slots = task("mqar", seq_len=24, num_pairs=3, power=0.3).sample(ROWS, 0).slices["slot"]
    weight = torch.softmax(power_law(9, 0.3), dim=0)
    first, second = slots[:, 0], slots[:, 1]
    observed = torch.bincount(9 * first + second, minlength=81)
    expected = weight[:, None] * weight[None] / (1 - weight)[:, None] * len(ROWS)
    expected.fill_diagonal_(0)
    assert observed.view(9, 9).diagonal().sum() == 0
    assert chi_square_excess(observed, expected.flatten()) < 4


@pytest.mark.parametrize("power", [0.01, 1.0, 2.0])
def test_in_stream_gaps_follow_the_power_law_over_the_keys_stored_so_far(power: float):
    batch = task("in_stream", power=power).sample(ROWS, 0)
    num_items = batch.tokens.shape[1] // 2
    is_query = torch.zeros(len(ROWS), num_items, dtype=torch.bool)
    is_query.scatter_(1, batch.query_positions // 2, True)
    keys = batch.tokens[:, ::2]
    observed = torch.zeros(num_items)
    expected = {p: torch.zeros(num_items, dtype=torch.float64) for p in (0.01, 1.0, 2.0)}
    for i in range(1, num_items):
        # Gap of each earlier item that is the last of its key; 0 for all others.
        is_last = torch.ones(len(ROWS), i, dtype=torch.bool)
        for j in range(i):
            is_last[:, j] = (keys[:, j] > 0) & (keys[:, j + 1 : i] != keys[:, j : j + 1]).all(1)
        gap = i - torch.arange(i)
        now = is_query[:, i]
        same = (keys[:, :i] == keys[:, i : i + 1]) & is_last
        observed += torch.bincount((same[now].long() * gap).sum(1), minlength=num_items)
        for assumed, total in expected.items():
            weight = is_last[now] * gap.double() ** (assumed - 1)
            total[gap] += (weight / weight.sum(1, keepdim=True)).sum(0)
    for assumed, total in expected.items():
        excess = chi_square_excess(observed, total)
        assert excess < 4 if assumed == power else excess > 20


def test_in_stream_counts_occurrences_and_stored_pairs():
    batch = task("in_stream").sample(torch.arange(50), 0)
    for i, tokens in enumerate(batch.tokens.tolist()):
        for q, position in enumerate(batch.query_positions[i].tolist()):
            assert batch.slices["occurrence"][i, q] == tokens[:position].count(tokens[position])
            before = set(tokens[:position:2]) - {0}
            assert batch.slices["num_stored"][i, q] == len(before)
            assert tokens[position + 1] == batch.answers[i, q]


def test_in_stream_starts_with_a_pair_and_places_the_other_items_uniformly():
    batch = task("in_stream", num_pairs=2, num_repeats=1, seq_len=10).sample(ROWS, 0)
    assert (batch.tokens[:, 0] > 0).all()
    item = batch.query_positions[:, 0] // 2
    observed = torch.bincount(item, minlength=5)
    assert chi_square_excess(observed, torch.tensor([0.0, 1, 1, 1, 1]) * len(ROWS) / 4) < 4


@pytest.mark.parametrize("update_order", ["after_pairs", "interleaved"])
def test_an_update_follows_its_pair_and_changes_the_value(update_order: str):
    config = task("forgetting", num_pairs=3, num_updates=2, update_order=update_order)
    batch = config.sample(torch.arange(300), 0)
    for i, tokens in enumerate(batch.tokens.tolist()):
        context = list(zip(tokens[:10:2], tokens[1:10:2], strict=True))
        for q, position in enumerate(batch.query_positions[i].tolist()):
            values = [value for key, value in context if key == tokens[position]]
            updated = int(batch.slices["updated"][i, q])
            assert len(values) == 1 + updated
            assert len(set(values)) == len(values)
            assert values[-1] == batch.answers[i, q]
        assert batch.slices["updated"][i].sum() == 2
        if update_order == "after_pairs":
            assert len({key for key, _ in context[:3]}) == 3


def test_all_interleavings_of_pairs_and_updates_are_equally_likely():
    config = task("forgetting", num_pairs=2, num_updates=1, update_order="interleaved")
    context = config.sample(ROWS, 0).tokens[:, 0:6:2]
    # Of key a stored twice and b once: aab, aba, baa.
    kind = (context[:, 0] != context[:, 1]).long() + (context[:, 1] == context[:, 2]).long()
    assert chi_square_excess(torch.bincount(kind), torch.full((3,), len(ROWS) / 3)) < 4


def test_every_key_is_updated_equally_often():
    batch = task("forgetting", num_pairs=4, num_updates=1).sample(ROWS, 0)
    counts = batch.slices["updated"].sum(0)
    assert chi_square_excess(counts, torch.full((4,), len(ROWS) / 4)) < 4


def test_compositional_pairs_are_the_whole_grid_so_neither_key_tells_the_value():
    config = task("compositional", num_first=2, num_second=3, seq_len=36)
    for tokens in config.sample(torch.arange(200), 0).tokens.tolist():
        triples = [tuple(tokens[i : i + 3]) for i in range(0, 18, 3)]
        firsts, seconds, values = (set(column) for column in zip(*triples, strict=True))
        assert (len(firsts), len(seconds), len(values)) == (2, 3, 6)
        assert len({triple[:2] for triple in triples}) == 6


def test_compositional_order_of_the_grid_is_uniform():
    config = task("compositional", vocab_size=60, seq_len=24)
    tokens = config.sample(ROWS, 0).tokens
    # Which of the other three stored pairs shares the first key with the first one.
    same = tokens[:, [3, 6, 9]] == tokens[:, :1]
    assert (same.sum(1) == 1).all()
    assert chi_square_excess(same.sum(0), torch.full((3,), len(ROWS) / 3)) < 4


def test_multi_token_keys_share_words_but_are_never_equal():
    config = task("multi_token", num_pairs=8, key_len=3, key_words=2, seq_len=160)
    batch = config.sample(torch.arange(200), 0)
    for tokens in batch.tokens.tolist():
        keys = [tuple(tokens[5 * j : 5 * j + 3]) for j in range(8)]
        assert len(set(keys)) == 8
    assert (batch.slices["shared_prefix"] == 2).all(), "all eight keys of two words are stored"
    batch = task("multi_token", num_pairs=4, key_len=3, key_words=3).sample(torch.arange(300), 0)
    assert len(batch.slices["shared_prefix"].unique()) == 3
    for i, tokens in enumerate(batch.tokens.tolist()):
        keys = [tokens[5 * j : 5 * j + 3] for j in range(4)]
        for j, key in enumerate(keys):
            others = keys[:j] + keys[j + 1 :]
            shared = max(n for n in range(3) if any(o[:n] == key[:n] for o in others))
            assert batch.slices["shared_prefix"][i, 2 * j] == shared


def test_multi_token_values_are_teacher_forced_token_by_token():
    batch = task("multi_token", key_len=1, value_len=3).sample(torch.arange(100), 0)
    assert batch.slices["value_token"][0].tolist() == [0, 1, 2] * 4
    following = batch.tokens.gather(1, batch.query_positions + 1)
    forced = batch.slices["value_token"] < 2
    assert torch.equal(following[forced], batch.answers[forced])
    assert (following[~forced] == 0).all(), "the last token is asked for, not given"


def test_long_keys_of_many_words_are_drawn_in_two_parts():
    config = task("multi_token", key_len=8, num_pairs=2, seq_len=64)
    tokens = config.sample(ROWS[:2000], 0).tokens[:, :8]
    assert tokens.min() >= 1
    assert 4000 < tokens.max() < 4096
    assert all(len(column.unique()) > 1000 for column in tokens.unbind(1))


def test_stacked_pairs_are_one_step_and_queries_carry_no_value():
    batch = task("stacked", filler="random").sample(torch.arange(100), 0)
    asked = batch.tokens[torch.arange(100)[:, None], batch.query_positions]
    assert (asked[..., 1] == 0).all()
    assert torch.equal(asked[..., 0], batch.tokens[:, :4, 0])
    assert torch.equal(batch.answers, batch.tokens[:, :4, 1])


@pytest.mark.parametrize("name", ["mqar", "stacked"])
def test_passes_repeat_the_pairs_and_distance_counts_from_the_last(name: str):
    one = task(name, num_pairs=3, num_passes=3).sample(torch.arange(50), 0)
    step = 6 if name == "mqar" else 3
    for i in (1, 2):
        assert torch.equal(one.tokens[:, :step], one.tokens[:, i * step : (i + 1) * step])
    assert (one.slices["distance"] < one.query_positions - step).all()
