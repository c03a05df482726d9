"""Whatever happens to a sweep, finished runs are kept and the result is the same."""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import polars as pl
import pytest
from conftest import RECIPES, Outcome, require_mistake
from forks import COMMAND_LINE, Forked
from polars.testing import assert_frame_equal

from recallzoo.store import Store

TINY, SLOW = RECIPES / "tiny.py", RECIPES / "slow.py"
TIMINGS = ("train_seconds",)
SLOW_OPTIONS = ("--max-pack-size", 2, "--checkpoint-seconds", 0)


def table(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "table.parquet").drop(TIMINGS)


def metrics(folder: Path) -> dict[str, str]:
    return {p.parent.name: p.read_text() for p in folder.glob("runs/*/metrics.jsonl")}


def fill(ballast: Path) -> None:
    """Write until nothing more goes onto the disk."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def start(*arguments: object) -> Forked:
    return Forked(COMMAND_LINE, *arguments)


def finish(process: Forked) -> Outcome:
    return Outcome(process.wait(), process.out, process.err)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "o"
    outcome = finish(start("run", SLOW, "--out", folder, *SLOW_OPTIONS))
    assert outcome.code == 0, outcome.err
    return folder, outcome


@pytest.mark.slow
@pytest.mark.parametrize("draw", [0, 1])
def test_a_sweep_killed_three_times_ends_with_the_same_table(undisturbed, tmp_path, draw):
    folder, moments = tmp_path / "o", random.Random(draw)
    for _ in range(3):
        process = start("run", SLOW, "--out", folder, *SLOW_OPTIONS)
        process.wait_for("pack 1/")
        time.sleep(moments.uniform(0.0, 0.8))
        assert process.poll() is None, "the sweep was over before it could be killed"
        process.kill()
    last = finish(start("run", SLOW, "--out", folder, *SLOW_OPTIONS))
    assert last.code == 0, last.err
    expected, outcome = undisturbed
    assert_frame_equal(table(folder), table(expected))
    assert_frame_equal(Store(folder).slices(), Store(expected).slices())
    assert metrics(folder) == metrics(expected)
    assert last.out.replace(str(folder), "") == outcome.out.replace(str(expected), "")
    assert not list((folder / "packs").iterdir())
    assert not list(folder.rglob(".tmp-*"))


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_keeps_what_is_finished(undisturbed, tmp_path):
    folder = tmp_path / "o"
    process = start("run", SLOW, "--out", folder, *SLOW_OPTIONS)
    process.wait_for("pack 2/")
    process.send(signal.SIGINT)
    stopped = finish(process)
    assert stopped.code == 130
    assert "stopped; finished work is kept; run the same command to go on." in stopped.err
    assert "Traceback" not in stopped.err
    kept = Store(folder).hashes()
    assert kept
    resumed = finish(start("run", SLOW, "--out", folder, *SLOW_OPTIONS))
    assert f"6 runs, {len(kept)} finished before" in resumed.err
    assert_frame_equal(table(folder), table(undisturbed[0]))


@pytest.mark.slow
def test_a_second_process_on_the_same_folder_is_refused(tmp_path):
    folder = tmp_path / "o"
    first = start("run", SLOW, "--out", folder)
    first.wait_for("pack 1/")
    second = finish(start("run", SLOW, "--out", folder))
    require_mistake(second, "another process is writing", str(folder))
    first.kill()


def test_a_full_disk_is_named_and_nothing_finished_is_lost(small_disk, tmp_path, run_cli):
    folder, expected = small_disk / "o", tmp_path / "expected"
    assert run_cli("run", TINY, "--out", expected).code == 0
    assert run_cli("run", TINY, "--out", folder, "--learning-rates", 1e-3).code == 0
    ballast = small_disk / "ballast"
    fill(ballast)
    full = run_cli("run", TINY, "--out", folder)
    require_mistake(full, "the disk is full", "kept", code=1)
    assert len(Store(folder, create=False).hashes()) == 1
    ballast.unlink()
    assert run_cli("run", TINY, "--out", folder).code == 0
    assert_frame_equal(table(folder), table(expected))


@pytest.mark.parametrize("free_kilobytes", [4, 12, 20, 32])
def test_a_disk_that_fills_up_while_training_is_named(small_disk, run_cli, free_kilobytes):
    folder, ballast = small_disk / "o", small_disk / "ballast"
    assert run_cli("run", TINY, "--out", folder, "--learning-rates", 1e-3).code == 0
    free = shutil.disk_usage(small_disk).free - 1024 * free_kilobytes
    ballast.write_bytes(b"x" * free)
    options = ("--seeds", *range(6), "--checkpoint-seconds", 0)
    require_mistake(run_cli("run", TINY, "--out", folder, *options), "disk is full", code=1)
    ballast.unlink()
    assert run_cli("run", TINY, "--out", folder, *options).code == 0
    assert Store(folder).table().height == 12


def test_a_read_only_folder_is_named(small_disk, run_cli):
    folder = small_disk / "o"
    assert run_cli("run", TINY, "--out", folder, "--learning-rates", 1e-3).code == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    outcome = run_cli("run", TINY, "--out", folder)
    require_mistake(outcome, "no permission to write there", code=1)
    require_mistake(
        run_cli("run", TINY, "--out", small_disk / "new"), "no permission to write", code=1
    )


def test_a_folder_of_a_newer_version_is_refused(tmp_path, run_cli):
    (tmp_path / "store.json").write_text(json.dumps({"store_version": 99}))
    require_mistake(run_cli("run", TINY, "--out", tmp_path), "newer recallzoo", "99")
    require_mistake(run_cli("report", tmp_path), "newer recallzoo", "99")


def test_a_folder_with_other_things_in_it_is_refused(tmp_path, run_cli):
    (tmp_path / "thesis.tex").write_text("years of work")
    require_mistake(run_cli("run", TINY, "--out", tmp_path), "not empty")
    require_mistake(run_cli("run", TINY, "--out", tmp_path / "thesis.tex"), "is a file")
    require_mistake(run_cli("report", tmp_path), "holds no results")
    require_mistake(run_cli("report", tmp_path / "nowhere"), "holds no results")


@pytest.mark.parametrize("name", ["result.json", "rows.parquet", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"", b'{"hash": \x00', None])
def test_a_damaged_run_is_named_before_anything_is_trained(tmp_path, run_cli, name, content):
    folder = tmp_path / "o"
    assert run_cli("run", TINY, "--out", folder).code == 0
    run = sorted((folder / "runs").iterdir())[0]
    if content is None:
        if name == "result.json":
            return  # a folder without it is no finished run: see the next test
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    outcome = run_cli("run", TINY, "--out", folder, "--seeds", 0, 1)
    assert "pack" not in outcome.err
    require_mistake(outcome, str(run), code=1)
    require_mistake(run_cli("report", folder), run.name, code=1)
    shutil.rmtree(run)
    assert run_cli("run", TINY, "--out", folder).code == 0


def test_a_result_that_was_edited_is_named_and_the_others_are_kept(tmp_path, run_cli):
    folder = tmp_path / "o"
    assert run_cli("run", TINY, "--out", folder).code == 0
    good = table(folder)
    run = sorted((folder / "runs").iterdir())[0]
    content = json.loads((run / "result.json").read_text())
    del content["config"]["optimizer"]
    (run / "result.json").write_text(json.dumps(content))
    for arguments in (["report", folder], ["run", TINY, "--out", folder]):
        outcome = run_cli(*arguments)
        require_mistake(
            outcome, f"{run / 'result.json'}", "config.optimizer is missing", "delete", code=1
        )
    shutil.rmtree(run)
    again = run_cli("run", TINY, "--out", folder)
    assert "2 runs, 1 finished" in again.err
    assert_frame_equal(table(folder), good)


@pytest.mark.parametrize("name", ["store.json", "packs/x/pack.json", "packs/x/pack.json 3"])
def test_a_damaged_folder_is_named(tmp_path, run_cli, name):
    folder = tmp_path / "o"
    assert run_cli("run", TINY, "--out", folder).code == 0
    name, _, content = name.partition(" ")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content or '{"store_ver')
    require_mistake(run_cli("run", TINY, "--out", folder), str(folder / name), code=1)
    require_mistake(run_cli("report", folder), str(folder / name), code=1)


def test_a_damaged_table_is_made_anew(tmp_path, run_cli):
    folder = tmp_path / "o"
    assert run_cli("run", TINY, "--out", folder).code == 0
    good = table(folder)
    (folder / "table.parquet").write_bytes(b"PAR1")
    assert run_cli("run", TINY, "--out", folder).code == 0
    assert_frame_equal(table(folder), good)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(tmp_path, run_cli):
    folder = tmp_path / "o"
    process = start("run", SLOW, "--out", folder, "--checkpoint-seconds", 0)
    process.wait_for("pack 1/")
    found: list[Path] = []
    while not found:
        assert process.poll() is None, "the sweep was over before it made a checkpoint"
        found = list(folder.glob("packs/*/checkpoint.safetensors"))
        time.sleep(0.02)
    process.kill()
    for content in (b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "):
        found[0].write_bytes(content)
        outcome = run_cli("run", SLOW, "--out", folder)
        require_mistake(outcome, str(found[0]), "Delete it", code=1)
    found[0].unlink()
    assert run_cli("run", SLOW, "--out", folder).code == 0
