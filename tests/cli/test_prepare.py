"""`recallzoo prepare`: its options reach the data, and mistakes are one message."""

import gc
import importlib.util
import json

import pytest
from conftest import require_mistake

from recallzoo.text import open_data
from tests.text import corpora


@pytest.fixture
def corpus(tmp_path):
    rows = [
        {"body": row["text"], "key": row["id"], "field": row["domain"], "from": row["source"]}
        for row in corpora.documents(80, words=60)
    ]
    return corpora.json_lines(tmp_path / "corpus.jsonl", rows)


FIELDS = ("--text-field", "body", "--id-field", "key", "--domain-field", "field",
          "--source-field", "from")  # fmt: skip


def test_a_corpus_is_prepared_and_what_became_of_it_printed(run_cli, corpus, tmp_path):
    outcome = run_cli(
        "prepare", corpus, "--out", tmp_path / "data", "--vocab-size", 300, *FIELDS,
        "--valid-fraction", 0, "--test-fraction", 0.2, "--seed", 3, "--name", "mine",
        "--shard-tokens", 2000, "--tokenizer-sample-bytes", 20000, "--on-error", "skip",
        "--memory-mib", 64, "--workers", 1, "--executor", "threads",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    data = open_data(tmp_path / "data", verify=True)
    assert data.name == "mine"
    assert data.splits == ("train", "test")
    assert data.vocab_size == 300
    assert data.domains == ("books", "légal", "wiki")
    assert len(list(data.split("train").shards())) > 1
    for name in data.splits:
        split = data.split(name)
        assert f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens" in (
            outcome.out
        )
    assert f"{data.pair_counts().num_pairs:,} in all" in outcome.out
    assert "documents end with <|endoftext|>" in outcome.out


def test_given_splits_a_given_tokenizer_and_no_counts(run_cli, corpus, tmp_path):
    made = run_cli("prepare", corpus, "--out", tmp_path / "first", "--vocab-size", 300, *FIELDS,
                   "--valid-fraction", 0.1, "--test-fraction", 0.1)  # fmt: skip
    assert made.code == 0, made.err
    lines = tmp_path / "lines.txt"
    lines.write_text("one line\nanother line\n")
    outcome = run_cli(
        "prepare", "--train", lines, "--valid", lines, "--test", lines,
        "--text-documents", "line", "--tokenizer", tmp_path / "first" / "tokenizer",
        "--boundary", "start", "--boundary-token", "<|endoftext|>", "--no-count-pairs",
        "--out", tmp_path / "second",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    data = open_data(tmp_path / "second")
    assert data.tokenizer_hash == open_data(tmp_path / "first").tokenizer_hash
    assert data.split("valid").num_documents == 2
    assert data.boundary.position == "start"
    assert not (tmp_path / "second" / "pair_counts").exists()
    assert "pair counts" not in outcome.out


def test_the_same_command_again_keeps_and_overwrite_replaces(run_cli, corpus, tmp_path):
    def command(*more):
        return run_cli("prepare", corpus, "--out", tmp_path / "data", "--vocab-size", 300,
                       *FIELDS, "--valid-fraction", 0.1, "--test-fraction", 0.1, *more)  # fmt: skip

    first, again = command(), command()
    assert (first.code, again.code) == (0, 0)
    assert again.out == first.out
    require_mistake(command("--seed", 1), "seed was 0 and is now 1", "--overwrite")
    assert command("--seed", 1, "--overwrite").code == 0
    plan = json.loads((tmp_path / "data" / "manifest.json").read_text())["plan"]
    assert plan["options"]["seed"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("give either sources",)),
        (("{corpus}", "--train", "{corpus}"), ("not both",)),
        (("no_such_file.jsonl",), ("no_such_file.jsonl",)),
        (("{corpus}",), ("text", "corpus.jsonl")),
        (("{corpus}", "--tokenizer", "t", "--vocab-size", "300"), ("vocab_size",)),
        (("{corpus}", "--vocab-size", "20", *FIELDS), ("vocab_size=20",)),
        (("hf:",), ("'hf:' names no dataset", "hf:NAME:CONFIG:SPLIT")),
        (("hf:a:b:c:d",), ("'hf:a:b:c:d' names no dataset",)),
    ],
)
def test_a_mistake_is_one_message_and_leaves_no_data(run_cli, corpus, tmp_path, arguments, words):
    given = [argument.replace("{corpus}", str(corpus)) for argument in arguments]
    outcome = run_cli("prepare", *given, "--out", tmp_path / "data")
    require_mistake(outcome, *words)
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_source_that_could_not_be_read_keeps_none_out_of_the_folder_and_one_that_was_does(
    run_cli, corpus, tmp_path
):
    def command(*more):
        return run_cli("prepare", corpus, "--out", tmp_path / "data", "--vocab-size", 300, *more)

    require_mistake(command(), "corpus.jsonl")
    tenths = ("--valid-fraction", 0.1, "--test-fraction", 0.1)
    no_ids = ("--text-field", "body", "--id-field", "field")
    require_mistake(command(*no_ids, *tenths), "books")  # once all was read
    require_mistake(command(*FIELDS, *tenths), "id_field was 'field' and is now 'key'")
    assert command(*FIELDS, *tenths, "--overwrite").code == 0


@pytest.mark.parametrize(
    "advised",
    [("--text-documents", "line"), ("--valid-fraction", 0, "--test-fraction", 0)],
)
def test_a_book_of_one_document_is_split_as_the_refusal_advises(run_cli, tmp_path, advised):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {i} of this book\n" for i in range(1000)))

    def command(*more):
        return run_cli("prepare", book, "--out", tmp_path / "data", "--vocab-size", 300, *more)

    require_mistake(
        command(), "none of the corpus's 1 document.", "--valid-fraction", "--text-documents line"
    )
    outcome = command(*advised)
    assert outcome.code == 0, outcome.err


def test_a_boundary_token_that_there_is_not_keeps_none_out_of_the_folder(run_cli, corpus, tmp_path):
    def command(*more):
        return run_cli("prepare", corpus, "--out", tmp_path / "data", "--vocab-size", 300, *FIELDS,
                       "--valid-fraction", 0, "--test-fraction", 0.2, *more)  # fmt: skip

    require_mistake(command("--boundary-token", "<end>"), "'<end>' is not in the vocabulary")
    outcome = command()
    assert outcome.code == 0, outcome.err


def test_a_misspelt_option_is_refused_with_its_near_name(run_cli, corpus, tmp_path):
    outcome = run_cli("prepare", corpus, "--out", tmp_path / "data", "--vocabsize", 300)
    assert outcome.code == 2
    assert "--vocab-size" in outcome.err


def test_a_full_disk_is_one_message(run_cli, corpus, small_disk):
    (small_disk / "filler").write_bytes(b"0" * 950_000)
    outcome = run_cli("prepare", corpus, "--out", small_disk / "data", "--vocab-size", 300, *FIELDS)
    require_mistake(outcome, "disk is full", code=1)
    assert not (small_disk / "data" / "manifest.json").exists()
    gc.collect()  # the error's frames hold a memory-mapped file, and the disk is unmounted next


def test_a_missing_library_is_named_with_how_to_get_it(run_cli, corpus, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "tokenizers" else find(n, *a)
    )
    outcome = run_cli("prepare", corpus, "--out", tmp_path / "data")
    require_mistake(outcome, "tokenizers", "pip install 'recallzoo[text]'")
