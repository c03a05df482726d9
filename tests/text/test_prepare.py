"""`prepare`: what it writes, what survives a kill, what it refuses."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import random
import shutil
import time
import tracemalloc

import numpy as np
import pytest
from forks import Forked

from recallzoo.errors import InvalidConfig, StoreError, UnknownName, UserError
from recallzoo.files import exclusive, write_json
from recallzoo.text import PrepareOptions, _parts, open_data, prepare
from recallzoo.text.preparing import WORK
from tests.text import corpora, definitions
from tests.text.little import ROWS, contents, made, options, texts


def test_tokens_decode_to_the_corpus_and_every_document_is_there_once(finished):
    data = open_data(finished, verify=True)
    found: dict[str, str] = {}
    for split in ("train", "valid", "test"):
        part = texts(data, split)
        assert len(part) > 5
        assert not part.keys() & found.keys()
        found |= part
    assert found == {row["id"]: row["text"] for row in ROWS}


def test_every_document_ends_with_the_boundary_token_and_has_no_other(finished):
    data = open_data(finished)
    assert data.boundary.token == "<|endoftext|>"
    for split in data.splits:
        part = data.split(split)
        tokens = part.read(0, part.num_tokens)
        ends = np.flatnonzero(tokens == data.boundary.id) + 1
        assert ends.tolist() == part.document_offsets[1:].tolist()


def test_documents_are_shuffled_and_carry_domain_source_and_bytes(finished):
    data = open_data(finished)
    assert data.domains == ("books", "légal", "wiki")
    train = data.split("train")
    rows = {row["id"]: row for row in ROWS}
    for i, row in enumerate(train.documents().iter_rows(named=True)):
        assert data.domains[train.document_domains[i]] == row["domain"] == rows[row["id"]]["domain"]
        assert row["source"] == rows[row["id"]]["source"]
        text_bytes = len(rows[row["id"]]["text"].encode())
        assert train.document_bytes[i] == row["num_bytes"] == text_bytes
        assert row["num_tokens"] == len(train.document(i))
    changes = np.count_nonzero(np.diff(train.document_domains.astype(int)))
    assert changes > train.num_documents / 3, "three sorted domains change twice"


def test_the_manifest_adds_up(finished):
    data = open_data(finished)
    assert data.manifest["skipped"] == {}
    assert sum(data.split(name).num_documents for name in data.splits) == 300
    for name in data.splits:
        about = data.split(name).about
        for total in ("num_documents", "num_tokens", "num_bytes"):
            assert about[total] == sum(domain[total] for domain in about["domains"].values())
        assert about["num_tokens"] == sum(shard["num_tokens"] for shard in about["shards"])
        assert about["num_tokens"] == data.split(name).document_offsets[-1]
    assert len(data.split("train").about["shards"]) > 1
    assert not list(finished.rglob(".tmp-*"))
    assert sorted(path.name for path in finished.iterdir()) == [
        "manifest.json",
        "pair_counts",
        "test",
        "tokenizer",
        "train",
        "valid",
    ]


def test_pair_counts_of_prepared_text_equal_a_counter(finished):
    data = open_data(finished)
    train = data.split("train")
    documents = [train.document(i).tolist() for i in range(train.num_documents)]
    assert data.pair_counts(verify=True).as_dict() == definitions.count_pairs(documents)


def test_the_result_depends_on_neither_order_nor_files_nor_part_size(
    finished, tmp_path, monkeypatch
):
    rows = list(ROWS)
    random.Random(0).shuffle(rows)
    a = corpora.json_lines(tmp_path / "a.jsonl", rows[:100])
    b = corpora.json_lines(tmp_path / "b.jsonl", rows[100:])
    monkeypatch.setattr(_parts, "PART_BYTES", 4000)
    monkeypatch.setattr(_parts, "_BATCH_BYTES", 900)
    other = made(tmp_path / "data", sources=(str(a), str(b)))
    theirs, ours = contents(finished), contents(other.folder)
    different = {name for name in theirs | ours if theirs.get(name) != ours.get(name)}
    assert different == {"manifest.json"}, "which names the sources"


def test_another_seed_gives_another_order_and_other_splits(finished, tmp_path):
    other = made(tmp_path / "data", seed=1, count_pairs=False)
    ids = [open_data(finished).split("test").documents()["id"].to_list()]
    ids.append(other.split("test").documents()["id"].to_list())
    assert set(ids[0]) != set(ids[1])


def test_a_folder_may_be_called_as_a_pattern_is(finished, tmp_path):
    data = made(tmp_path / "[1]*" / "data[ab]")
    assert texts(data, "test") == texts(open_data(finished), "test")


def test_given_splits_stay_as_given(tmp_path):
    files = {
        name: str(corpora.json_lines(tmp_path / f"{name}.jsonl", corpora.documents(40, seed=i)))
        for i, name in enumerate(("train", "valid", "test"))
    }
    data = prepare(
        PrepareOptions(
            out=tmp_path / "data",
            train=(files["train"],),
            valid=(files["valid"],),
            test=(files["test"],),
            vocab_size=300,
        ),
        progress=False,
    )
    for i, name in enumerate(data.splits):
        wanted = {row["id"]: row["text"] for row in corpora.documents(40, seed=i)}
        assert texts(data, name) == wanted


PREPARE = """
import json, sys
from pathlib import Path
from recallzoo.text import PrepareOptions, _parts, prepare
_parts.PART_BYTES = 6000
values = json.loads(sys.argv[1])
values["out"], values["sources"] = Path(values["out"]), tuple(values["sources"])
prepare(PrepareOptions(**values), progress=False)
"""


def start(given: PrepareOptions, script: str = PREPARE) -> Forked:
    values = {k: v for k, v in dataclasses.asdict(given).items() if k not in ("train", "valid")}
    return Forked(script, json.dumps(values, default=str))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "stage", ["prepare.work/parts/part-000003/part.json", "train/tokens-00001.npy"]
)
def test_a_killed_prepare_goes_on_where_it_was(finished, tmp_path, stage):
    given = options(tmp_path / "data")
    process = start(given)
    while not (given.out / stage).exists():
        assert process.poll() is None, process.err
        time.sleep(0.0005)
    process.kill()
    assert not (given.out / "manifest.json").exists(), "killed too late to show anything"
    with pytest.raises(UserError, match=r"not finished\. Run the same recallzoo prepare command"):
        open_data(given.out)
    tokenizer = (given.out / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    kept = (given.out / stage).stat().st_mtime_ns
    process = start(given)
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # parts go when all is done
            assert (given.out / stage).stat().st_mtime_ns == kept, "made again"
        time.sleep(0.001)
    assert process.wait() == 0, process.err
    assert (given.out / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == tokenizer
    assert contents(given.out) == contents(finished)


def test_a_finished_folder_is_left_as_it_is(data, capsys):
    before = {path: path.stat().st_mtime_ns for path in data.folder.rglob("*")}
    again = made(data.folder)
    assert again.manifest == data.manifest
    assert {path: path.stat().st_mtime_ns for path in data.folder.rglob("*")} == before


def test_other_options_or_sources_are_refused_and_overwrite_replaces(data, tmp_path):
    with pytest.raises(UserError, match="vocab_size was 400 and is now 300"):
        made(data.folder, vocab_size=300)
    other = corpora.json_lines(tmp_path / "corpus.jsonl", corpora.documents(200, seed=5))
    with pytest.raises(UserError, match=r"sources differ in corpus\.jsonl"):
        made(data.folder, sources=(str(other),))
    replaced = made(data.folder, sources=(str(other),), overwrite=True)
    assert sum(replaced.split(name).num_documents for name in replaced.splits) == 200


def test_another_tokenizer_is_refused(data, finished, tmp_path):
    other = made(tmp_path / "other", vocab_size=300, count_pairs=False)
    with pytest.raises(UserError, match="begun with another tokenizer"):
        made(data.folder, vocab_size=None, tokenizer=str(other.tokenizer_folder))


def test_a_folder_that_is_not_ours_is_not_touched(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no data folder of recallzoo"):
            made(tmp_path / "data", overwrite=overwrite)
    assert (tmp_path / "data" / "thesis.tex").read_text() == "years of work"


def test_what_another_program_calls_a_manifest_is_not_touched(tmp_path):
    out = tmp_path / "extension"
    (out / "src").mkdir(parents=True)
    (out / "manifest.json").write_text('{"name": "my extension", "plan": {}}')
    (out / "src" / "main.js").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no data folder of recallzoo"):
            made(out, overwrite=overwrite)
    assert (out / "src" / "main.js").read_text() == "years of work"


@pytest.mark.parametrize("damage", ["none", "manifest", "unfinished"])
def test_replacing_data_keeps_what_is_not_of_them(data, damage):
    (data.folder / "notes.md").write_text("mine")
    manifest = data.folder / "manifest.json"
    if damage == "manifest":
        manifest.write_text("{")
    elif damage == "unfinished":
        write_json(data.folder / WORK / "plan.json", data.manifest["plan"])
        manifest.unlink()
    replaced = made(data.folder, vocab_size=300, overwrite=True)
    assert replaced.vocab_size == 300
    assert (data.folder / "notes.md").read_text() == "mine"
    assert replaced.pair_counts().num_tokens == replaced.split("train").num_tokens


def test_a_damaged_plan_of_unfinished_data_is_named_and_the_way_out_works(data):
    (data.folder / WORK).mkdir(exist_ok=True)
    (data.folder / WORK / "plan.json").write_text("{")
    (data.folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"plan\.json is not valid .* give --overwrite"):
        made(data.folder)
    assert made(data.folder, overwrite=True).split("train").num_tokens


def test_data_in_the_making_or_being_counted_are_not_replaced(data):
    before = sorted(data.folder.rglob("*"))
    for held, words in ((WORK, "preparing"), ("pair_counts.work", "counting pairs")):
        with (
            exclusive(data.folder / held / "lock", "busy"),
            pytest.raises(UserError, match=f"another process is {words}"),
        ):
            made(data.folder, vocab_size=300, overwrite=True)
        assert set(before) <= set(data.folder.rglob("*"))


def test_a_folder_that_may_not_be_changed_or_looked_into_is_named(data, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # root may do all
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(StoreError, match="no permission to write there"):
            made(data.folder, vocab_size=300, overwrite=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="no permission to look into"):
        made(data.folder)


def test_two_at_once_are_kept_apart(tmp_path):
    given = options(tmp_path / "data")
    with (
        exclusive(given.out / WORK / "lock", "busy"),
        pytest.raises(UserError, match="another process is preparing"),
    ):
        prepare(given, progress=False)


@pytest.mark.parametrize(
    "name",
    [
        "train/tokens-00000.npy",
        "valid/document_offsets.npy",
        "test/document_domains.npy",
        "train/documents.parquet",
        "tokenizer/tokenizer.json",
        "manifest.json",
    ],
)
def test_damage_is_refused(data, name):
    path = data.folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(StoreError, match=r"cut short|damaged"):
        open_data(data.folder)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(StoreError, match=r"checksum|not valid JSON"):
        open_data(data.folder, verify=True)
    if name.startswith("tokenizer"):
        with pytest.raises(StoreError, match="tokenizer was changed"):
            open_data(data.folder)
    path.unlink()
    with pytest.raises((StoreError, UserError), match="missing"):
        open_data(data.folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [("manifest.json", "make the data again"), ("pair_counts/pair_counts.json", "make the pair")],
)
def test_a_damaged_manifest_says_what_to_make_again(data, name, words):
    (data.folder / name).write_text("{")
    with pytest.raises(StoreError, match=words):
        open_data(data.folder).pair_counts()


def test_a_tokenizer_changed_between_kill_and_restart_is_refused(tmp_path, monkeypatch):
    given = options(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr("recallzoo.text.preparing.write_split", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(given, progress=False)
    path = given.out / "tokenizer" / "tokenizer.json"
    described = json.loads(path.read_text())
    vocab = described["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match="changed since the first text"):
        prepare(given, progress=False)


@pytest.mark.unchecked
@pytest.mark.parametrize("limit_bytes", [3_000, 12_000, 19_000])
def test_a_full_disk_leaves_nothing_that_looks_whole(finished, tmp_path, limit_bytes):
    """A limit on file size stands in for the disk: tokenizer, part and shard in turn."""
    given = options(tmp_path / "data", shard_tokens=10**6)
    script = (
        "import resource, signal, sys\n"
        "from recallzoo.errors import StoreError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))\n"
        "try:\n"
        + "".join(f"    {line}\n" for line in PREPARE.strip().splitlines())
        + "except StoreError as error:\n    print(error, file=sys.stderr); sys.exit(1)\n"
    )
    process = start(given, script)
    assert process.wait() == 1, process.err
    assert "could not write" in process.err
    assert not (given.out / "manifest.json").exists()
    assert not list(given.out.rglob(".tmp-*"))
    process = start(given)
    assert process.wait() == 0, process.err
    open_data(given.out, verify=True)


BAD = {
    "invalid_utf8": b'{"text": "caf\xe9", "id": "x"}\n',
    "invalid_json": b'{"text": "cut\n',
    "no_text": b'{"body": "a", "id": "x"}\n',
    "text_no_string": b'{"text": 3, "id": "x"}\n',
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_stops_or_is_counted(tmp_path, kind, capsys):
    given = options(tmp_path / "data")
    source = tmp_path / "corpus.jsonl"
    source.write_bytes(source.read_bytes() + BAD[kind] + b'{"text": "", "id": "y"}\n')
    with pytest.raises(UserError, match=r"line 301.*--on-error skip"):
        prepare(given, progress=False)
    assert not (given.out / "manifest.json").exists()
    data = prepare(dataclasses.replace(given, on_error="skip"), progress=False)
    assert data.manifest["skipped"] == {"empty": 1, kind: 1}
    assert "line 301" in data.manifest["skipped_examples"][0]
    assert f"left out 1 records: {kind.replace('_', ' ')}" in capsys.readouterr().err
    assert sum(data.split(name).num_documents for name in data.splits) == 300


def test_records_that_are_left_out_take_no_memory(tmp_path):
    given = options(tmp_path / "data", on_error="skip")
    prepare(given, progress=False)  # imports its libraries
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.writelines('{"body": "no text in it"}\n' for _ in range(20_000))
    tracemalloc.start()
    try:
        data = prepare(dataclasses.replace(given, out=tmp_path / "more"), progress=False)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert data.manifest["skipped"] == {"no_text": 20_000}
    assert peak_bytes < 6.5e6  # 4.5 MB without them; 20,000 messages are 4 MB


def test_ids_that_come_twice_stop_or_are_dropped(tmp_path):
    given = options(tmp_path / "data")
    corpora.json_lines(tmp_path / "corpus.jsonl", [*ROWS, {**ROWS[7], "text": "another"}])
    with pytest.raises(UserError, match=r"1 documents have an id.*'doc/0/7' stands 2 times in"):
        prepare(given, progress=False)
    data = prepare(dataclasses.replace(given, on_error="skip"), progress=False)
    assert data.manifest["skipped"] == {"repeated_id": 1}
    everything = {k: v for name in data.splits for k, v in texts(data, name).items()}
    assert everything["doc/0/7"] == ROWS[7]["text"]


def test_documents_without_ids_in_files_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        corpora.json_lines(
            tmp_path / folder / "x.jsonl", [{"text": f"{folder} {i}"} for i in range(20)]
        )
    data = made(
        tmp_path / "data",
        sources=(str(tmp_path / "a" / "x.jsonl"), str(tmp_path / "b" / "x.jsonl")),
        vocab_size=258,
    )
    ids = {id_ for name in data.splits for id_ in data.split(name).documents()["id"]}
    assert len(ids) == 40
    assert {"x.jsonl:3", "x.jsonl#2:3"} <= ids


def test_text_that_spells_the_boundary_token_makes_no_boundary(tmp_path):
    rows = [{"text": f"before<|endoftext|>after {i}", "id": str(i)} for i in range(60)]
    given = options(tmp_path / "data")
    corpora.json_lines(tmp_path / "corpus.jsonl", rows)
    data = prepare(given, progress=False)
    found = {k: v for name in data.splits for k, v in texts(data, name).items()}
    assert found == {row["id"]: row["text"] for row in rows}
    train = data.split("train")
    assert np.count_nonzero(train.read(0, train.num_tokens) == data.boundary.id) == len(
        texts(data, "train")
    )


def test_documents_of_one_token_are_kept_and_counted(tmp_path):
    given = options(tmp_path / "data", valid_fraction=0, test_fraction=0)
    corpora.json_lines(tmp_path / "corpus.jsonl", [*ROWS, {"text": "!", "id": "short"}])
    data = prepare(given, progress=False)
    assert data.split("train").about["one_token_documents"] == 1
    assert data.splits == ("train",)
    with pytest.raises(UnknownName, match="valid"):
        data.split("valid")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_an_empty_corpus_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="no document with any text"):
        made(tmp_path / "data", sources=(str(tmp_path / name),))
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_split_that_would_be_empty_is_refused(tmp_path):
    given = options(tmp_path / "data", valid_fraction=1e-9)
    with pytest.raises(UserError, match="split 'valid' got none of the corpus's 300 documents"):
        prepare(given, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "give either sources"),
        ({"train": ("a",)}, "not both"),
        ({"sources": (), "valid": ("a",)}, "need --train"),
        ({"sources": (), "train": ("a",)}, "are for sources"),
        ({"valid_fraction": 0.6, "test_fraction": 0.5}, "below 1 together"),
        ({"tokenizer": "x"}, "trained already"),
        ({"boundary": "none", "boundary_token": "x"}, "uses none"),
        ({"valid_fraction": math.nan}, "below 1 together"),
        ({"shard_tokens": 0}, "shard_tokens=0 must be positive"),
        ({"memory_mib": math.nan}, "memory_mib=nan must be positive and finite"),
        ({"vocab_size": 0}, "vocab_size=0 must be positive"),
        ({"boundary_token": "\udcff"}, r"boundary_token='\\udcff' is no UTF-8"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000 is too large; 16,777,216 is the most"),
        ({"vocab_size": 200}, "256 bytes and the end of text are 257"),
        ({"vocab_size": None, "tokenizer": "no/such/tokenizer"}, "no tokenizer could be loaded"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, changes, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((InvalidConfig, UserError), match=message):
        made(tmp_path / "data", **changes)
