"""What `benchmarks/several_gpus.py` says of its measurements, and how it keeps them."""

# pyright: reportMissingImports=false

import json
import sys
import time
from pathlib import Path
from typing import Any

import children
import pytest
import several_gpus
from several_gpus import command_of
from several_gpus_pretrain import pretrain_command
from several_gpus_record import (
    Record,
    efficiency,
    loss_difference,
    table_difference,
)

ABOUT = {"commands": ["python benchmarks/several_gpus.py"]}


def pretrained(processes: int, rate: float, losses: list[float], **own: Any) -> dict[str, Any]:
    parallel = "one process" if processes == 1 else "ddp"
    return {
        "settings": {"preset": "p", "parallel": parallel, "processes": processes, **own},
        "status": "done",
        "tokens_per_second": rate,
        "losses": losses,
    }


def swept(devices: int, seconds: float, accuracy: float, killed: int = 0) -> dict[str, Any]:
    columns = {"valid_accuracy": 1.0, "test_accuracy": accuracy}
    columns |= {"valid_loss_nats": 0.5, "test_loss_nats": None, "status": "finished", "steps": 9}
    return {
        "settings": {"recipe": "figure2", "devices": devices, "killed_workers": killed},
        "status": "done",
        "seconds": seconds,
        "table": {"run": columns},
    }


def test_efficiency_is_the_share_of_n_times_the_rate_of_one():
    assert efficiency(180.0, 100.0, 2) == pytest.approx(0.9)


def test_losses_are_compared_step_by_step():
    found = loss_difference([3.0, 2.0, 1.0], [3.0, 2.5, 1.25])
    assert found["largest_nats"] == 0.5
    assert found["largest_at_step"] == 2
    assert found["equal_steps"] == 1
    assert found["equal_number_of_steps"]
    assert not loss_difference([3.0], [3.0, 2.0])["equal_number_of_steps"]


def test_tables_are_compared_run_by_run():
    same = swept(1, 1.0, 0.5)["table"]
    other = swept(1, 1.0, 0.75)["table"]
    assert table_difference(same, same)["runs_that_differ"] == 0
    found = table_difference(other, same)
    assert (found["runs_that_differ"], found["largest_test_accuracy"]) == (1, 0.25)
    assert table_difference({}, same)["runs_in_one_table_only"] == 1


def test_a_measurement_is_compared_with_its_base_in_whatever_order_they_come(tmp_path):
    record = Record(tmp_path / "out.json", ABOUT)
    record.keep("pretrain", pretrained(2, 150.0, [3.0, 2.25]))
    record.keep("pretrain", pretrained(1, 100.0, [3.0, 2.0]))
    record.keep("kill", pretrained(2, 1.0, [3.0, 2.25], save_every=5))
    record.keep("sweep", swept(1, 100.0, 0.5))
    record.keep("sweep", swept(2, 62.5, 0.5))
    record.keep("sweep", swept(2, 70.0, 0.75, killed=1))
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["pretrain"][0]["efficiency"] == 0.75
    assert kept["pretrain"][0]["against_one_process"]["largest_nats"] == 0.25
    assert kept["kill"][0]["against_undisturbed"]["equal_steps"] == 2
    assert kept["sweep"][1]["efficiency"] == 0.8
    killed = kept["sweep"][2]
    assert killed["table_against"]["devices"] == 2
    assert killed["table_against"]["largest_test_accuracy"] == 0.25
    assert "efficiency" not in killed


def test_what_is_measured_is_found_again_and_what_failed_is_not(tmp_path):
    path = tmp_path / "out.json"
    record = Record(path, ABOUT)
    record.keep("pretrain", pretrained(1, 100.0, [3.0]))
    failed = {**pretrained(2, 1.0, []), "status": "failed"}
    record.keep("pretrain", failed)
    again = Record(path, {"commands": ["another"]})
    assert again.find("pretrain", pretrained(1, 0.0, [])["settings"])
    assert again.find("pretrain", failed["settings"]) is None
    again.keep("pretrain", pretrained(2, 190.0, [3.0]))
    kept = json.loads(path.read_text())
    assert [row["status"] for row in kept["pretrain"]] == ["done", "done"]
    assert kept["about"]["commands"] == [*ABOUT["commands"], "another"]


def test_commands_name_no_place_of_this_machine():
    told = command_of(["--out", "/tmp/x.json", "--steps", "9", "--data", "/d"], ["--seeds", "0"])
    assert told == "python benchmarks/several_gpus.py --out OUT --steps 9 --data DATA -- --seeds 0"


def test_several_processes_start_under_torchrun_and_one_does_not():
    names = ("context", "global_batch", "steps", "warmup", "learning_rate", "precision", "compile")
    settings: dict[str, Any] = {**dict.fromkeys(names, 1), "d_model": 64, "num_layers": None}
    settings |= {"preset": "attention-70m", "checkpoint_activations": True, "parallel": "fsdp"}
    alone = pretrain_command({**settings, "processes": 1}, 4, "cpu")
    two = pretrain_command({**settings, "processes": 2}, 4, "cpu", "--save-every", "3")
    assert "torch.distributed.run" not in alone
    assert "--parallel" not in alone
    assert two[two.index("--nproc-per-node") + 1] == "2"
    assert two[two.index("--parallel") + 1] == "fsdp"
    assert two[-2:] == ["--save-every", "3"]


def start(tmp_path: Path, code: str) -> children.Child:
    return children.Child([sys.executable, "-c", code], tmp_path / "log", {})


def test_a_child_that_fails_leaves_its_last_words(tmp_path):
    end = start(tmp_path, "print('so far', flush=True); raise SystemExit('no good')").wait(30)
    assert end is not None
    assert (end.status, end.exit_code) == ("failed", 1)
    assert end.last_lines()[-1] == "no good"


def test_a_child_that_outlasts_its_time_is_stopped_with_all_it_started(tmp_path):
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        " start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    child = start(tmp_path, script)
    assert child.wait(30, until=lambda: bool(child.log.read_text())) is None
    end = child.wait(0.1)
    assert end is not None
    assert end.status == "time ran out"
    grandchild = Path("/proc") / child.log.read_text().split()[0] / "stat"
    for _ in range(100):
        if not grandchild.exists() or ") Z " in grandchild.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child's child lives on")


def test_help_explains_the_parts_and_without_gpus_it_says_what_to_do(capsys):
    with pytest.raises(SystemExit) as helped:
        several_gpus.main(["--help"])
    assert helped.value.code == 0
    told = capsys.readouterr().out
    for word in ("pretrain", "kill", "sweep", "--child-seconds", "--concurrent"):
        assert word in told
    with pytest.raises(SystemExit) as refused:
        several_gpus.main(["--device", "cpu", "--global-batch", "9"])
    assert refused.value.code == 2
    assert "give a multiple of 32" in capsys.readouterr().err
