"""`recallzoo run --known`: what stands in a table of runs is not trained again."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import RECIPES, Outcome, require_mistake

from recallzoo.cli import main
from recallzoo.recipes import load
from recallzoo.report import open_runs

TINY = RECIPES / "tiny.py"
GROUP = ("--stop-group", "--learning-rates", 1e-3, 3e-3, 1e-2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the two runs of the recipe."""
    folder = tmp_path_factory.mktemp("whole") / "o"
    assert main(["run", str(TINY), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(run_cli: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    """Run the recipe into the folder `o`."""
    return lambda *options: run_cli("run", TINY, "--out", tmp_path / "o", *options)


def part(whole: Path, path: Path, *learning_rates: float, **changed: Any) -> Path:
    """A table of the runs at these rates, with columns changed."""
    columns = {name.replace("__", "."): pl.lit(value) for name, value in changed.items()}
    table = pl.read_parquet(whole / "table.parquet")
    table = table.filter(pl.col("optimizer.learning_rate").is_in(learning_rates))
    table.with_columns(**columns).write_parquet(path)
    return path


def lines_of_table(outcome: Outcome) -> list[str]:
    return outcome.out.partition("best lr: ")[0].splitlines()


def test_runs_of_a_table_are_not_trained_and_count_with_the_others(whole, run, run_cli, tmp_path):
    table = part(whole, tmp_path / "kept.parquet", 1e-2)
    outcome = run("--known", table)
    assert outcome.code == 0, outcome.err
    assert f"1 of 2 runs stand in {table}\n" in outcome.err
    assert "1 run, 1 to train in 1 pack\n" in outcome.err
    assert lines_of_table(outcome) == lines_of_table(run_cli("run", TINY, "--out", whole))
    assert "2 finished" in outcome.out
    places = f"{tmp_path / 'o'} {table}"
    assert f"charts: recallzoo report {places} --out report" in outcome.out
    assert "note: kept.parquet is a table of runs: it has no accuracy by slice" in outcome.out
    first, second = load(str(TINY)).runs()
    planned = json.loads((tmp_path / "o" / "planned.json").read_text())["runs"]
    assert [*planned] == [first.hash]
    joined = open_runs([tmp_path / "o", table])
    assert {one.hash for one in joined.results} == {first.hash, second.hash}
    assert joined.missing() == {}
    again = run("--known", table)
    assert "1 run, 1 finished before\n" in again.err
    assert lines_of_table(again) == lines_of_table(outcome)


def test_where_all_runs_stand_in_tables_nothing_is_trained_and_no_folder_made(
    whole, run, run_cli, tmp_path
):
    tables = [part(whole, tmp_path / f"{rate}.parquet", rate) for rate in (1e-3, 1e-2)]
    outcome = run("--known", tables[0], "--known", tables[1], "--minutes", 1e-9)
    assert outcome.code == 0, outcome.err
    assert "nothing is left to train" in outcome.err
    assert lines_of_table(outcome) == lines_of_table(run_cli("run", TINY, "--out", whole))
    assert f"results: {tables[0]} and {tables[1]}; charts" in outcome.out
    assert not (tmp_path / "o").exists()


def test_what_is_left_when_time_is_up_is_counted_without_the_runs_of_tables(whole, run, tmp_path):
    table = part(whole, tmp_path / "kept.parquet", 1e-2)
    outcome = run("--known", table, "--seeds", 0, 1, "--minutes", 1e-9)
    assert outcome.code == 75
    assert "3 of 4 runs are left" in outcome.err
    assert "1 finished" in outcome.out
    assert f"results: {table}; charts: recallzoo report {table} --out report" in outcome.out


def test_a_dry_run_leaves_out_what_stands_in_tables(whole, run, tmp_path):
    table = part(whole, tmp_path / "kept.parquet", 1e-2)
    outcome = run(
        "--dry-run", "--known", table, "--known", whole / "table.parquet", "--seeds", 0, 1
    )
    assert outcome.code == 0, outcome.err
    assert "4 runs, 0 finished" in outcome.out
    assert "2 in tables, 2 to train on cpu in 1 packs" in outcome.out
    assert f"1 of 4 runs stand in {table}\n" in outcome.out
    assert (
        f"2 of 4 runs stand in {whole / 'table.parquet'}, 1 of them in {tmp_path / 'o'} or a table "
        f"named before too\n"
    ) in outcome.out
    assert re.findall(r"learning rate (\S+), seed (\d)", outcome.out) == [
        ("0.001", "1"),
        ("0.01", "1"),
    ]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "changed", "words"),
    [
        (
            ("--num-epochs", 3, "--seeds", 4),
            {},
            "other options: budget.num_epochs 2 (asked for: 3); seed 0 (asked for: 4).",
        ),
        (("--num-examples", 96), {}, "other options: train_num_examples 64 (asked for: 96)."),
        (
            ("--seeds", 1),
            {"run_version": 0, "hash": "0123456789abcdef"},
            "run_version 0, those asked for 1: such runs train differently",
        ),
        ((), {"hash": "0123456789abcdef"}, "in other combinations"),
        (
            (
                *("--mixers", "base_conv", "--seeds", 2, 1, "--num-epochs", 1),
                *("--stop-group", "--num-examples", 96),
            ),
            {},
            "other options: model.mixers; budget.num_epochs 2 (asked for: 1); budget.stop_accuracy "
            "None (asked for: 0.99); budget.stop_group False (asked for: True); seed 0 (asked for: "
            "1, 2) and 1 more.",
        ),
    ],
    ids=["options", "data", "version", "combination", "many"],
)
def test_a_table_without_any_of_the_runs_is_told_of_with_the_likely_reason(
    whole, run, tmp_path, options, changed, words
):
    table = part(whole, tmp_path / "kept.parquet", 1e-2, **changed)
    outcome = run("--known", table, "--dry-run", *options)
    assert outcome.code == 0, outcome.err
    assert f"note: none of the runs asked for stands in {table}. " in outcome.out
    assert words in outcome.out
    assert "0 in tables" in outcome.out


def no_parquet(whole: Path, path: Path) -> Path:
    path.write_bytes(b"\x00 no parquet")
    return path


def another(whole: Path, path: Path) -> Path:
    pl.DataFrame({"x": [1]}).write_parquet(path)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda whole, path: path, "cannot be read as Parquet"),
        (no_parquet, "Give the table.parquet that recallzoo run keeps in a results folder"),
        (another, "no table of runs: it lacks hash, group, label"),
        (lambda whole, path: part(whole, path), "has no runs in it"),
        (lambda whole, path: whole, "is a folder; a table of runs is wanted. Give "),
        (
            lambda whole, path: part(whole, path, 1e-2, seed=1),
            "seed is 1, where the run of this hash has 0. The table was damaged or changed",
        ),
        (
            lambda whole, path: part(whole, path, 1e-2, status="done"),
            "'group_solved' is wanted. The table was damaged or changed. Give it as recallzoo run "
            "wrote it.\n",
        ),
        (lambda whole, path: path.parent / "o" / "table.parquet", "is the table of"),
    ],
    ids=["missing", "text", "another", "empty", "folder", "moved", "status", "own"],
)
def test_what_is_no_table_of_runs_is_refused_before_anything_is_written(
    whole, run, tmp_path, make, words
):
    table = make(whole, tmp_path / "t.parquet")
    outcome = run("--known", table)
    require_mistake(outcome, str(table), words)
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three runs that stop together; none solves the task."""
    folder = tmp_path_factory.mktemp("group") / "o"
    assert main(["run", str(TINY), "--out", str(folder), *map(str, GROUP)]) == 0
    return folder


def ended(group: Path, path: Path, **endings: tuple[str, int]) -> Path:
    """Its table, where runs ended as told: status and epochs by learning rate."""
    table = pl.read_parquet(group / "table.parquet").sort("optimizer.learning_rate")
    statuses, epochs = zip(*endings.values(), strict=True)
    table[: len(endings)].with_columns(
        status=pl.Series(statuses), epochs=pl.Series(epochs)
    ).write_parquet(path)
    return path


@pytest.mark.parametrize(
    ("endings", "is_known"),
    [
        ([("finished", 2)] * 3, True),
        ([("group_solved", 1), ("solved", 1), ("group_solved", 1)], True),
        ([("diverged", 1), ("finished", 2), ("finished", 2)], True),
        ([("finished", 2)] * 2, False),  # one of the group is to be trained
        ([("solved", 1), ("group_solved", 1)], False),
        ([("group_solved", 1)] * 3, False),  # by one that is not asked for
        ([("solved", 1), ("group_solved", 1), ("finished", 2)], False),  # trained apart
        ([("solved", 1), ("group_solved", 1), ("diverged", 2)], False),
    ],
)
def test_of_a_group_that_stops_together_all_runs_count_or_none(
    group, run, tmp_path, endings, is_known
):
    named = {str(number): ending for number, ending in enumerate(endings)}
    table = ended(group, tmp_path / "kept.parquet", **named)
    outcome = run("--known", table, "--dry-run", *GROUP)
    assert f"{len(endings)} of 3 runs stand in {table}\n" in outcome.out
    note = f"note: {len(endings)} runs that stand in a table are trained all the same"
    assert (note in outcome.out) == (not is_known)
    assert f"{3 * is_known} in tables, {3 - 3 * is_known} to train" in outcome.out


def test_of_a_group_some_may_be_finished_in_the_folder(group, run, tmp_path):
    shutil.copytree(group, tmp_path / "o")
    shutil.rmtree(next((tmp_path / "o" / "runs").iterdir()))
    outcome = run("--known", group / "table.parquet", "--dry-run", *GROUP)
    assert f"3 runs, 2 finished in {tmp_path / 'o'}, 1 in tables, 0 to train" in outcome.out
