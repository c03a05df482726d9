"""Slices share out all tokens, and their sums are those of a loop over tokens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recallzoo.evaluate.slices import MAX_DOMAINS, SliceSums, is_hit, partitions


def columns(seed: int, num_tokens: int = 400, num_documents: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    repeated = rng.random(num_tokens) < 0.4
    document = np.sort(rng.integers(0, num_documents, num_tokens))
    return {
        "document": document.astype(np.uint32),
        "distance": np.where(repeated, rng.geometric(0.01, num_tokens), 0).astype(np.int32),
        "occurrence": np.where(repeated, rng.geometric(0.3, num_tokens), 0).astype(np.int32),
        "train_count": np.floor(10 ** rng.uniform(-1, 9, num_tokens)).astype(np.int64)
        - (rng.random(num_tokens) < 0.05),
        "domain": (document % 3).astype(np.uint16),
    }


@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 10**6))
def test_every_way_to_slice_counts_each_token_once(seed, cut):
    table = columns(seed)
    ways = partitions([0, cut], ["a", "b", "c"], [1, 1, 1])
    for way in ways:
        place = way.assign(table)
        assert place.shape == table["document"].shape
        assert ((place >= 0) & (place < len(way.slices))).all()
    sums = SliceSums(ways, 7, ["m"])
    sums.add(table, {"m": np.random.default_rng(seed).random(400).astype(np.float32)})
    row = 0
    for way in ways:
        rows = slice(row, row + len(way.slices))
        row = rows.stop
        assert np.array_equal(sums.num_tokens[rows].sum(0), sums.num_tokens[0])
        assert np.allclose(sums.losses["m"][rows].sum(0), sums.losses["m"][0])


@given(seed=st.integers(0, 2**32 - 1), pieces=st.integers(1, 6))
def test_sums_are_those_of_a_loop_over_tokens_however_they_come(seed, pieces):
    table, rng = columns(seed), np.random.default_rng(seed)
    loss = rng.random(400).astype(np.float32)
    ways = partitions([30], ["a", "b", "c"], [5, 5, 5])
    sums = SliceSums(ways, 7, ["m"])
    for some in np.array_split(np.arange(400), pieces):
        sums.add({name: column[some] for name, column in table.items()}, {"m": loss[some]})
    place = {(one.kind, one.cut, one.label): i for i, one in enumerate(sums.slices)}
    expected = np.zeros_like(sums.losses["m"])
    for i in range(400):
        doc, distance, count = (table[n][i] for n in ("document", "distance", "train_count"))
        hit = distance > 0 and count <= 30
        names: list[tuple[str, int | None, str]] = [("all", None, "all tokens")]
        names.append(
            ("ar_hit", 30, "AR hits, at most 30 in training")
            if hit
            else ("other", 30, "other tokens at cut 30")
        )
        names.append(("domain", None, "abc"[doc % 3]))
        for name in names:
            expected[place[name], doc] += loss[i]
        found = [
            one
            for one in sums.slices
            if one.kind == "distance"
            and one.low is not None
            and one.low <= distance <= (one.high or distance)
        ]
        one = found[0] if distance else None
        label = "no earlier occurrence" if one is None else one.label
        expected[place["distance", None, label], doc] += loss[i]
    for name in place:
        if name[0] in ("all", "ar_hit", "other", "domain", "distance"):
            assert np.allclose(sums.losses["m"][place[name]], expected[place[name]])


def test_bins_hold_the_numbers_their_labels_say():
    table = {
        "distance": np.array([0, 1, 2, 3, 4, 2**31 - 1]),
        "occurrence": np.array([0, 1, 2, 3, 4, 5]),
        "train_count": np.array([-1, 0, 1, 3, 9, 10**12]),
        "document": np.zeros(6, dtype=np.uint32),
        "domain": np.zeros(6, dtype=np.uint16),
    }
    ways = {way.slices[0].kind: way for way in partitions([4], ["a"], [6])}

    def labels(kind: str) -> list[str]:
        return [ways[kind].slices[i].label for i in ways[kind].assign(table)]

    assert labels("distance") == [
        "no earlier occurrence", "1", "2 to 3", "2 to 3", "4 to 7", "1,073,741,824 and more",
    ]  # fmt: skip
    assert labels("occurrence") == ["0", "1", "2", "3 to 4", "3 to 4", "5 to 8"]
    assert labels("frequency") == [
        "no pair", "0", "1", "2 to 3", "4 to 9", "100,000,000,000 and more",
    ]  # fmt: skip
    assert is_hit(table, 4).tolist() == [False, True, True, True, False, False]


def test_more_domains_than_a_page_has_room_for_are_taken_together():
    number = MAX_DOMAINS + 5
    way = partitions([], [str(i) for i in range(number)], range(number), sliced=False)[-1]
    place = way.assign({"domain": np.arange(number)})
    assert [way.slices[i].label for i in place[:6]] == ["5 other domains"] * 5 + ["5"]
    assert len(way.slices) == MAX_DOMAINS + 1
