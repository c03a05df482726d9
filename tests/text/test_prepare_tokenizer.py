"""The tokenizer that text is prepared with: trained, given, and the pieces that it reads."""

import dataclasses
import json
import random
import re
import shutil

import pytest
from tokenizers import Tokenizer

from recallzoo.errors import UserError
from recallzoo.text import _parts, open_data, prepare, tokenizer_hash
from tests.text import corpora
from tests.text.little import ROWS, made, options, texts


@pytest.mark.parametrize(("boundary", "extra"), [("start", 1), ("none", 0)])
def test_boundary_choices_are_kept(tmp_path, finished, boundary, extra):
    data = made(tmp_path / "data", boundary=boundary)
    assert data.boundary.position == boundary
    train, theirs = data.split("train"), open_data(finished).split("train")
    assert train.num_tokens == theirs.num_tokens - (1 - extra) * theirs.num_documents
    if extra:
        firsts = train.document_offsets[:-1]
        assert all(train.read(int(at), int(at) + 1)[0] == data.boundary.id for at in firsts)


def test_a_given_tokenizer_is_used_as_file_and_as_folder(tmp_path, finished):
    folder = open_data(finished).tokenizer_folder
    as_folder = made(tmp_path / "a" / "data", vocab_size=None, tokenizer=str(folder))
    as_file = made(
        tmp_path / "b" / "data",
        vocab_size=None,
        tokenizer=str(folder / "tokenizer.json"),
        boundary_token="<|endoftext|>",
    )
    for data in (as_folder, as_file):
        assert data.tokenizer_hash == open_data(finished).tokenizer_hash
        assert data.split("train").checksum == open_data(finished).split("train").checksum
    with pytest.raises(UserError, match="--boundary-token"):
        made(tmp_path / "c" / "data", vocab_size=None, tokenizer=str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="'<eos>' is not in the vocabulary"):
        made(
            tmp_path / "d" / "data",
            vocab_size=None,
            tokenizer=str(folder),
            boundary_token="<eos>",
        )


def test_transformers_loads_the_tokenizer_and_agrees_on_its_hash(finished):
    from transformers import AutoTokenizer

    data = open_data(finished)
    loaded = AutoTokenizer.from_pretrained(data.tokenizer_folder)
    assert tokenizer_hash(loaded) == data.tokenizer_hash
    ids = loaded(ROWS[0]["text"], add_special_tokens=False)["input_ids"]
    assert loaded.eos_token == "<|endoftext|>"
    documents = data.split("train").documents()["id"].to_list()
    at = documents.index(next(row["id"] for row in ROWS if row["id"] in documents))
    text = next(row["text"] for row in ROWS if row["id"] == documents[at])
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert ids == data.split("train").document(at).tolist()[:-1]


def test_a_tokenizer_saved_again_by_transformers_keeps_its_hash(finished, tmp_path):
    from transformers import AutoTokenizer

    data = open_data(finished)
    AutoTokenizer.from_pretrained(data.tokenizer_folder).save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == data.tokenizer_hash


@pytest.mark.parametrize("between", ["\n", " ", ".\r\n" + " " * 40, "\n" * 40])
def test_long_documents_are_encoded_in_pieces_to_the_same_ids(
    tmp_path, monkeypatch, between, capsys
):
    rows = [{"text": between.join(row["text"] for row in ROWS[:50]), "id": "long"}, *ROWS]
    corpora.json_lines(tmp_path / "corpus.jsonl", rows)
    given = options(tmp_path / "data", valid_fraction=0, test_fraction=0)
    whole = prepare(given, progress=False)
    assert whole.manifest["encoded_in_pieces"] == 0
    for characters in (2999, 3000, 3007):
        monkeypatch.setattr(_parts, "_PIECE_CHARACTERS", characters)
        pieces = prepare(
            dataclasses.replace(given, out=tmp_path / f"pieces-{characters}"), progress=False
        )
        assert pieces.manifest["encoded_in_pieces"] == 1
        assert "encoded 1 documents" in capsys.readouterr().err
        assert pieces.split("train").checksum == whole.split("train").checksum


def test_a_long_document_without_a_word_is_encoded_whole_all_the_same(tmp_path, monkeypatch):
    row = {"text": "-" * 700 + "\n" * 700, "id": "long"}
    corpora.json_lines(tmp_path / "corpus.jsonl", [row, *ROWS])
    monkeypatch.setattr(_parts, "_PIECE_CHARACTERS", 300)
    data = made(tmp_path / "data", valid_fraction=0, test_fraction=0)
    assert texts(data, "train")["long"] == row["text"]


def test_the_tokenizer_hash_follows_what_it_does_not_how_it_is_written(finished):
    data = open_data(finished)
    described = json.loads((data.tokenizer_folder / "tokenizer.json").read_text())
    old = {**described, "truncation": None}
    old["model"] = {**described["model"]}
    old["model"]["merges"] = [" ".join(merge) for merge in described["model"]["merges"]]
    assert tokenizer_hash(Tokenizer.from_str(json.dumps(old))) == data.tokenizer_hash
    old["model"]["merges"] = old["model"]["merges"][:-1]
    assert tokenizer_hash(Tokenizer.from_str(json.dumps(old))) != data.tokenizer_hash


def test_a_corpus_too_small_for_the_vocabulary_says_so(finished, tmp_path, capsys):
    data = made(tmp_path / "data", vocab_size=100_000)
    assert f"the tokenizer has {data.vocab_size:,} ids, not 100,000" in capsys.readouterr().err


def test_the_tokenizer_sample_is_the_same_whatever_the_order(tmp_path):
    rows = list(ROWS)
    random.Random(1).shuffle(rows)
    hashes = set()
    for name, ordered in (("a", ROWS), ("b", rows)):
        given = options(tmp_path / name / "data", tokenizer_sample_bytes=20_000)
        corpora.json_lines(tmp_path / name / "corpus.jsonl", ordered)
        hashes.add(prepare(given, progress=False).tokenizer_hash)
    assert len(hashes) == 1
    assert hashes != {made(tmp_path / "c" / "data").tokenizer_hash}


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_configuration_of_a_tokenizer_is_named(finished, tmp_path, content):
    shutil.copytree(open_data(finished).tokenizer_folder, tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        made(tmp_path / "data", tokenizer=str(tmp_path / "tokenizer"), vocab_size=None)
