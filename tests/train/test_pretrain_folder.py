"""A pretraining run's folder: one process at a time, a model when it is wanted, and exports."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from pretraining import options
from safetensors.torch import load_file

from recallzoo.cli import main
from recallzoo.errors import RecallzooError, UserError
from recallzoo.files import read_json, write_json
from recallzoo.train._pretrain_valid import Validation
from recallzoo.train.exporting import export_run
from recallzoo.train.pretrain import pretrain


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its model."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    pretrain(options(data, out, export=True))
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run with its model, to change."""
    return shutil.copytree(finished, tmp_path / "run")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_second_process_in_the_folder_is_refused(data, tmp_path, monkeypatch):
    look, refused = Validation.look, []

    def meanwhile(self: Validation, *args):
        with pytest.raises(UserError, match=r"another process is training in .* Wait for it"):
            pretrain(options(data, tmp_path / "run"))
        refused.append(True)
        return look(self, *args)

    monkeypatch.setattr(Validation, "look", meanwhile)
    assert pretrain(options(data, tmp_path / "run"))["status"] == "finished"
    assert len(refused) == 2  # looks at validation
    (tmp_path / "run" / "summary.json").unlink()
    assert pretrain(options(data, tmp_path / "run"))["steps"] == 6  # a run that ended lets go


def test_a_finished_run_without_a_model_gets_it_when_it_is_asked_for(data, finished, run):
    shutil.rmtree(run / "model")
    assert pretrain(options(data, run))["notes"] == []
    assert not (run / "model").exists()
    assert pretrain(options(data, run, export=True))["notes"] == []
    assert files(run / "model") == files(finished / "model")
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints")
    (note,) = pretrain(options(data, run, export=True))["notes"]
    assert "so is the checkpoint of step 6" in note


def test_the_run_of_an_older_version_is_refused_by_its_version(data, run):
    there = read_json(run / "pretrain.json")
    there["run_version"] -= 1
    config = {name: value for name, value in there.items() if name != "hash"}
    there["hash"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    write_json(run / "pretrain.json", there)
    about = run / "checkpoints" / "step-00000006" / "checkpoint.json"
    write_json(about, {**read_json(about), "run": there["hash"]})
    with pytest.raises(UserError, match=r"older recallzoo.*or use another --out"):
        pretrain(options(data, run))
    export_run(run, run.parent / "exported")


def test_a_validation_loss_that_is_not_finite_is_one_message(data, tmp_path, monkeypatch, capsys):
    look = Validation.look
    monkeypatch.setattr(
        Validation, "look", lambda *args: {**look(*args), "valid_loss_nats": float("nan")}
    )
    with pytest.raises(RecallzooError, match=r"validation loss is not finite at step 3 \(nan\)"):
        pretrain(options(data, tmp_path, save_every=1))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [
        "step-00000001",
        "step-00000002",
    ]


def test_sharing_out_in_one_process_is_said_to_do_nothing(data, tmp_path):
    (note,) = pretrain(options(data, tmp_path, parallel="fsdp"))["notes"]
    assert "this is one process" in note


def test_a_number_without_end_is_no_number_of_tokens(data, tmp_path):
    with pytest.raises(UserError, match="--tokens inf must be a finite number, at least 1"):
        options(data, tmp_path, steps=None, tokens=float("inf"))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        *((place, "is no exported model") for place in ("run", "run/checkpoints", ".")),
        ("file", "file is a file; a folder for the model is wanted"),
        ("file/sub", "file is a file, so there can be no "),
    ],
)
def test_overwriting_replaces_exported_models_alone(place, words, run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    before = files(tmp_path)
    assert main(["export", str(run), "--out", str(tmp_path / place), "--overwrite"]) == 2
    assert words in capsys.readouterr().err
    assert files(tmp_path) == before


def test_a_runs_own_model_can_be_exported_again(run, finished):
    weights = load_file(finished / "model" / "model.safetensors")
    (run / "model" / "model.safetensors").write_bytes(b"")
    export_run(run, run / "model", overwrite=True)
    again = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert set(files(run / "model")) == set(files(finished / "model"))


def test_an_exported_step_has_the_weights_of_that_step(data, tmp_path):
    """Its tokenizer comes from the finished model's folder, and nothing else does."""
    run = tmp_path / "run"
    pretrain(options(data, run, export=True, save_every=3))
    export_run(run, tmp_path / "3", step=3)
    export_run(run, tmp_path / "6", step=6)
    early, late, final = (
        load_file(folder / "model.safetensors")["model.embedding.tokens.weight"]
        for folder in (tmp_path / "3", tmp_path / "6", run / "model")
    )
    assert torch.equal(late, final)
    assert not torch.equal(early, final)
    assert set(files(tmp_path / "3")) == set(files(run / "model"))


def test_an_export_that_fails_leaves_the_model_before_it(run, tmp_path, monkeypatch):
    export_run(run, tmp_path / "model")
    before = files(tmp_path / "model")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recallzoo.hub.shutil.copyfile", full)
    with pytest.raises(RecallzooError, match="the disk is full"):
        export_run(run, tmp_path / "model", overwrite=True)
    assert files(tmp_path / "model") == before
