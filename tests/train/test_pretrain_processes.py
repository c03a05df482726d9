"""Pretraining in several processes, and in one that is killed by the system."""

import json
import time
from pathlib import Path

import pytest
from forks import COMMAND_LINE, Forked
from pretraining import TINY, losses, options, small_data, valid_losses
from safetensors.torch import load_file

from recallzoo.cli import main
from recallzoo.errors import UserError
from recallzoo.train.pretrain import pretrain

# Sums over contexts and processes in another order, six steps of them.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, runs of one process, and those of `two_processes.py`."""
    folder = tmp_path_factory.mktemp("runs")
    data = small_data(folder / "data")
    pretrain(options(data, folder / "one", export=False))
    pretrain(options(data, folder / "one_few_valid", valid_contexts=1))
    pretrain(options(data, folder / "one_hyena", preset="hyena-70m", d_model=16))
    for parallel in ("ddp", "fsdp"):
        pretrain(options(data, folder / f"begun_{parallel}", stop_after_minutes=0))
    # Forked, as torchrun and what three processes import take longer than the runs: how it starts
    # processes is tested in `test_pretrain_restart.py`.
    both = [Forked("import two_processes; two_processes.main()", data, folder, r) for r in (0, 1)]
    for process in both:
        assert process.wait(300) == 0, process.err[-5000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(parallel, runs):
    assert losses(runs / parallel) == pytest.approx(losses(runs / "one"), abs=TOLERANCE)
    assert valid_losses(runs / parallel) == pytest.approx(valid_losses(runs / "one"), abs=TOLERANCE)


@pytest.mark.slow
def test_a_process_without_a_context_to_validate_on_helps_the_others(runs):
    assert len(valid_losses(runs / "few_valid")) == 2
    wanted = valid_losses(runs / "one_few_valid")
    assert valid_losses(runs / "few_valid") == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.slow
def test_the_summary_says_how_processes_shared_the_model_where_that_was_left_open(runs):
    assert json.loads((runs / "few_valid" / "summary.json").read_text())["parallel"] == "ddp"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_begun_by_one_process_goes_on_in_two(parallel, runs):
    got = losses(runs / f"begun_{parallel}")
    assert got == pytest.approx(losses(runs / "one"), abs=TOLERANCE)


@pytest.mark.slow
def test_a_run_begun_by_two_processes_goes_on_in_one(runs):
    assert len(losses(runs / "begun_here")) == 1
    pretrain(options(runs / "data", runs / "begun_here"))
    assert losses(runs / "begun_here") == pytest.approx(losses(runs / "one"), abs=TOLERANCE)


@pytest.mark.slow
def test_fixed_learning_rates_and_float32_filters_survive_sharding(runs):
    assert losses(runs / "hyena") == pytest.approx(losses(runs / "one_hyena"), abs=TOLERANCE)


@pytest.mark.slow
def test_a_sharded_checkpoint_is_exported_whole(runs, tmp_path, capsys):
    for name in ("one", "fsdp"):
        command = ["export", runs / name, "--data", runs / "data", "--out", tmp_path / name]
        assert main([str(word) for word in command]) == 0
    one, shared = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "fsdp"))
    assert one.keys() == shared.keys()
    for name, weight in one.items():
        # Adam moves a weight by about the learning rate a step, whatever its gradient's size, so
        # rounding shows most where gradients are almost zero.
        assert (weight - shared[name]).abs().max() < 5e-4
    assert (tmp_path / "fsdp" / "tokenizer.json").exists()
    assert main(["export", str(runs / "one"), "--out", str(tmp_path / "one")]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_by_the_system_goes_on_with_the_same_losses(runs, tmp_path):
    data, out = runs / "data", tmp_path / "run"
    settings = {"steps": 150, "repeat_data": True, "save_every": 10, "valid_every": 0}
    command = ["pretrain", TINY["preset"]]
    for name, value in {**TINY, **settings, "data": data, "out": out}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command += [f"--{flag}"] if value else [f"--no-{flag}"]
        elif name != "preset":
            command += [f"--{flag}", str(value)]
    process = Forked(COMMAND_LINE, *command)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step-*/checkpoint.json")):
        assert process.poll() is None, process.err
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert not (out / "summary.json").exists()
    pretrain(options(data, out, **settings))
    pretrain(options(data, tmp_path / "whole", **settings))
    assert losses(out) == losses(tmp_path / "whole")
    assert len(losses(out)) == 150


def test_a_global_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    from recallzoo.train import _large_model
    from recallzoo.train import pretrain as pretraining

    data = small_data(tmp_path / "data")
    monkeypatch.setattr(
        pretraining.large,
        "join_processes",
        lambda device: _large_model.Processes(0, 3, __import__("torch").device("cpu")),
    )
    with pytest.raises(UserError, match="3 processes"):
        pretrain(options(data, tmp_path / "run"))
