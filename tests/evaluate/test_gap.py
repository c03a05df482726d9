"""Gap attribution: the paper's table, the law of sums, and what the bootstrap promises."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recallzoo.errors import InvalidConfig
from recallzoo.evaluate.gap import (
    bootstrap_sums,
    gap_by_slice,
    implied_slice_share,
    share_of_gap,
)
from recallzoo.evaluate.paper_table1 import STATED_SHARE, check_rows

CAPPED = "reproduced, capped at 100 %"
TABLE1 = [
    # model, scale, printed share, share by the formula, verdict
    ("Long Conv", "125M", 0.401, 0.401, "reproduced"),
    ("H3", "125M", 0.884, 0.878, "reproduced"),
    ("Hyena", "125M", 1.0, 1.128, CAPPED),
    ("RWKV", "125M", 1.0, 1.224, CAPPED),
    ("Long Conv", "360M", 0.405, 0.404, "reproduced"),
    ("H3", "360M", 0.658, 0.656, "reproduced"),
    ("Hyena", "360M", 0.982, 0.716, "not reproduced"),
    ("RWKV", "360M", 1.0, 1.266, CAPPED),
    ("Hyena", "1.4B", 0.403, 0.403, "reproduced"),
]


@pytest.mark.parametrize(("check", "expected"), list(zip(check_rows(), TABLE1, strict=True)))
def test_the_papers_table_is_reproduced_where_it_agrees_with_itself(check, expected):
    model, scale, printed, share, verdict = expected
    assert (check.row.model, check.row.scale) == (model, scale)
    assert check.row.printed_share == printed
    assert check.share == pytest.approx(share, abs=0.001)
    assert check.low < check.share < check.high
    assert check.verdict == verdict


def test_the_papers_rows_imply_more_ar_hits_than_its_text_says():
    implied = [check.used_ar_share for check in check_rows()]
    assert implied == pytest.approx([0.0702] * 4 + [0.0701] * 4 + [0.1131], abs=1e-4)
    stated = [check.verdict for check in check_rows(STATED_SHARE)]
    assert stated.count("reproduced") == 0
    assert stated.count("not reproduced") == 6


@given(seed=st.integers(0, 2**32 - 1), num_slices=st.integers(2, 5))
def test_the_formula_is_a_ratio_of_sums_and_shares_add_up_to_one(seed, num_slices):
    rng = np.random.default_rng(seed)
    model, reference = rng.gamma(2.0, size=(2, 500))
    of_slice = rng.integers(0, num_slices, 500)
    shares = []
    for one in np.unique(of_slice):
        inside = of_slice == one
        shares.append(
            share_of_gap(
                math.exp(model.mean()),
                math.exp(reference.mean()),
                math.exp(model[inside].mean()),
                math.exp(reference[inside].mean()),
                inside.mean(),
            )
        )
        direct = (model - reference)[inside].sum() / (model - reference).sum()
        assert shares[-1] == pytest.approx(direct, rel=1e-6)  # a small gap cancels digits
    assert sum(shares) == pytest.approx(1, rel=1e-6)


@given(seed=st.integers(0, 2**32 - 1))
def test_a_slices_share_of_tokens_follows_from_three_perplexities(seed):
    rng = np.random.default_rng(seed)
    loss, inside = rng.gamma(2.0, size=300), rng.random(300) < 0.1
    inside[0], loss[0] = True, 40.0
    implied = implied_slice_share(
        math.exp(loss.mean()), math.exp(loss[inside].mean()), math.exp(loss[~inside].mean())
    )
    assert implied == pytest.approx(inside.mean(), rel=1e-6)


def test_bootstrap_sums_are_those_of_documents_drawn_one_by_one(monkeypatch):
    sums = np.arange(12.0).reshape(2, 6)
    rng = np.random.default_rng(3)
    slow = [sums[:, rng.integers(0, 6, 6)].sum(1) for _ in range(50)]
    assert np.allclose(bootstrap_sums(sums, 50, seed=3), slow)
    monkeypatch.setattr("recallzoo.evaluate.gap._DRAWS_AT_ONCE", 20)
    assert np.allclose(bootstrap_sums(sums, 50, seed=3), slow)


def documents(rng, number=60):
    """Gap sums and tokens [slices, documents]: all, hits (a third of the gap), others."""
    tokens = rng.integers(50, 500, number)
    hits = rng.binomial(tokens, 0.1)
    level = rng.gamma(4, 0.25, number)
    of_hits = level * hits * (1 / 3) / 0.1
    of_others = level * (tokens - hits) * (2 / 3) / 0.9
    noise = rng.normal(0, 0.2, (2, number)) * np.sqrt(tokens)
    gaps = np.stack([of_hits + noise[0], of_others + noise[1]])
    return np.stack([gaps.sum(0), *gaps]), np.stack([tokens, hits, tokens - hits]).astype(float)


def test_intervals_cover_the_true_share_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        gaps, tokens = documents(rng)
        _, share = gap_by_slice(gaps, tokens, 0, resamples=200)
        covered += share.low[1] <= 1 / 3 <= share.high[1]
    assert 0.88 <= covered / 200 <= 0.99  # 95 % asked; three standard errors are 4.6 points


def test_equal_seeds_give_equal_intervals_that_hold_the_value():
    gaps, tokens = documents(np.random.default_rng(1))
    first, again, other = (gap_by_slice(gaps, tokens, 0, seed=seed) for seed in (5, 5, 6))
    for one, same in zip(first, again, strict=True):
        assert np.array_equal(one.low, same.low)
        assert np.array_equal(one.high, same.high)
        assert (one.low <= one.value).all()
        assert (one.value <= one.high).all()
    assert not np.array_equal(first[1].low, other[1].low)
    assert first[1].value[0] == 1
    assert first[1].value[1:].sum() == pytest.approx(1)


def test_one_document_has_shares_but_no_interval():
    gaps, tokens = documents(np.random.default_rng(1), number=1)
    mean, share = gap_by_slice(gaps, tokens, 0)
    assert np.isfinite(share.value).all()
    assert np.isnan([share.low, share.high, mean.low, mean.high]).all()


def test_a_slice_absent_from_some_draws_still_has_an_interval():
    gaps, tokens = documents(np.random.default_rng(1), number=5)
    tokens[1, 1:] = gaps[1, 1:] = 0
    mean, _ = gap_by_slice(gaps, tokens, 0)
    assert mean.low[1] == mean.high[1] == pytest.approx(gaps[1, 0] / tokens[1, 0])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((float("nan"), 2, 2, 2, 0.1), "ppl=nan"),
        ((3, 0.5, 2, 2, 0.1), "reference_ppl=0.5"),
        ((3, 2, 2, 2, 1.5), "slice_share=1.5"),
        ((2, 2, 3, 2, 0.1), "no gap"),
    ],
)
def test_numbers_that_are_no_perplexities_or_have_no_gap_are_refused(arguments, word):
    with pytest.raises(InvalidConfig, match=word):
        share_of_gap(*arguments)


def test_equal_perplexities_imply_no_share():
    with pytest.raises(InvalidConfig, match="imply no share"):
        implied_slice_share(3, 2, 2)


def test_a_bootstrap_of_nothing_is_refused():
    with pytest.raises(InvalidConfig, match="documents and resamples"):
        bootstrap_sums(np.zeros((1, 0)))
    with pytest.raises(InvalidConfig, match="level"):
        gap_by_slice(np.ones((1, 2)), np.ones((1, 2)), 0, level=1.0)
