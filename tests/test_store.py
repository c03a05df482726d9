"""A results folder: whole runs or none, read back as written, damage named."""

import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from recallzoo.errors import StoreError, UserError
from recallzoo.result import Result, SliceRow
from recallzoo.store import ROWS_SCHEMA, STORE_VERSION, Store, flatten

SEGMENT = {"task": {"task": "mqar", "task_version": 1, "seq_len": 64}, "num_examples": 10}
CONFIG: dict[str, Any] = {
    "run_version": 1,
    "data": {"seed": 0, "train": [SEGMENT], "valid": [SEGMENT], "test": [SEGMENT]},
    "precision": "fp32",
    "model": {"d_model": 64, "mixers": [{"name": "attention", "options": []}]},
    "optimizer": {"learning_rate": 1e-3, "max_grad_norm": None},
    "seed": 0,
}


def result(run_hash: str = "0123456789abcdef", **options: Any) -> Result:
    settings: dict[str, Any] = {
        "hash": run_hash,
        "group": "fedcba9876543210",
        "label": "attention",
        "config": CONFIG,
        "status": "finished",
        "steps": 20,
        "epochs": 2,
        "train_loss_nats": 1.5,
        "valid_loss_nats": 2.0,
        "valid_accuracy": 0.25,
        "test_loss_nats": 2.5,
        "test_accuracy": 0.75,
        "num_parameters": 1000,
        "state_size": {"kv": 128, "conv": 16},
        "train_seconds": 1.0,
        "provenance": {"device": "CPU, 1 threads", "commit": "abc", "fallbacks": []},
        "metrics": [{"epoch": 1, "valid_accuracy": 0.1}, {"epoch": 2, "valid_accuracy": 0.25}],
        "rows": [
            SliceRow(slice="distance", value=2, correct=3, total=4),
            SliceRow(slice="distance", value=4, correct=0, total=1),
        ],
    }
    return Result(**{**settings, **options})


words = st.text(max_size=20)
losses = st.none() | st.floats(0, 100)


@given(
    label=words,
    status=st.sampled_from(["solved", "finished", "diverged", "group_solved"]),
    loss=losses,
    state=st.dictionaries(st.sampled_from(["kv", "conv", "matrix"]), st.integers(0, 2**40)),
    metrics=st.lists(
        st.fixed_dictionaries({"epoch": st.integers(1, 99), "loss": losses}), min_size=1
    ),
    rows=st.lists(
        st.builds(
            SliceRow,
            slice=words,
            value=st.integers(0, 2**40),
            correct=st.integers(0, 99),
            total=st.integers(100, 999),
        ),
        max_size=3,
    ),
    fallbacks=st.lists(words, max_size=2),
)
def test_a_result_is_read_as_it_was_written(
    tmp_path_factory, label, status, loss, state, metrics, rows, fallbacks
):
    store = Store(tmp_path_factory.mktemp("store"))
    written = result(
        label=label,
        status=status,
        train_loss_nats=loss,
        state_size=state,
        metrics=metrics,
        rows=rows,
        provenance={"fallbacks": fallbacks},
    )
    store.write(written)
    assert store.read(written.hash) == written
    assert list(Store(store.folder).results()) == [written]


def test_a_folder_may_be_called_as_a_pattern_is(tmp_path):
    for name in ("runs[1]", "runs*", "runs?"):
        store = Store(tmp_path / name)
        written = result(rows=[SliceRow(slice="distance", value=1, correct=2, total=3)])
        store.write(written)
        assert store.read(written.hash) == written
        assert len(store.slices()) == 1


def test_results_are_found_again_and_in_the_order_of_their_hashes(tmp_path):
    store = Store(tmp_path / "new" / "folder")
    assert (store.hashes(), list(store.results())) == ([], [])
    for run_hash in ("bb", "aa", "cc"):
        assert not store.has(run_hash)
        store.write(result(run_hash))
        assert store.has(run_hash)
    again = Store(store.folder, create=False)
    assert again.hashes() == ["aa", "bb", "cc"]
    assert [r.hash for r in again.results()] == ["aa", "bb", "cc"]


def test_a_run_that_is_there_is_kept(tmp_path):
    store = Store(tmp_path)
    store.write(result(label="first"))
    store.write(result(label="second"))
    assert store.read(result().hash).label == "first"


