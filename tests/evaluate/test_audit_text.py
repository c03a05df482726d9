"""Windows score each token once, with the context they say; tokens give back their text."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from recallzoo.errors import UserError
from recallzoo.evaluate.audit_text import AuditText, Windows, as_prepared, retokenised
from recallzoo.evaluate.token_text import TokenText
from recallzoo.text import TokenData
from recallzoo.text.tokenizer import load_encoder
from tests.evaluate.making import make_byte_tokenizer, make_data
from tests.text import definitions


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TokenData:
    return make_data(tmp_path_factory.mktemp("audit_text") / "data")


@pytest.fixture(scope="module")
def text(data) -> AuditText:
    return as_prepared(data.split("test"), 600)


def visible(text: AuditText, place: int, context: int, stride: int, bos: str, documents: str):
    """First stream place that the model sees when it predicts the token at `place`, by walking
    from window to window; None if the token is not scored."""
    offsets = text.document_offsets
    low, high = 0, text.num_tokens
    if documents == "separate":
        document = int(np.searchsorted(offsets, place, side="right")) - 1
        low, high = int(offsets[document]), int(offsets[document + 1])
    length = context + (bos == "none")
    start = low
    while start + length <= place and start + length < high:
        start += stride
    return None if bos == "none" and place == low else start


CASES = [
    (context, stride, bos, documents)
    for context, stride in ((16, 16), (16, 5), (16, 1), (300, 300))
    for bos in ("none", "prepend")
    for documents in ("packed", "separate")
]


@pytest.mark.parametrize(("context", "stride", "bos", "documents"), CASES)
def test_each_token_is_scored_once_in_the_window_that_is_promised(
    data, text, context, stride, bos, documents
):
    windows = Windows(
        text, context=context, stride=stride, bos=bos, documents=documents, part_tokens=100
    )
    assert windows.num_parts > 1
    counts = data.pair_counts()
    train = counts.as_dict()
    scored = {}
    for number in range(windows.num_parts):
        part = windows.part(number)
        labels = part.labels(counts)
        assert windows.scored_in([number]) == len(part.keys["token"])
        rows, columns = (index.numpy() for index in part.is_scored.nonzero(as_tuple=True))
        slow = [
            definitions.label_row(row.tolist(), train, ids.tolist())
            for row, ids in zip(part.tokens, part.document_ids, strict=True)
        ]
        for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
            document, position = (int(part.keys[n][i]) for n in ("document", "position"))
            place = int(text.document_offsets[document]) + position
            assert place not in scored
            scored[place] = place - column
            assert text.read(place, place + 1)[0] == part.keys["token"][i]
            for name in ("distance", "occurrence", "train_count"):
                assert labels[name][i] == slow[row][column][name]
    expected = {
        place: visible(text, place, context, stride, bos, documents)
        for place in range(text.num_tokens)
    }
    assert scored == {place: start for place, start in expected.items() if start is not None}
    assert len(scored) == windows.num_scored
    missing = [place for place, start in expected.items() if start is None]
    assert windows.unscored.tolist() == missing
    assert max(place - start for place, start in scored.items()) <= context


def test_bytes_of_scored_text_leave_out_boundaries_and_what_is_not_scored(data, text):
    whole = Windows(
        text, context=16, stride=16, bos="prepend", documents="separate", part_tokens=10**6
    )
    assert whole.num_bytes == text.document_bytes.sum()
    without = Windows(
        text, context=16, stride=16, bos="none", documents="separate", part_tokens=10**6
    )
    first = [
        text.token_text.bytes_of(int(text.read(o, o + 1)[0])) for o in without.unscored.tolist()
    ]
    assert without.num_bytes == whole.num_bytes - sum(map(len, first))


def test_only_whole_documents_are_left_out_and_it_is_said(data):
    split = data.split("test")
    few = as_prepared(split, 600)
    assert few.num_tokens <= 600 < split.document_offsets[few.num_documents + 1]
    assert f"first {few.num_documents} of {split.num_documents}" in few.notes[0]
    assert as_prepared(split, 10**9).notes == ()
    assert as_prepared(split, 1).num_documents == 1


def test_a_text_of_nothing_but_first_tokens_cannot_be_scored(tmp_path):
    source = tmp_path / "one.jsonl"
    source.write_text("".join(f'{{"text": "{c}", "id": "{c}"}}\n' for c in "abc"))
    data = make_data(
        tmp_path / "data", sources=(), train=(str(source),), boundary="none",
        valid_fraction=None, test_fraction=None, vocab_size=300,
    )  # fmt: skip
    with pytest.raises(UserError, match="--bos prepend"):
        Windows(
            as_prepared(data.split("train")),
            context=8, stride=8, bos="none", documents="separate", part_tokens=100,
        )  # fmt: skip


def test_another_tokenizer_sees_the_same_documents(data, text, tmp_path):
    folder = make_byte_tokenizer(tmp_path / "bytes")
    other = retokenised(text, load_encoder(str(folder)), TokenText.load(folder), "bytes")
    assert other.notes == text.notes
    assert other.num_documents == text.num_documents
    assert (np.diff(other.document_offsets) == text.document_bytes + 1).all()
    for document in range(text.num_documents):
        texts = []
        for one in (text, other):
            start, stop = one.document_offsets[document : document + 2]
            tokens = one.read(int(start), int(stop))
            assert tokens[-1] == one.boundary.id
            texts.append(one.token_text.decode(tokens[:-1].tolist()))
        assert texts[0] == texts[1]


@given(content=st.text(max_size=40))
def test_the_bytes_of_tokens_are_those_of_the_text(data, content):
    token_text = TokenText.load(data.tokenizer_folder)
    ids = load_encoder(str(data.tokenizer_folder)).encode([content])[0]
    assert b"".join(map(token_text.bytes_of, ids)) == content.encode()


def test_bytes_that_are_no_text_on_their_own_are_written_out(data):
    token_text = TokenText.load(data.tokenizer_folder)
    ids = load_encoder(str(data.tokenizer_folder)).encode(["\u2603 <b>"])[0]
    assert "".join(map(token_text.shown, ids)) == "\\xe2\\x98\\x83 <b>"
    assert token_text.shown(10**6) == ""


def test_tokens_of_other_kinds_of_tokenizers_are_read_too():
    pieces = ["<0x41>", "▁the", "##ing", "x"]
    words = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="x"))
    token_text = TokenText(words)
    assert [token_text.bytes_of(i) for i in range(4)] == [b"A", b" the", b"ing", b"x"]


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        TokenText.load(tmp_path)
