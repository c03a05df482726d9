"""Splits: equal for equal seeds, never sharing a row, in mixtures of any kind."""

# pyright: reportArgumentType=false
# Wrong types are handed over on purpose.

import itertools
import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from recallzoo.errors import InvalidConfig
from recallzoo.run import describe
from recallzoo.tasks import Batch, Data, Segment, make_split, make_splits, registry, task
from recallzoo.tasks._data import row_hashes


def rows_of(batches: list[Batch]) -> set[str]:
    return {str(row) for batch in batches for row in batch.tokens.tolist()}


def tiny(num_pairs: int = 2, seq_len: int = 12, vocab_size: int = 8):
    return task("mqar", vocab_size=vocab_size, num_pairs=num_pairs, seq_len=seq_len, power=1.0)


def test_splits_of_a_tiny_vocabulary_share_no_row():
    # 3 * 2 keys, 4 * 3 values and 4 * 3 places of queries: 864 rows.
    data = Data.of(tiny(), train=600, valid=300, test=300)
    splits = make_splits(data)
    rows = {split: rows_of(batches) for split, batches in splits.items()}
    for a, b in itertools.combinations(rows.values(), 2):
        assert a.isdisjoint(b)
    assert [len(batches[0]) for batches in splits.values()] == [600, 300, 300]
    independent = [tiny().sample(torch.arange(n), n).tokens for n in (600, 300)]
    overlap = {str(r) for r in independent[0].tolist()} & {str(r) for r in independent[1].tolist()}
    assert overlap, "without redrawing these sizes do overlap"


@pytest.mark.parametrize("name", list(registry))
def test_splits_of_every_task_share_no_row(name: str):
    config = task(name, vocab_size=24)
    splits = make_splits(Data.of(config, train=500, valid=200, test=200))
    rows = [rows_of(batches) for batches in splits.values()]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(rows, 2))


@given(seed=st.integers(), sizes=st.tuples(*[st.integers(1, 200)] * 3))
def test_splits_made_one_by_one_equal_those_made_together(seed: int, sizes):
    train, valid, test = sizes
    data = Data.of(tiny(), train=train, valid=valid, test=test, seed=seed)
    together = make_splits(data)
    for split, batches in together.items():
        alone = make_split(data, split)
        assert torch.equal(batches[0].tokens, alone[0].tokens)
        assert torch.equal(batches[0].answers, alone[0].answers)
    given_earlier = make_split(data, "test", exclude=together["train"] + together["valid"])
    assert torch.equal(given_earlier[0].tokens, together["test"][0].tokens)


def test_seeds_and_segments_and_splits_draw_different_rows():
    segment = Segment(task=task("mqar"), num_examples=50)
    data = Data(train=(segment, segment), valid=(segment,), test=(segment,))
    other = Data(train=(segment, segment), valid=(segment,), test=(segment,), seed=1)
    rows = [
        rows_of([batch])
        for each in (data, other)
        for batches in make_splits(each).values()
        for batch in batches
    ]
    assert len(rows) == 8
    assert len(set.union(*rows)) == 8 * 50


def test_a_mixture_keeps_its_segments_apart_and_in_order():
    segments = [
        Segment(task=tiny(num_pairs=pairs, seq_len=seq_len), num_examples=n)
        for pairs, seq_len, n in ((1, 8, 30), (2, 16, 20), (3, 24, 10))
    ]
    data = Data(train=tuple(segments[:2]), valid=(segments[1],), test=tuple(segments[1:]))
    assert (data.vocab_size, data.max_seq_len, data.num_streams) == (8, 24, 1)
    splits = make_splits(data)
    assert [tuple(b.tokens.shape) for b in splits["train"]] == [(30, 8), (20, 16)]
    assert [tuple(b.tokens.shape) for b in splits["test"]] == [(20, 16), (10, 24)]
    assert rows_of(splits["train"]).isdisjoint(rows_of(splits["test"]))
    assert splits["test"][1].slices["num_pairs"].unique().tolist() == [3]


