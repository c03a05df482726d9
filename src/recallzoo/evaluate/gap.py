"""How much of the gap between two language models lies in some of the tokens.

    share of gap = delta log(ppl_slice) |T_slice| / (delta log(ppl) |T|)
                 = sum over the slice of (loss - reference loss) / the same sum over all tokens

Delta is model minus reference on the same tokens. The share is not capped: above 1 the model is
better than its reference elsewhere, below 0 it is better within the slice. Over slices that share
out all tokens it sums to 1.

Source   Arora et al. 2023, arXiv:2312.04927, section 3.1 ("% of gap").
Differs  the paper's table stops at 100 %; here the share is as it comes, with an interval by
         bootstrap over documents (tokens of one document are not independent).
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from recallzoo.errors import InvalidConfig

RESAMPLES = 1_000
LEVEL = 0.95
_DRAWS_AT_ONCE = 1 << 22


def share_of_gap(
    ppl: float,
    reference_ppl: float,
    slice_ppl: float,
    reference_slice_ppl: float,
    slice_share: float,
) -> float:
    """Share of the gap in a slice, from perplexities and the slice's share of tokens.

    Uncapped. Raises InvalidConfig for a perplexity below 1 or that is not finite, a share outside
    [0, 1], or equal overall perplexities: then there is no gap to share.

    >>> round(share_of_gap(16.98, 11.01, 25.62, 2.16, 0.0703), 3)
    0.401
    """
    given = {
        "ppl": ppl,
        "reference_ppl": reference_ppl,
        "slice_ppl": slice_ppl,
        "reference_slice_ppl": reference_slice_ppl,
    }
    for name, value in given.items():
        if not (math.isfinite(value) and value >= 1):
            raise InvalidConfig(f"{name}={value} is no perplexity: those are finite and 1 or more.")
    if not 0 <= slice_share <= 1:
        raise InvalidConfig(f"slice_share={slice_share} is a share of tokens, in [0, 1].")
    if ppl == reference_ppl:
        raise InvalidConfig(
            f"both models have perplexity {ppl}: there is no gap, so no slice has a share of it."
        )
    slice_gap = math.log(slice_ppl) - math.log(reference_slice_ppl)
    return slice_gap * slice_share / (math.log(ppl) - math.log(reference_ppl))


def implied_slice_share(ppl: float, slice_ppl: float, other_ppl: float) -> float:
    """The slice's share of tokens that three perplexities of one model imply.

    Solves log ppl = f log slice_ppl + (1 - f) log other_ppl for f. InvalidConfig where the slice
    and the rest have equal perplexity, so that any f would do.
    """
    if slice_ppl == other_ppl:
        raise InvalidConfig(
            f"slice and other tokens both have perplexity {slice_ppl}: they imply no share."
        )
    return math.log(ppl / other_ppl) / math.log(slice_ppl / other_ppl)


@dataclass(frozen=True)
class Interval:
    """Values and the bounds of their intervals; NaN where there is none."""

    value: Float[np.ndarray, "S"]
    low: Float[np.ndarray, "S"]
    high: Float[np.ndarray, "S"]


def bootstrap_sums(
    sums: Float[np.ndarray, "S N"], resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "R S"]:
    """Sums over documents drawn with replacement, as many as there are, `resamples` times.

    sums  per-document sums of S quantities. All quantities see the same draws, and equal seeds
          draw alike, so differences and ratios of results are paired.
    """
    num_documents = sums.shape[1]
    if resamples < 1 or num_documents < 1:
        raise InvalidConfig(
            f"a bootstrap wants documents and resamples, got {num_documents} and {resamples}."
        )
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, sums.shape[0]))
    at_once = max(1, _DRAWS_AT_ONCE // num_documents)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        draws = rng.integers(0, num_documents, (rows, num_documents))
        draws += np.arange(rows)[:, None] * num_documents
        times = np.bincount(draws.reshape(-1), minlength=rows * num_documents)
        drawn[start : start + rows] = times.reshape(rows, num_documents).astype(float) @ sums.T
    return drawn


def gap_by_slice(
    loss_gap: Float[np.ndarray, "S N"],
    num_tokens: Float[np.ndarray, "S N"],
    total: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[Interval, Interval]:
    """Mean gap of each slice in nats a token, and its share of the gap, with intervals.

    loss_gap    summed loss difference to the reference, by slice and document
    num_tokens  tokens, by slice and document
    total       the row that holds all tokens
    """
    if not 0 < level < 1:
        raise InvalidConfig(f"level={level} of an interval is in (0, 1).")
    gaps, tokens = loss_gap.sum(1), num_tokens.sum(1).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean, share = gaps / tokens, gaps / gaps[total]
        if loss_gap.shape[1] < 2:
            nothing = np.full(len(gaps), np.nan)
            return Interval(mean, nothing, nothing), Interval(share, nothing, nothing)
        drawn = bootstrap_sums(np.concatenate([loss_gap, num_tokens]), resamples, seed)
        drawn_gaps, drawn_tokens = drawn[:, : len(gaps)], drawn[:, len(gaps) :]
        means = drawn_gaps / drawn_tokens
        shares = drawn_gaps / drawn_gaps[:, total : total + 1]
    return Interval(mean, *_bounds(means, level)), Interval(share, *_bounds(shares, level))


def _bounds(drawn: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of each column over the draws in which the slice occurred."""
    edge = (1 - level) / 2
    bounds = np.full((2, drawn.shape[1]), np.nan)
    whole = np.isfinite(drawn).all(0)
    bounds[:, whole] = np.quantile(drawn[:, whole], [edge, 1 - edge], axis=0)
    for column in np.flatnonzero(~whole):  # a slice of few documents is absent from some draws
        values = drawn[np.isfinite(drawn[:, column]), column]
        if len(values):
            bounds[:, column] = np.quantile(values, [edge, 1 - edge])
    return bounds[0], bounds[1]
