"""A pretraining run told to stop keeps what it saves; slips of many digits are refused."""

import signal
import time

import pytest
import torch
from forks import COMMAND_LINE, Forked
from pretraining import losses, options

from recallzoo.cli import main
from recallzoo.interrupts import MESSAGE
from recallzoo.train import _large_checkpoint as checkpoints
from recallzoo.train._large_model import Processes
from recallzoo.train.pretrain import pretrain


def words(data, out):
    sizes = ["--d-model", 64, "--num-layers", 1, "--context", 16, "--global-batch", 4]
    rest = ["--steps", 600, "--repeat-data", "--save-every", 1, "--valid-every", 0]
    places = ["--data", data, "--out", out, "--no-export", "--device", "cpu", "--precision", "fp32"]
    return ["pretrain", "attention-70m", *places, *sizes, *rest]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wait_seconds", [0.0, 0.01, 0.03])
def test_a_signal_at_the_first_save_ends_the_run_with_one_message(
    data, tmp_path, number, wait_seconds
):
    out = tmp_path / "run"
    process = Forked(COMMAND_LINE, *words(data, out))
    while not list(out.glob("checkpoints/*")):
        assert process.poll() is None, process.err
        time.sleep(0.001)
    time.sleep(wait_seconds)
    process.send(number)
    assert process.wait(20) == 130
    assert process.err.count(MESSAGE) == 1
    assert "Traceback" not in process.err
    assert "terminate" not in process.err
    steps = checkpoints.finished_steps(out / "checkpoints")
    more = {"steps": 600, "repeat_data": True, "valid_every": 0}
    stopped = pretrain(options(data, out, **more, stop_after_minutes=0))
    assert stopped["steps"] == (steps[-1] if steps else 0) + 1
    assert len(losses(out)) == stopped["steps"]


class Slow:
    """A save that is under way until it is told to end."""

    def __init__(self, interrupt_first: bool) -> None:
        self.interrupt = interrupt_first

    def done(self) -> bool:
        return True

    def result(self) -> None:
        if self.interrupt:
            self.interrupt = False
            raise KeyboardInterrupt


def test_a_save_whose_waiting_was_interrupted_can_be_waited_for_again(tmp_path, monkeypatch):
    def save(state, *, storage_writer, **_):
        (storage_writer.path / "shard.safetensors").write_bytes(b"whole")
        return Slow(interrupt_first=True)

    monkeypatch.setattr(checkpoints, "async_save", save)
    kept = checkpoints.Checkpoints(tmp_path, Processes(0, 1, torch.device("cpu")), "run", keep=1)
    kept.save(7, {})
    with pytest.raises(KeyboardInterrupt):
        kept.finish()
    assert checkpoints.finished_steps(tmp_path) == []
    assert kept.finish() == 7
    assert checkpoints.finished_steps(tmp_path) == [7]
    kept.save(8, {})
    with pytest.raises(KeyboardInterrupt):
        kept.finish()
    assert kept.finish() == 8
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("--tokens", "1e300", "--tokens 1e+300 must be at most 1e+15"),
        ("--num-layers", "10000000", "--num-layers 10,000,000 must be at most 10,000"),
        ("--epochs", "1e12", "--epochs 1e+12 must be at most 1,000,000"),
        ("--steps", "9" * 300, "--steps 1e+300 must be at most 1,000,000,000"),
        ("--steps", "9" * 400, "--steps of over 308 digits must be at most 1,000,000,000"),
        ("--d-model", "10000000", "must be at most 100,000"),
    ],
)
def test_slips_of_many_digits_are_refused(option, value, shown, tmp_path, capsys):
    code = main(["pretrain", "attention-70m", "--data", "d", "--out", str(tmp_path), option, value])
    told = capsys.readouterr().err
    assert code == 2
    assert shown in told
    assert "Give a smaller number" in told
    assert len(told) < 200
    assert not list(tmp_path.iterdir())
