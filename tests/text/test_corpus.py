"""Readers: every format gives the same documents; damage is named, never a shorter corpus."""

import bz2
import codecs
import errno
import gzip
import json
import lzma
import os
import re

import polars
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from recallzoo.errors import UserError
from recallzoo.text.corpus import Document, Fields, Problem, SourceFile, find_files, read_documents
from tests.text import corpora

ROWS = corpora.documents(40)
WANTED = [
    Document(r["text"], r["id"], r["domain"], r["source"], len(r["text"].encode())) for r in ROWS
]


def read(source: object, **options) -> list[Document | Problem]:
    files, _ = find_files(str(source))
    return [record for file in files for _, record in read_documents(file, **options)]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zst_long(data: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst_long,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_of_any_compression_give_the_documents(tmp_path, suffix):
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](lines(ROWS)))
    assert read(path) == WANTED


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](codecs.BOM_UTF8 + lines(ROWS)))
    assert read(path) == WANTED
    path = tmp_path / f"corpus.txt{suffix}"
    for text in ("né", ""):
        path.write_bytes(COMPRESS[suffix](codecs.BOM_UTF8 + text.encode()))
        (record,) = read(path)
        assert (record.text if isinstance(record, Document) else "") == text


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_cut_short_is_an_error(tmp_path, suffix):
    path = tmp_path / f"corpus.jsonl{suffix}"
    whole = COMPRESS[suffix](lines(ROWS))
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match="cut short"):
        read(path)
    path.write_bytes(b"no compressed file at all, but long enough to be looked at")
    with pytest.raises(UserError, match=f"cannot be decompressed as {suffix}"):
        read(path)


def test_zstd_frames_one_after_another_are_all_read(tmp_path):
    path = tmp_path / "corpus.jsonl.zst"
    path.write_bytes(zst_long(lines(ROWS[:7])) + zst_long(lines(ROWS[7:])))
    assert read(path) == WANTED


def test_parquet_gives_the_documents(tmp_path):
    path = tmp_path / "corpus.parquet"
    polars.DataFrame(ROWS).with_columns(other=polars.lit(1)).write_parquet(path, row_group_size=7)
    assert read(path) == WANTED
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read(path)


