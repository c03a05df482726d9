"""A pack that is interrupted goes on from its checkpoint and ends as if it had not been."""

import os
from pathlib import Path

import pytest
from test_leaving import stopping
from tiny_runs import outcome, tiny_run, train

from recallzoo.errors import StoreError
from recallzoo.mixers import mixer
from recallzoo.result import Result
from recallzoo.run import Run
from recallzoo.train.packed import Pack, PackOptions, Progress


class Killed(Exception):
    """Stands for the end of the process."""


def train_until(runs: list[Run], epoch: int, checkpoint: Path) -> list[Result]:
    """Train with a checkpoint every epoch until the end of `epoch`, then break off."""

    def break_off(progress: Progress) -> None:
        if progress.epoch >= epoch:
            raise Killed

    options = PackOptions(checkpoint=checkpoint, checkpoint_seconds=0, on_progress=break_off)
    results: list[Result] = []
    with pytest.raises(Killed):
        results.extend(Pack(runs, "cpu", options).train())
    return results


def go_on(runs: list[Run], checkpoint: Path) -> list[Result]:
    options = PackOptions(checkpoint=checkpoint, checkpoint_seconds=0)
    return list(Pack(runs, "cpu", options).train())


def by_hash(*results: Result) -> dict[str, Result]:
    return {result.hash: outcome(result) for result in results}


RUNS = [
    tiny_run(
        mixer("base_conv"), mixer("attention"), seed=seed, learning_rate=rate, residual_dropout=0.1
    )
    for seed, rate in ((0, 3e-3), (1, 1e-2), (2, 3e-2))
]


@pytest.mark.parametrize("epochs", [[1], [2], [6], [2, 3], [2, 2, 5]])
def test_a_resumed_pack_gives_identical_results(tmp_path, epochs):
    checkpoint = tmp_path / "folder" / "checkpoint.safetensors"
    for epoch in epochs:
        train_until(RUNS, epoch, checkpoint)
        assert checkpoint.exists() == (epoch > 1)
    assert by_hash(*go_on(RUNS, checkpoint)) == by_hash(*train(*RUNS))


def test_a_resumed_pack_goes_on_where_it_stopped(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    train_until(RUNS, 4, checkpoint)
    seen: list[int] = []
    options = PackOptions(checkpoint=checkpoint, on_progress=lambda p: seen.append(p.epoch))
    results = list(Pack(RUNS, "cpu", options).train())
    assert min(seen) == 4, "epochs 1 to 3 are in the checkpoint"
    assert [len(result.metrics) for result in results] == [6, 6, 6]


def test_runs_that_had_left_do_not_come_back(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    runs = stopping(0.45)
    whole = by_hash(*train(*runs))
    left_at = sorted({r.epochs for r in whole.values() if r.status == "solved"})
    before = train_until(runs, left_at[0] + 2, checkpoint)
    after = go_on(runs, checkpoint)
    assert before
    assert after
    assert by_hash(*before, *after) == whole
    assert {r.hash for r in after}.isdisjoint(r.hash for r in before if r.epochs <= left_at[0])


def test_a_diverged_run_is_still_known_after_a_restart(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    runs = [
        tiny_run(learning_rate=rate, evaluate_every=2, num_epochs=8, seed=seed)
        for rate, seed in ((3e-3, 0), (1e30, 1))
    ]
    before = train_until(runs, 6, checkpoint)
    after = go_on(runs, checkpoint)
    assert by_hash(*before, *after) == by_hash(*train(*runs))
    assert [r.status for r in before] == ["diverged"]


def test_checkpoints_are_made_at_the_interval_asked_for(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    list(Pack(RUNS, "cpu", PackOptions(checkpoint=checkpoint, checkpoint_seconds=3600)).train())
    assert not checkpoint.exists()


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "text", "bits", "epoch", "other runs", "other sizes"]
)
def test_a_damaged_checkpoint_is_named_and_the_way_out_works(tmp_path, damage):
    checkpoint = tmp_path / "checkpoint.safetensors"
    made_by = RUNS
    if damage == "other runs":
        made_by = [tiny_run(mixer("base_conv"), mixer("attention"), seed=9)]
    if damage == "other sizes":
        made_by = [tiny_run(mixer("base_conv"), d_model=8)]
    train_until(made_by, 3, checkpoint)
    content = checkpoint.read_bytes()
    if not damage.startswith("other"):
        broken = {
            "empty": b"",
            "cut": content[: len(content) // 2],
            "text": b"{} " * 100,
            "bits": content[:-100] + bytes(255 - byte for byte in content[-100:]),
            "epoch": content.replace(rb"epoch\": 2, \"", rb"epoch\": 1, \""),
        }
        assert broken[damage] != content
        checkpoint.write_bytes(broken[damage])
    with pytest.raises(StoreError, match=r"is damaged .*Delete it to train this pack") as error:
        go_on(RUNS, checkpoint)
    assert str(checkpoint) in str(error.value)
    checkpoint.unlink()
    assert by_hash(*go_on(RUNS, checkpoint)) == by_hash(*train(*RUNS))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    options = PackOptions(checkpoint=tmp_path / "c.safetensors", checkpoint_seconds=0)
    with pytest.raises(StoreError, match="no permission"):
        list(Pack(RUNS, "cpu", options).train())


def test_progress_says_how_far_a_pack_is():
    seen: list[Progress] = []
    runs = stopping(0.45)
    options = PackOptions(on_progress=seen.append, progress_seconds=0)
    results = list(Pack(runs, "cpu", options).train())
    assert {(p.num_steps, p.num_epochs, p.num_runs) for p in seen} == {(4 * 15, 15, len(runs))}
    assert [p.step for p in seen] == sorted(p.step for p in seen)
    assert seen[-1].step == max(r.steps for r in results)
    for progress in seen:
        assert len(progress.train_loss_nats) == progress.num_active
        done = sum(result.steps < progress.step for result in results)
        assert progress.num_active == len(runs) - done
    known = [p.best_valid_accuracy for p in seen if p.best_valid_accuracy is not None]
    assert seen[0].best_valid_accuracy is None
    assert all(0 <= accuracy <= 1 for accuracy in known)