def test_a_row_may_occur_twice_within_a_split():
    train = make_splits(Data.of(tiny(), train=600, valid=10, test=10))["train"][0]
    assert 300 < len(train.tokens.unique(dim=0)) < 600


def test_replaced_rows_leave_all_others_where_they_were():
    data = Data.of(tiny(), train=300, valid=100, test=100)
    valid = make_split(data, "valid")[0]
    unfiltered = make_split(data, "valid", exclude=[])[0]
    kept = (valid.tokens == unfiltered.tokens).all(dim=1)
    known = rows_of(make_split(data, "train"))
    for i in range(100):
        assert kept[i] == (str(unfiltered.tokens[i].tolist()) not in known)


def test_splits_draw_from_different_rows_to_begin_with():
    data = Data.of(task("mqar"), train=100, valid=100, test=100)
    splits = [rows_of(make_split(data, s, exclude=[])) for s in ("train", "valid", "test")]
    assert len(set.union(*splits)) == 300


def test_a_task_with_too_few_rows_is_refused_with_the_numbers():
    data = Data.of(tiny(num_pairs=1, seq_len=4, vocab_size=4), train=1000, valid=20, test=20)
    with pytest.raises(InvalidConfig) as error:
        make_split(data, "valid")
    message = str(error.value)
    for part in ("mqar has too few different rows", "20 valid examples", "vocab_size", "4 and 4"):
        assert part in message


@given(seed=st.integers(0, 1000))
def test_equal_rows_have_equal_hashes_and_different_rows_different_ones(seed: int):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 3, (200, 5), generator=generator)
    hashes = row_hashes(tokens, chunk_tokens=17)
    assert torch.equal(hashes, row_hashes(tokens))
    same_rows = (tokens[:, None] == tokens[None]).all(dim=2)
    assert torch.equal(same_rows, hashes[:, None] == hashes[None])
    padded = torch.nn.functional.pad(tokens, (0, 1))
    assert not torch.isin(row_hashes(padded), hashes).any()


def test_a_configuration_is_plain_json():
    data = Data.of(task("forgetting"), train=10, valid=2, test=3, seed=4)
    described = json.loads(json.dumps(describe(data), allow_nan=False))
    assert described["seed"] == 4
    assert described["test"][0]["num_examples"] == 3
    assert described["test"][0]["task"]["task"] == "forgetting"
    assert described["test"][0]["task"]["update_order"] == "after_pairs"


SEGMENT = Segment(task=task("mqar"), num_examples=5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segment(task=task("mqar"), num_examples=0), "num_examples=0 must be at least 1"),
        (lambda: Segment(task=task("mqar"), num_examples=1e5), "num_examples wants a whole number"),
        (lambda: Segment(task="mqar", num_examples=5), "segment.task wants Task, got 'mqar'"),
        (lambda: Data.of(task("mqar"), seed=0.5), "data.seed wants a whole number, got 0.5"),
        (lambda: Data.of("mqar"), "segment.task wants Task"),
        (lambda: Data(train=(), valid=(SEGMENT,), test=(SEGMENT,)), "data.train wants at least"),
        (lambda: Data(train=SEGMENT, valid=(SEGMENT,), test=(SEGMENT,)), "in a tuple"),
        (lambda: Data(train=(SEGMENT,), valid=(5,), test=(SEGMENT,)), "data.valid wants"),
        (
            lambda: Data(
                train=(SEGMENT,),
                valid=(SEGMENT,),
                test=(Segment(task=task("stacked"), num_examples=5),),
            ),
            "mqar reads 1, stacked reads 2",
        ),
        (lambda: make_split(Data.of(task("mqar")), "dev"), "one of 'train', 'valid', 'test'"),
    ],
)
def test_what_cannot_be_data_is_refused(make, message: str):
    with pytest.raises(InvalidConfig) as error:
        make()
    assert message in str(error.value)


def test_segments_given_as_a_list_are_the_same_data():
    as_list = Data(train=[SEGMENT], valid=[SEGMENT], test=[SEGMENT])
    assert as_list == Data(train=(SEGMENT,), valid=(SEGMENT,), test=(SEGMENT,))
    assert hash(as_list) == hash(as_list)