def test_parquet_without_the_text_column_names_those_it_has(tmp_path):
    path = tmp_path / "corpus.parquet"
    polars.DataFrame({"body": ["a"], "id": ["b"]}).write_parquet(path)
    with pytest.raises(UserError, match=r"no column 'text'; it has 'body', 'id'.*--text-field"):
        read(path)
    (document,) = read(path, fields=Fields(text="body"))
    assert isinstance(document, Document)
    assert document.text == "a"


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_hugging_face_dataset_gives_the_documents(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = tmp_path / "dataset"
    folder.mkdir()
    if kind == "json":
        corpora.json_lines(folder / "train.jsonl", ROWS)
    else:
        polars.DataFrame(ROWS).write_parquet(folder / "train.parquet")
    assert read(f"hf:{folder}") == WANTED
    assert read(f"hf:{folder}::train") == WANTED
    with pytest.raises(UserError, match=r"could not be opened.*hf:NAME:CONFIG:SPLIT"):
        read(f"hf:{tmp_path}/nothing")
    with pytest.raises(UserError, match="no column 'body'"):
        read(f"hf:{folder}", fields=Fields(text="body"))


@given(skip=st.integers(0, 45))
@pytest.mark.parametrize("kind", ["jsonl.xz", "parquet", "txt", "hf"])
def test_reading_can_start_at_any_record(tmp_path_factory, kind, skip):
    folder = tmp_path_factory.mktemp("skip")
    path = folder / f"corpus.{kind}"
    if kind == "parquet":
        polars.DataFrame(ROWS).write_parquet(path, row_group_size=7)
    elif kind == "txt":
        path.write_text("\n".join(row["text"] for row in ROWS))
    else:
        path = folder / "corpus.jsonl.xz"
        path.write_bytes(lzma.compress(lines(ROWS), preset=0))
    (file,) = find_files(f"hf:{folder}" if kind == "hf" else str(path))[0]
    whole = list(read_documents(file, text_documents="line"))
    assert [number for number, _ in whole] == list(range(40))
    assert list(read_documents(file, text_documents="line", skip=skip)) == whole[skip:]


def test_plain_text_is_cut_as_asked(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    texts = {
        how: [d.text for d in read(path, text_documents=how) if isinstance(d, Document)]
        for how in ("file", "line", "paragraph")
    }
    assert texts == {
        "file": ["one\ntwo\n\n\nthree\n"],
        "line": ["one", "two", "three"],
        "paragraph": ["one\ntwo", "three"],
    }


def test_lines_longer_than_a_read_are_whole(tmp_path):
    rows = [{"text": "wörd " * n} for n in (1, 500_000, 3, 700_000)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(rows).rstrip(b"\n"))
    assert [d.text for d in read(path) if isinstance(d, Document)] == [r["text"] for r in rows]


def test_a_folder_gives_all_its_files_with_domains_by_folder(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "books" / "b.txt").write_text("a book")
    (tmp_path / "LICENSE").write_text("do as you like")
    corpora.json_lines(tmp_path / "a.jsonl", [{"text": "x", "domain": "own"}, {"text": "y"}])
    files, ignored = find_files(str(tmp_path))
    assert ignored == ["LICENSE"]
    documents = [d for file in files for _, d in read_documents(file)]
    assert [(d.id, d.domain) for d in documents if isinstance(d, Document)] == [
        ("a.jsonl:0", "own"),
        ("a.jsonl:1", "all"),
        ("books/b.txt:0", "books"),
    ]


def test_linked_folders_are_read_and_circles_told(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (corpus / "inner").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "b.txt").write_text("linked")
    (corpus / "inner" / "a.txt").write_text("own")
    (corpus / "books").symlink_to(elsewhere)
    (corpus / "inner" / "above").symlink_to(corpus)
    (corpus / "gone.txt").symlink_to(tmp_path / "nothing")
    files, ignored = find_files(str(corpus))
    assert [(file.name, file.domain) for file in files] == [
        ("books/b.txt", "books"),
        ("inner/a.txt", "inner"),
    ]
    assert ignored == ["gone.txt", "inner/above"]


def test_a_folder_that_one_may_not_look_into_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.txt").write_text("own")
    scan = os.scandir

    def refusing(path):
        if "locked" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may look into all
    with pytest.raises(UserError, match=r"look into .*locked: Permission denied"):
        find_files(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (b'{"text": "caf\xe9"}', "invalid_utf8", "line 2 is not UTF-8"),
        (b'{"text": "\\ud800"}', "invalid_utf8", "surrogate"),
        (b'{"text": "cut', "invalid_json", "line 2 is not JSON"),
        (b'["text"]', "invalid_json", "line 2 is a JSON list"),
        (b"[" * 100_000, "invalid_json", "line 2 is not JSON"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "invalid_json", "line 2 is not JSON"),
        (b'{"text": "a", "id": "\\ud800"}', "invalid_utf8", "record 2 .* in its id"),
        (b'{"text": "a", "domain": "\\udc00"}', "invalid_utf8", "record 2 .* in its domain"),
        (b'{"content": "a", "id": 3}', "no_text", "no field 'text'; it has 'content', 'id'"),
        (b'{"text": 7}', "text_no_string", "'text' is of type int"),
        (b'{"text": null}', "empty", "no text"),
        (b'{"text": "  \\n "}', "empty", "no text"),
    ],
)
def test_a_bad_record_is_a_problem_in_its_place(tmp_path, line, kind, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    first, problem, last = read(path)
    assert isinstance(problem, Problem)
    assert problem.kind == kind
    assert re.search(message, problem.message)
    assert isinstance(first, Document)
    assert isinstance(last, Document)


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_invalid_utf8_in_parquet_is_a_problem_of_its_row(tmp_path, kind):
    raw = pyarrow.array([b"good", b"caf\xe9", b"good"], pyarrow.binary())
    kinds = {"binary": pyarrow.binary(), "large_string": pyarrow.large_string()}
    column = raw.cast(kinds.get(kind, pyarrow.string()), safe=False)
    table = pyarrow.table(
        {
            "text": column.dictionary_encode() if kind == "dictionary" else column,
            "id": pyarrow.array([b"a", b"b", b"c"], pyarrow.binary()),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, problem, last = read(tmp_path / "a.parquet")
    assert isinstance(problem, Problem)
    assert problem.kind == "invalid_utf8"
    assert "row 2 is not UTF-8" in problem.message
    assert [one.id for one in (first, last) if isinstance(one, Document)] == ["a", "c"]


def test_invalid_utf8_in_plain_text_is_a_problem(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (problem,) = read(tmp_path / "a.txt")
    assert isinstance(problem, Problem)
    assert problem.kind == "invalid_utf8"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nothing.txt", "no file or folder is called.*hf:"),
        (lambda p: (p / "a.docx").touch() or p / "a.docx", "no known type. Known: .txt"),
        (lambda p: (p / "LICENSE").touch() or p, "holds no text: none of 1 files"),
    ],
)
def test_sources_that_hold_no_text_are_refused(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        find_files(str(make(tmp_path)))


def test_a_file_that_went_away_is_named(tmp_path):
    gone = SourceFile("a.txt", tmp_path / "a.txt", "text", "all")
    with pytest.raises(UserError, match=r"could not read .*a\.txt: No such file"):
        list(read_documents(gone))
