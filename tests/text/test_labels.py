"""Labels against their definition by loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recallzoo.errors import UserError
from recallzoo.text import (
    PAPER_RATE,
    PairCounts,
    label_ar_hits,
    label_pairs,
    labels,
    max_count_from_rate,
)
from tests.text import corpora, definitions

FIELDS = ("is_repeat", "distance", "occurrence", "train_count")


@pytest.fixture(params=["cpu", "cuda"], autouse=True)
def sort_method(request, monkeypatch):
    """Both ways to sort rows, whatever machine this is."""
    packed, pairs = labels._sort_packed, labels._sort_pairs
    if request.param == "cuda":
        monkeypatch.setattr(
            labels,
            "_sort_packed",
            lambda rows, bits: (pairs if 2 * bits <= 32 else packed)(rows, bits),
        )


@st.composite
def contexts(draw):
    """Rows of few distinct ids (so that pairs repeat), documents and padding, training counts."""
    B, T = draw(st.integers(1, 4)), draw(st.integers(0, 40))
    vocab_size = draw(st.sampled_from([1, 2, 5, 30000]))
    ids = st.integers(0, vocab_size - 1)
    pool = draw(st.lists(ids, min_size=1, max_size=6))
    rows = [[draw(st.sampled_from(pool)) for _ in range(T)] for _ in range(B)]
    documents = None
    if draw(st.booleans()):
        documents = []
        for _ in range(B):
            row, document = [], 0
            for _ in range(T):
                document += draw(st.sampled_from([0, 0, 0, 1]))
                row.append(document if document % 5 != 4 else -1)
            documents.append(row)
    train = draw(
        st.dictionaries(st.tuples(st.sampled_from(pool), st.sampled_from(pool)), st.integers(0, 6))
    )
    return rows, documents, train, vocab_size


def tensor(rows):
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)


def expected(rows, train, documents=None):
    documents = documents or [None] * len(rows)
    made = [definitions.label_row(r, train, d) for r, d in zip(rows, documents, strict=True)]
    return {name: [[label[name] for label in row] for row in made] for name in FIELDS}


@given(contexts(), st.integers(0, 6))
def test_labels_equal_the_dictionary_loop(case, max_count):
    rows, documents, train, vocab_size = case
    table = PairCounts.from_dict(train, vocab_size=vocab_size)
    document_ids = None if documents is None else tensor(documents)
    want = expected(rows, train, documents)
    for counts in (table, train):
        got = label_pairs(tensor(rows), counts, document_ids=document_ids)
        for name in FIELDS:
            assert getattr(got, name).int().tolist() == want[name], name
        hits = label_ar_hits(tensor(rows), counts, max_count, document_ids=document_ids)
        assert hits.dtype == torch.bool
        assert torch.equal(hits, got.hits(max_count))
        assert hits.tolist() == [
            definitions.ar_hits(row, train, max_count, None if documents is None else documents[i])
            for i, row in enumerate(rows)
        ]


@given(st.integers(0, 2**32 - 1), st.sampled_from([17, 300, 2048]))
def test_labels_of_text_like_rows_equal_the_loop(seed, T):
    rng = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, 201).float()
    rows = torch.multinomial(weights, 3 * T, replacement=True, generator=rng).view(3, T)
    train = definitions.count_pairs(rows[:2].tolist())
    got = label_pairs(rows, PairCounts.from_dict(train))
    want = expected(rows.tolist(), train)
    for name in FIELDS:
        assert getattr(got, name).int().tolist() == want[name], name


def test_labels_of_real_sentences_equal_the_loop():
    words: dict[str, int] = {}
    rows = [
        [words.setdefault(word, len(words)) for word in document["text"].split()][:60]
        for document in corpora.documents(30)
    ]
    T = max(map(len, rows))
    documents = [[i] * len(row) + [-1] * (T - len(row)) for i, row in enumerate(rows)]
    train = definitions.count_pairs(rows[:20])
    padded = [row + [-100] * (T - len(row)) for row in rows]
    got = label_ar_hits(tensor(padded), train, 2, document_ids=tensor(documents))
    assert got.any()
    assert got.tolist() == [
        definitions.ar_hits(row, train, 2) + [False] * (T - len(row)) for row in rows
    ]


@pytest.mark.parametrize(
    ("tokens", "hits"),
    [
        ([], []),
        ([7], [0]),
        ([7, 7], [0, 0]),
        ([7, 7, 7], [0, 0, 1]),
        ([7, 7, 7, 7], [0, 0, 1, 1]),
        ([1, 2, 1, 2], [0, 0, 0, 1]),
        ([1, 2, 3, 2, 1, 2], [0, 0, 0, 0, 0, 1]),
    ],
)
def test_edge_cases_of_the_docstring(tokens, hits):
    row = torch.tensor(tokens, dtype=torch.int64)
    assert label_ar_hits(row, {}, 0).int().tolist() == hits


def test_the_cut_is_inclusive():
    row = torch.tensor([1, 2, 1, 2])
    assert label_ar_hits(row, {(1, 2): 3}, 3).tolist() == [False, False, False, True]
    assert not label_ar_hits(row, {(1, 2): 3}, 2).any()


def test_pairs_neither_span_documents_nor_repeat_across_them():
    row = torch.tensor([1, 2, 1, 2, 1, 2, 1, 2])
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    #                          -  12 21  |  -21 12 -21(repeat) 12(repeat)
    hits = label_ar_hits(row, {}, 0, document_ids=documents)
    assert hits.int().tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_a_document_number_that_comes_back_is_another_document():
    row = torch.tensor([1, 2, 5, 1, 2])
    documents = torch.tensor([3, 3, 4, 3, 3])
    assert not label_ar_hits(row, {}, 0, document_ids=documents).any()


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16, torch.int64]
)
def test_integer_type_and_leading_axes_do_not_matter(dtype):
    rows = torch.randint(0, 4, (2, 3, 50), generator=torch.Generator().manual_seed(0))
    want = label_ar_hits(rows, {}, 0)
    assert want.shape == rows.shape
    assert torch.equal(label_ar_hits(rows.to(dtype), {}, 0), want)
    assert torch.equal(label_ar_hits(rows[1, 2].to(dtype), {}, 0), want[1, 2])
    assert torch.equal(label_ar_hits(rows.mT.contiguous().mT, {}, 0), want)


def test_many_rows_on_many_threads_equal_few():
    rows = torch.randint(0, 30, (700, 200), generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        many = label_pairs(rows, {(1, 1): 4})
    finally:
        torch.set_num_threads(threads)
    for i in (0, 163, 164, 699):
        alone = label_pairs(rows[i], {(1, 1): 4})
        assert torch.equal(many.distance[i], alone.distance)
        assert many.train_count is not None
        assert alone.train_count is not None
        assert torch.equal(many.train_count[i], alone.train_count)


def test_repeats_only_look_up_leaves_the_others_unknown():
    row = torch.tensor([1, 2, 1, 2])
    got = label_pairs(row, {(1, 2): 3, (2, 1): 9}, look_up="repeats")
    assert got.train_count is not None
    assert got.train_count.tolist() == [-1, -1, -1, 3]


def test_ids_of_large_vocabularies_are_exact():
    big = 2**20 - 1
    row = torch.tensor([big, 0, 1, big, 0, big, 1, big, 0])
    got = label_pairs(row, {(big, 0): 7})
    want = definitions.label_row(row.tolist(), {(big, 0): 7})
    assert got.distance.tolist() == [label["distance"] for label in want]
    assert got.train_count is not None
    assert got.train_count.tolist() == [label["train_count"] for label in want]


def test_rate_of_the_paper_gives_its_count():
    assert max_count_from_rate(PAPER_RATE, 10**10) == 1250
    assert max_count_from_rate(PAPER_RATE, 8 * 10**6) == 1
    assert max_count_from_rate(PAPER_RATE, 8 * 10**6 - 1) == 0
    with pytest.raises(UserError, match="share of training tokens"):
        max_count_from_rate(1250, 10**10)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: label_ar_hits(torch.tensor([1.0, 2.0]), {}, 0), "integer tensor"),
        (lambda: label_ar_hits([1, 2], {}, 0), "got list"),  # pyright: ignore
        (lambda: label_ar_hits(torch.tensor([1, -2]), {}, 0), "0 or more, got -2"),
        (lambda: label_ar_hits(torch.tensor([1, 2]), {}, -1), "max_count"),
        (lambda: label_ar_hits(torch.tensor([1, 2]), {}, 1.25e-7), "max_count_from_rate"),  # pyright: ignore
        (lambda: label_ar_hits(torch.tensor([1, 2]), {}, True), "max_count"),
        (
            lambda: label_ar_hits(torch.tensor([1, 2]), {}, 0, document_ids=torch.tensor([1])),
            r"shape of tokens, \[2\]",
        ),
        (
            lambda: label_ar_hits(
                torch.tensor([1, 2, 9]), PairCounts.from_dict({(1, 2): 3}, vocab_size=9), 0
            ),
            "token id 9 is past the vocabulary",
        ),
        (lambda: label_pairs(torch.tensor([1, 2]), {}, look_up="some"), "look_up"),
        (lambda: label_pairs(torch.tensor([1, 2])).hits(3), "without pair counts"),
        (lambda: label_pairs(torch.tensor([2**40, 2])), "do not fit"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
