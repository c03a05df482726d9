"""Ways to share out the tokens of an audit, and loss summed by slice and document.

    all
    ar_hit, other                         at each cut
    repeated, new                         whether the token's pair occurred earlier in the context
    frequency                             training occurrences of the pair, log-spaced bins
    frequency_repeated, frequency_new     the same, apart for repeated and other tokens
    distance                              tokens back to the pair's last occurrence, bins double
    occurrence                            how often the pair occurred earlier in the context
    domain

Each line shares out all tokens: every token is in exactly one of its slices.

Source   Arora et al. 2023, arXiv:2312.04927: AR hits (section 3.1), gap by training frequency
         (figure 1), distance of AR hits (figure 3).
Differs  occurrence and domain are ours, and so is asking all of it at several cuts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

FREQUENCY_EDGES = (0, 1, 2, 4, *(round(10 ** (k / 2)) for k in range(2, 23)))
DISTANCE_EDGES = tuple(2**k for k in range(31))
OCCURRENCE_EDGES = (1, 2, 3, *(2**k + 1 for k in range(2, 24)))
MAX_DOMAINS = 50
"""Domains with slices of their own; the smallest of more are taken together."""

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Slice:
    """One slice of tokens."""

    kind: str
    label: str
    order: int
    low: int | None = None
    high: int | None = None
    cut: int | None = None


@dataclass(frozen=True)
class Partition:
    """Slices that share out all tokens."""

    slices: tuple[Slice, ...]
    assign: Callable[[Columns], Integer[np.ndarray, "n"]]
    """Index into `slices` of each token, from the columns of a `tokens` part and `domain`."""


def partitions(
    cuts: Sequence[int],
    domains: Sequence[str],
    domain_tokens: Sequence[int],
    *,
    sliced: bool = True,
) -> list[Partition]:
    """All the ways above. The first is `all`.

    cuts           most training occurrences of an AR hit's pair, for each cut
    domain_tokens  tokens of each domain: those with none get no slice
    sliced         False for tokens without labels: only `all` and `domain`
    """
    found = [Partition((Slice("all", "all tokens", 0),), _first)]
    if sliced:
        found += [_hits(cut, place) for place, cut in enumerate(cuts)]
        found.append(
            Partition(
                (Slice("repeated", "repeated pairs", 0), Slice("new", "new pairs", 0)),
                lambda c: (c["distance"] == 0).astype(np.int64),
            )
        )
        found += [_frequency(), _frequency_by_repeat(), _distance(), _occurrence()]
    found.append(_domain(domains, domain_tokens))
    return found


class SliceSums:
    """Tokens and losses by slice and document, added up part by part."""

    def __init__(self, ways: Sequence[Partition], num_documents: int, models: Sequence[str]):
        self.ways = tuple(ways)
        self.slices = tuple(one for way in ways for one in way.slices)
        shape = (len(self.slices), num_documents)
        self.num_tokens: Float[np.ndarray, "S N"] = np.zeros(shape)
        self.losses: dict[str, Float[np.ndarray, "S N"]] = {m: np.zeros(shape) for m in models}

    def add(self, columns: Columns, losses: Mapping[str, np.ndarray]) -> None:
        """Add tokens. Their documents are a few neighbours, in ascending order."""
        document = columns["document"].astype(np.int64)
        if not len(document):
            return
        first, width = int(document[0]), int(document[-1] - document[0]) + 1
        row = 0
        for way in self.ways:
            rows = slice(row, row + len(way.slices))
            row = rows.stop
            cell = way.assign(columns) * width + (document - first)

            def total(weights: np.ndarray | None, cell=cell, way=way) -> np.ndarray:
                counted = np.bincount(cell, weights, minlength=len(way.slices) * width)
                return counted.reshape(len(way.slices), width)

            here = (rows, slice(first, first + width))
            self.num_tokens[here] += total(None)
            for model, loss in losses.items():
                self.losses[model][here] += total(loss.astype(np.float64))

    def present(self) -> Integer[np.ndarray, "P"]:
        """Slices that have tokens."""
        return np.flatnonzero(self.num_tokens.sum(1) > 0)


def _first(columns: Columns) -> np.ndarray:
    return np.zeros(len(columns["document"]), dtype=np.int64)


def _hits(cut: int, place: int) -> Partition:
    slices = (
        Slice("ar_hit", f"AR hits, at most {cut:,} in training", 2 * place, cut=cut),
        Slice("other", f"other tokens at cut {cut:,}", 2 * place + 1, cut=cut),
    )
    return Partition(slices, lambda columns: 1 - is_hit(columns, cut).astype(np.int64))


def is_hit(columns: Columns, cut: int) -> np.ndarray:
    """Which tokens are AR hits at a cut."""
    return (columns["distance"] > 0) & (columns["train_count"] <= cut)


def _binned(kind: str, edges: Sequence[int]) -> tuple[Slice, ...]:
    highs: list[int | None] = [edge - 1 for edge in edges[1:]]
    return tuple(
        Slice(kind, _range_label(low, high), order, low, high)
        for order, (low, high) in enumerate(zip(edges, [*highs, None], strict=True), start=1)
    )


def _range_label(low: int, high: int | None) -> str:
    if high is None:
        return f"{low:,} and more"
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _bin(values: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """0 below the first edge, then 1 for the first bin, and so on."""
    return np.searchsorted(np.asarray(edges), values, side="right")


def _frequency() -> Partition:
    slices = (Slice("frequency", "no pair", 0), *_binned("frequency", FREQUENCY_EDGES))
    return Partition(slices, lambda columns: _bin(columns["train_count"], FREQUENCY_EDGES))


def _frequency_by_repeat() -> Partition:
    new = (Slice("frequency_new", "no pair", 0), *_binned("frequency_new", FREQUENCY_EDGES))
    repeated = _binned("frequency_repeated", FREQUENCY_EDGES)

    def assign(columns: Columns) -> np.ndarray:
        place = _bin(columns["train_count"], FREQUENCY_EDGES)
        return np.where(columns["distance"] > 0, len(new) + place - 1, place)

    return Partition((*new, *repeated), assign)


def _distance() -> Partition:
    slices = (
        Slice("distance", "no earlier occurrence", 0),
        *_binned("distance", DISTANCE_EDGES),
    )
    return Partition(slices, lambda columns: _bin(columns["distance"], DISTANCE_EDGES))


def _occurrence() -> Partition:
    slices = (
        Slice("occurrence", "0", 0, 0, 0),
        *_binned("occurrence", OCCURRENCE_EDGES),
    )
    return Partition(slices, lambda columns: _bin(columns["occurrence"], OCCURRENCE_EDGES))


def _domain(domains: Sequence[str], domain_tokens: Sequence[int]) -> Partition:
    tokens = np.asarray(domain_tokens)
    largest = np.argsort(-tokens, kind="stable")
    kept = np.sort(largest[: MAX_DOMAINS if len(tokens) > MAX_DOMAINS else None])
    slices = [Slice("domain", domains[int(i)] or "(none)", order) for order, i in enumerate(kept)]
    place = np.full(len(tokens), len(kept))
    place[kept] = np.arange(len(kept))
    if len(kept) < len(tokens):
        rest = f"{len(tokens) - len(kept)} other domains"
        slices.append(Slice("domain", rest, len(kept)))
    return Partition(tuple(slices), lambda columns: place[columns["domain"]])
