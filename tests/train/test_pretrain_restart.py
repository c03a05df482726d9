"""Pretraining whose processes torchrun starts anew after one of them was killed."""

# pyright: reportMissingImports=false

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pretraining import losses, options, small_data

from recallzoo.train.pretrain import pretrain

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SETTINGS = {"steps": 60, "save_every": 10, "valid_every": 0, "repeat_data": True}


@pytest.mark.slow
@pytest.mark.unchecked
def test_torchrun_starts_anew_and_training_goes_on_from_the_last_checkpoint(tmp_path):
    sys.path.insert(0, str(BENCHMARKS))
    import children

    data, out = small_data(tmp_path / "data"), tmp_path / "run"
    script = (
        "from pathlib import Path\n"
        "from pretraining import options\n"
        "from recallzoo.train.pretrain import pretrain\n"
        f"pretrain(options(Path({str(data)!r}), Path({str(out)!r}), **{SETTINGS!r}))\n"
    )
    (tmp_path / "train.py").write_text(script)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
    }
    torchrun = subprocess.Popen(
        [*words, "--nproc-per-node", "2", str(tmp_path / "train.py")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step-*/checkpoint.json")):
        assert torchrun.poll() is None, torchrun.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker = children.torchrun_worker(torchrun.pid, 1)
    assert worker is not None
    assert children.kill(worker)
    told = torchrun.communicate(timeout=120)[1]
    assert torchrun.returncode == 0, told[-3000:]
    assert "going on from step" in told
    pretrain(options(data, tmp_path / "one", **SETTINGS))
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    assert len(losses(out)) == 60