def test_two_writers_of_one_run_leave_one_whole_run(tmp_path):
    stores = [Store(tmp_path) for _ in range(4)]
    together = threading.Barrier(len(stores))
    errors: list[Exception] = []

    def write(number: int, store: Store) -> None:
        try:
            for run in range(10):
                together.wait()
                store.write(result(f"{run:x}", label=f"writer {number}"))
        except Exception as error:  # noqa: BLE001 - a thread's errors are looked at below
            errors.append(error)

    threads = [threading.Thread(target=write, args=pair) for pair in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(list(Store(tmp_path).results())) == 10
    assert not list(tmp_path.rglob(".tmp-*"))


class Broken(Exception):
    """Stands for whatever may happen while a run is written."""


@pytest.mark.parametrize("name", ["metrics.jsonl", "rows.parquet", "result.json"])
def test_a_run_whose_writing_fails_is_not_there_at_all(tmp_path, monkeypatch, name):
    def fail(*arguments: Any, **options: Any) -> None:
        raise Broken

    store = Store(tmp_path)
    if name == "metrics.jsonl":
        monkeypatch.setattr(Path, "write_text", fail)
    elif name == "rows.parquet":
        monkeypatch.setattr(pl.DataFrame, "write_parquet", fail)
    else:
        monkeypatch.setattr("recallzoo.store.write_json", fail)
    with pytest.raises(Broken):
        store.write(result())
    monkeypatch.undo()
    assert not store.has(result().hash)
    assert store.hashes() == []
    assert not list(tmp_path.rglob(".tmp-*"))
    store.write(result())
    assert store.read(result().hash) == result()


def test_numbers_that_json_does_not_know_are_never_written(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write(result(test_accuracy=float("nan")))
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write(result(metrics=[{"loss": float("inf")}]))
    assert store.hashes() == []


def test_a_folder_that_has_lost_its_result_is_no_run_and_is_written_anew(tmp_path):
    store = Store(tmp_path)
    store.write(result())
    (tmp_path / "runs" / result().hash / "result.json").unlink()
    assert store.hashes() == []
    store.write(result(label="again"))
    assert store.read(result().hash).label == "again"


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "zeros":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        path.write_text(how)


@pytest.mark.parametrize(
    ("name", "how"),
    [("result.json", how) for how in ("cut", "zeros", "[]", '{"hash": 1}', "null")]
    + [("metrics.jsonl", how) for how in ("missing", "cut", "zeros", "")]
    + [("rows.parquet", how) for how in ("missing", "cut", "zeros", "PAR1")],
)
def test_a_damaged_run_is_named_with_the_way_out(tmp_path, name, how):
    store = Store(tmp_path)
    store.write(result("aa"))
    store.write(result("bb"))
    damage(tmp_path / "runs" / "bb" / name, how)
    readers = [lambda: store.read("bb"), store.table]
    readers += [store.slices] if name == "rows.parquet" else []
    for read in readers:
        with pytest.raises(StoreError) as error:
            read()
        assert str(tmp_path / "runs" / "bb") in str(error.value)
    assert store.read("aa") == result("aa")


@pytest.mark.parametrize(
    ("name", "read"), [("planned.json", Store.planned), ("commands.json", Store.commands)]
)
@pytest.mark.parametrize("content", ["", "{", "5"])
def test_no_advice_deletes_the_runs_beside_a_damaged_file(tmp_path, name, read, content):
    store = Store(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(StoreError, match=rf"{name} .*[dD]elete it: the results do not") as error:
        read(store)
    assert "folder it is in" not in str(error.value)


REMOVED = "(removed)"


def edit(path: Path, field: str, value: Any) -> None:
    """Set a field, such as config.data.test.0.task, of a JSON file, or remove it."""
    content = json.loads(path.read_text())
    *outer, last = field.split(".")
    table = content
    for name in outer:
        table = table[int(name)] if isinstance(table, list) else table[name]
    if value == REMOVED:
        del table[last]
    else:
        table[last] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("config", REMOVED, "config is missing"),
        ("config", [], "config is [], where names with values are wanted"),
        ("config.seed", REMOVED, "config.seed is missing"),
        ("config.seed", "0", 'config.seed is "0", where a whole number is wanted'),
        ("config.optimizer.learning_rate", True, "learning_rate is true, where a number is wanted"),
        ("config.optimizer.learning_rate", -1, "optimizer.learning_rate is not above 0"),
        ("config.data.test", [], "config.data.test is [], where a list of at least one is wanted"),
        ("config.data.test.0.task", None, "config.data.test[0].task is null, where names"),
        ("config.data.test.0.task.power", [1], "task.power is [1], where a whole number or"),
        ("config.model.mixers.0.options", ["a"], 'options is ["a"], where a list of names'),
        ("status", "done", "status is \"done\", where one of 'solved'"),
        ("valid_accuracy", REMOVED, "valid_accuracy is missing"),
        ("valid_accuracy", float("nan"), "valid_accuracy is NaN, where a finite number is wanted"),
        ("train_loss_nats", "1" * 99, f'train_loss_nats is "{"1" * 36}..., where a number or None'),
        ("state_size.kv", "8", 'state_size.kv is "8", where a whole number is wanted'),
        ("provenance.fallbacks", None, "provenance.fallbacks is null, where a list is wanted"),
        ("provenance.device", [1], "provenance.device is [1], where text or None is wanted"),
        ("hash", "aa", "hash is 'aa', where the name of its folder is wanted"),
        ("remark", "mine", "remark is no field of a result"),
    ],
    ids=str,
)
def test_a_result_that_was_edited_is_named_with_the_field(tmp_path, field, value, words):
    store = Store(tmp_path)
    store.write(result("aa"))
    store.write(result("bb"))
    path = tmp_path / "runs" / "bb" / "result.json"
    edit(path, field, value)
    for read in (lambda: store.read("bb"), store.table):
        with pytest.raises(StoreError) as error:
            read()
        assert f"{path} was changed after it was written: " in str(error.value)
        assert words in str(error.value)
    assert store.read("aa") == result("aa")


def test_what_a_result_may_lack_is_not_missed(tmp_path):
    store = Store(tmp_path)
    store.write(result())
    path = tmp_path / "runs" / result().hash / "result.json"
    for field in ("diverged_step", "provenance"):
        edit(path, field, REMOVED)
    assert store.read(result().hash) == result(provenance={})


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"could not read .*/runs/aa/result\.json"):
        Store(tmp_path).read("aa")


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ({"store_version": STORE_VERSION + 1}, UserError, "newer recallzoo"),
        ({"store_version": "1"}, StoreError, "names no store version"),
        ({}, StoreError, "names no store version"),
        ([1], StoreError, "names no store version"),
        ("{", StoreError, r"Replace it by one that says {\"store_version\": 1}"),
    ],
)
def test_a_folder_of_another_version_or_without_one_is_refused(
    tmp_path, content, error, words, create
):
    Store(tmp_path).write(result())
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(error, match=words):
        Store(tmp_path, create=create)
    assert (tmp_path / "runs" / result().hash / "result.json").exists()


