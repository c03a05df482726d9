"""What counts and labels mean, as loops over dictionaries: slow and obvious."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

Pair = tuple[int, int]


def count_pairs(documents: Sequence[Sequence[int]]) -> Counter[Pair]:
    """Adjacent pairs of every document."""
    counts: Counter[Pair] = Counter()
    for tokens in documents:
        counts.update(itertools.pairwise(tokens))
    return counts


def label_row(
    tokens: Sequence[int], train: Mapping[Pair, int], document_ids: Sequence[int] | None = None
) -> list[dict[str, int]]:
    """For each token: is its pair a repeat, how far back, how often before, count in training."""
    documents = list(document_ids) if document_ids is not None else [0] * len(tokens)
    labels = []
    seen: dict[Pair, list[int]] = {}
    for t in range(len(tokens)):
        if t == 0 or documents[t] != documents[t - 1]:
            seen = {}
        label = {"is_repeat": 0, "distance": 0, "occurrence": 0, "train_count": -1}
        labels.append(label)
        if t == 0 or documents[t] != documents[t - 1] or documents[t] < 0:
            continue
        pair = (tokens[t - 1], tokens[t])
        label["train_count"] = train.get(pair, 0)
        earlier = seen.setdefault(pair, [])
        if earlier:
            label |= {"is_repeat": 1, "distance": t - earlier[-1], "occurrence": len(earlier)}
        earlier.append(t)
    return labels


def ar_hits(
    tokens: Sequence[int],
    train: Mapping[Pair, int],
    max_count: int,
    document_ids: Sequence[int] | None = None,
) -> list[bool]:
    """The definition of an AR hit."""
    return [
        bool(label["is_repeat"]) and label["train_count"] <= max_count
        for label in label_row(tokens, train, document_ids)
    ]
