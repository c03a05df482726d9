"""Pair counts against a Counter: any memory, any workers, kills, damage, full disks."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forked
from hypothesis import given, settings
from hypothesis import strategies as st

from recallzoo.errors import InvalidConfig, StoreError, UserError
from recallzoo.text import PairCounts, counting, open_data
from recallzoo.text._hash_table import HashTable
from recallzoo.text.counting import count_pairs
from tests.text import definitions
from tests.text.shards import write_data, zipf_documents


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab_size=st.sampled_from([2, 300, 65536, 70000]),
    memory_mib=st.sampled_from([0.18, 0.4, 4.0]),
    workers=st.integers(1, 2),
    shard_tokens=st.sampled_from([900, 5000, 10**6]),
)
def test_counts_equal_a_counter_whatever_the_memory_workers_and_shards(
    tmp_path_factory, seed, vocab_size, memory_mib, workers, shard_tokens
):
    documents = zipf_documents(seed, 12, vocab_size)
    folder = tmp_path_factory.mktemp("data")
    data = write_data(folder, documents, vocab_size, shard_tokens=shard_tokens)
    table = count_pairs(data, memory_mib=memory_mib, workers=workers, progress=False)
    want = definitions.count_pairs([tokens.tolist() for tokens in documents])
    assert table.as_dict() == want
    assert table.num_pairs == sum(want.values())
    assert table.num_tokens == sum(map(len, documents))
    assert (np.diff(np.asarray(table.pairs).astype(np.int64)) > 0).all()
    PairCounts.open(folder / "pair_counts", verify=True)
    assert not (folder / "pair_counts.work").exists()


def test_the_table_is_the_same_bytes_whatever_the_memory(tmp_path):
    documents = zipf_documents(0, 40, 500)
    tables = []
    for number, (memory_mib, workers) in enumerate([(0.09, 1), (0.5, 2), (64, 3)]):
        data = write_data(tmp_path / str(number), documents, 500, name="same")
        count_pairs(data, memory_mib=memory_mib, workers=workers, progress=False)
        tables.append(files_of(data.folder / "pair_counts"))
    assert tables[0] == tables[1] == tables[2]


def test_the_largest_pair_of_the_vocabulary_survives_beside_document_ends(tmp_path):
    last = 65535
    documents = [np.array([last] * 5), np.array([last]), np.array([3, last, last])]
    data = write_data(tmp_path, documents, last + 1)
    table = count_pairs(data, progress=False)
    assert table.as_dict() == {(last, last): 5, (3, last): 1}


def test_documents_of_one_token_have_no_pairs(tmp_path):
    data = write_data(tmp_path, [np.array([1]), np.array([2])], 5)
    table = count_pairs(data, progress=False)
    assert table.as_dict() == {}
    assert table.lookup(torch.tensor([1]), torch.tensor([2])).tolist() == [0]


def test_ray_without_ray_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    data = write_data(tmp_path, zipf_documents(1, 3, 30), 30)
    with pytest.raises(UserError, match="executor='threads'"):
        count_pairs(data, executor="ray", progress=False)


def test_memory_too_small_is_refused_with_what_is_needed(tmp_path):
    data = write_data(tmp_path, zipf_documents(1, 3, 30), 30)
    with pytest.raises(InvalidConfig, match="workers=0"):
        count_pairs(data, workers=0, progress=False)
    with pytest.raises(UserError, match="at least"):
        count_pairs(data, memory_mib=0.01, progress=False)


COUNT = """
import sys
from recallzoo.text import open_data
from recallzoo.text.counting import count_pairs
count_pairs(open_data(sys.argv[1]), memory_mib=0.1, workers=1, progress=False)
"""


@pytest.mark.unchecked
def test_a_killed_count_goes_on_with_the_runs_it_had(tmp_path):
    documents = zipf_documents(2, 200, 400)
    undisturbed = write_data(tmp_path / "whole", documents, 400, name="same")
    count_pairs(undisturbed, memory_mib=0.1, workers=1, progress=False)
    data = write_data(tmp_path / "killed", documents, 400, name="same")
    work = data.folder / "pair_counts.work"
    process = Forked(COUNT, data.folder)
    while len(list(work.glob("run-*.bin"))) < 5:
        assert process.poll() is None, process.err
        time.sleep(0.002)
    process.kill()
    assert not (data.folder / "pair_counts").exists()
    kept = {run: run.stat().st_mtime_ns for run in work.glob("run-*.bin")}
    assert len(kept) >= 5
    seen = {}
    original = counting._merge_range

    def watch(runs, plan, where):
        seen.update({run: run.stat().st_mtime_ns for run in runs})
        return original(runs, plan, where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "_merge_range", watch)
        count_pairs(data, memory_mib=0.1, workers=1, progress=False)
    assert kept.items() <= seen.items(), "finished runs were counted again"
    assert files_of(data.folder / "pair_counts") == files_of(undisturbed.folder / "pair_counts")
    assert sorted(path.name for path in data.folder.iterdir()) == sorted(
        path.name for path in undisturbed.folder.iterdir()
    )


def test_two_at_once_are_kept_apart(tmp_path, monkeypatch):
    documents = zipf_documents(2, 50, 400)
    data = write_data(tmp_path, documents, 400)
    original = counting._merge_range

    def second(*arguments):
        for memory_mib in (0.1, 0.4):
            with pytest.raises(UserError, match="another process is counting pairs into"):
                count_pairs(data, memory_mib=memory_mib, workers=1, progress=False)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(counting, "_merge_range", second)
        table = count_pairs(data, memory_mib=0.1, workers=1, progress=False)
    assert table.as_dict() == definitions.count_pairs([d.tolist() for d in documents])
    assert not (tmp_path / "pair_counts.work").exists()


def test_runs_of_another_plan_are_not_used(tmp_path, monkeypatch):
    documents = zipf_documents(2, 50, 400)
    data = write_data(tmp_path, documents, 400)
    with monkeypatch.context() as patch:
        patch.setattr(counting, "_write_table", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            count_pairs(data, memory_mib=0.1, workers=1, progress=False)
    assert list((tmp_path / "pair_counts.work").glob("run-*.bin"))
    table = count_pairs(data, memory_mib=0.4, workers=2, progress=False)
    assert table.as_dict() == definitions.count_pairs([d.tolist() for d in documents])


def test_a_run_damaged_while_counting_was_stopped_is_noticed(tmp_path, monkeypatch):
    data = write_data(tmp_path, zipf_documents(2, 50, 400), 400)
    with monkeypatch.context() as patch:
        patch.setattr(counting, "_write_table", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            count_pairs(data, memory_mib=0.1, workers=1, progress=False)
    run = sorted((tmp_path / "pair_counts.work").glob("run-*.bin"))[0]
    run.write_bytes(run.read_bytes()[:-80])
    with pytest.raises(StoreError, match="a run on disk was damaged"):
        count_pairs(data, memory_mib=0.1, workers=1, progress=False)
    assert not (tmp_path / "pair_counts").exists()
    count_pairs(data, memory_mib=0.1, workers=1, progress=False)


@pytest.mark.unchecked
@pytest.mark.parametrize("limit_bytes", [1000, 40_000])
def test_a_full_disk_leaves_no_table(tmp_path, limit_bytes):
    """A limit on file size stands in for the disk: the first hits a run, the second the table."""
    data = write_data(tmp_path, zipf_documents(3, 60, 3000), 3000)
    limited = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))\n"
        "from recallzoo.errors import StoreError\n"
        "try:\n"
        + "".join("    " + line + "\n" for line in COUNT.strip().splitlines())
        + "except StoreError as error:\n    print(error, file=sys.stderr); sys.exit(1)\n"
    )
    process = Forked(limited, tmp_path)
    assert process.wait() == 1, process.err
    assert "could not write" in process.err
    assert not (tmp_path / "pair_counts").exists()
    assert not list((tmp_path / "pair_counts.work").glob(".tmp-*"))
    count_pairs(data, memory_mib=0.1, workers=1, progress=False)
    PairCounts.open(tmp_path / "pair_counts", verify=True)


@pytest.fixture
def table_folder(tmp_path):
    data = write_data(tmp_path, zipf_documents(4, 20, 200), 200, name="little")
    count_pairs(data, progress=False)
    return tmp_path / "pair_counts"


@pytest.mark.parametrize("name", ["pairs.npy", "counts.npy"])
def test_a_flipped_bit_and_a_cut_table_are_refused(table_folder, name):
    path = table_folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(StoreError, match="cut short"):
        PairCounts.open(table_folder)
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    path.write_bytes(flipped)
    PairCounts.open(table_folder)
    with pytest.raises(StoreError, match=f"{name} does not match its checksum"):
        PairCounts.open(table_folder, verify=True)
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        PairCounts.open(table_folder)


@pytest.mark.parametrize("name", ["pairs.npy", "counts.npy"])
def test_an_array_of_another_shape_and_as_many_bytes_is_refused(table_folder, name):
    path = table_folder / name
    size = path.stat().st_size
    np.save(path, np.load(path)[None])
    assert path.stat().st_size == size
    with pytest.raises(StoreError, match="arrays of another shape"):
        PairCounts.open(table_folder)


def test_an_edited_description_is_refused(table_folder):
    path = table_folder / "pair_counts.json"
    about = json.loads(path.read_text())
    about["num_tokens"] += 1
    path.write_text(json.dumps(about))
    with pytest.raises(StoreError, match="its own checksum"):
        PairCounts.open(table_folder)


def test_an_unfinished_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="no finished pair counts"):
        PairCounts.open(tmp_path)


def test_counts_of_another_tokenizer_are_refused(table_folder):
    table = PairCounts.open(table_folder)
    table.require_tokenizer(table.tokenizer_hash or "", "model a")
    with pytest.raises(UserError, match=r"little/train were made with tokenizer .* model b has"):
        table.require_tokenizer("0123456789abcdef", "model b")


def test_counts_of_other_tokens_are_not_taken_for_these(tmp_path):
    first = write_data(tmp_path / "a", zipf_documents(4, 20, 200), 200)
    count_pairs(first, folder=tmp_path / "table", progress=False)
    count_pairs(first, folder=tmp_path / "table", progress=False)
    other = write_data(tmp_path / "b", zipf_documents(5, 20, 200), 200)
    with pytest.raises(UserError, match="other tokens"):
        count_pairs(other, folder=tmp_path / "table", progress=False)


def test_an_id_past_the_vocabulary_is_named(tmp_path):
    data = write_data(tmp_path, [np.array([1, 2, 99])], 100)
    path = tmp_path / "train" / "tokens-00000.npy"
    raw = bytearray(path.read_bytes())
    raw[-2:] = (300).to_bytes(2, "little")
    path.write_bytes(raw)
    with pytest.raises(StoreError, match="token id 300, past the vocabulary of 100"):
        count_pairs(data, progress=False)
    with pytest.raises(StoreError, match="checksum"):
        open_data(tmp_path, verify=True)


@pytest.mark.unchecked
def test_memory_stays_within_its_bound(tmp_path):
    """Peak memory of a count beyond a count of almost nothing, in a process of its own."""
    vocab_size, bound_mib = 40_000, 48
    rng = np.random.default_rng(0)
    # Nearly all pairs are distinct, which takes the most memory.
    documents = [rng.integers(0, vocab_size, size=20_000) for _ in range(200)]
    data = write_data(tmp_path / "large", documents, vocab_size)
    small = write_data(tmp_path / "small", [rng.integers(0, vocab_size, size=10)], vocab_size)
    script = COUNT.replace("memory_mib=0.1", f"memory_mib={bound_mib}") + (
        "print(next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1])"
    )
    peaks = []
    for one in (small, data):
        # Started anew: a forked process begins with the memory of the one it comes from.
        command = [sys.executable, "-c", script, str(one.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    assert 10 < peaks[1] - peaks[0] < bound_mib


@given(st.dictionaries(st.tuples(*[st.integers(0, 2**31 - 1)] * 2), st.integers(0, 2**40)))
def test_lookup_finds_what_is_there_and_nothing_else(counts):
    table = PairCounts.from_dict(counts)
    asked = [*counts, (0, 0), (5, 2**31 - 1), *((b, a) for a, b in counts)]
    first, second = (torch.tensor(ids) for ids in zip(*asked, strict=True))
    assert table.lookup(first, second).tolist() == [counts.get(pair, 0) for pair in asked]


def test_lookup_is_right_where_many_pairs_share_a_home(monkeypatch):
    from recallzoo.text import _hash_table

    monkeypatch.setattr(
        _hash_table, "_home", lambda pairs, homes: torch.full_like(pairs, homes - 1)
    )
    table = HashTable.build(np.arange(0, 60, 2, dtype=np.uint64), np.arange(1, 31))
    assert table.lookup(torch.arange(60)).tolist() == [
        pair // 2 + 1 if pair % 2 == 0 else 0 for pair in range(60)
    ]


def test_a_dict_with_impossible_entries_is_refused():
    with pytest.raises(UserError, match="0 or more"):
        PairCounts.from_dict({(1, -2): 3})