def test_only_a_results_folder_or_an_empty_one_is_taken(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is a file"):
        Store(tmp_path / "file")
    with pytest.raises(UserError, match="not empty and is no results folder"):
        Store(tmp_path / "other")
    for name in ("empty", "absent"):
        with pytest.raises(UserError, match="holds no results"):
            Store(tmp_path / name, create=False)
    assert not (tmp_path / "absent").exists()
    assert Store(tmp_path / "empty").hashes() == []


def test_a_folder_whose_first_writer_was_killed_is_taken(tmp_path):
    (tmp_path / f".tmp-store.json-{2**22 + 1}-0123abcd").write_text("{")
    assert Store(tmp_path).hashes() == []


def test_clearing_takes_what_a_killed_writer_left_and_nothing_else(tmp_path):
    store = Store(tmp_path)
    store.write(result())
    dead, alive = 2**22 + 1, os.getpid()  # above Linux's largest process id
    for process in (dead, alive):
        (tmp_path / "runs" / f".tmp-abc-{process}-0123abcd").mkdir()
    assert len(list((tmp_path / "runs").glob(".tmp-*"))) == 2
    Store(tmp_path).clear_leftovers()
    assert [p.name for p in (tmp_path / "runs").glob(".tmp-*")] == [f".tmp-abc-{alive}-0123abcd"]
    assert store.hashes() == [result().hash]


def test_the_table_has_a_row_a_run_and_a_column_an_option(tmp_path):
    store = Store(tmp_path)
    other = {**CONFIG, "optimizer": {"learning_rate": 1e-2, "max_grad_norm": 0.5}, "new": "x"}
    store.write(result("aa"))
    store.write(result("bb", config=other, state_size={}, diverged_step=7, train_loss_nats=None))
    table = store.table()
    first, second = table.to_dicts()
    assert first["hash"] == "aa"
    assert first["model.d_model"] == 64
    assert json.loads(first["model.mixers"]) == CONFIG["model"]["mixers"]
    assert (first["optimizer.max_grad_norm"], second["optimizer.max_grad_norm"]) == (None, 0.5)
    assert (first["new"], second["new"]) == (None, "x")
    assert (first["state_size"], second["state_size"]) == (144, None)
    assert (first["device"], first["commit"]) == ("CPU, 1 threads", "abc")
    assert (first["diverged_step"], second["diverged_step"]) == (None, 7)
    assert not {"rows", "metrics", "provenance", "config"} & set(table.columns)
    assert store.write_table() == tmp_path / "table.parquet"
    assert_frame_equal(pl.read_parquet(tmp_path / "table.parquet"), table)


def test_the_table_of_slices_says_which_run_each_row_is_of(tmp_path):
    store = Store(tmp_path)
    assert dict(store.slices().schema) == {"hash": pl.String, **ROWS_SCHEMA}
    store.write(result("aa"))
    store.write(result("bb", rows=[]))
    store.write(result("cc", rows=result().rows[:1]))
    rows = [{"hash": h, **dataclasses.asdict(r)} for h, rs in (("aa", result().rows),) for r in rs]
    rows.append({"hash": "cc", **dataclasses.asdict(result().rows[0])})
    assert store.slices().to_dicts() == rows
    assert Store(tmp_path).table().height == 3


plain = st.none() | st.integers() | st.text(max_size=5) | st.booleans()
names = st.text("abc_", min_size=1, max_size=4)
configs = st.dictionaries(
    names, st.recursive(plain, lambda inner: st.dictionaries(names, inner, max_size=3)), max_size=4
)


@given(configs)
def test_flattening_keeps_every_value_under_its_path(config):
    def paths(value: Any, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {".".join(prefix): value}
        return {k: v for n, x in value.items() for k, v in paths(x, (*prefix, n)).items()}

    assert flatten(config) == paths(config)


def test_lists_become_json_text():
    assert flatten({"a": {"b": [1, {"c": None}]}}) == {"a.b": '[1, {"c": null}]'}
