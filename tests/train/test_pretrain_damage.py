"""Files of a pretraining run that were edited or damaged are named, and nothing is lost by it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pretraining import losses, options

from recallzoo.cli import main
from recallzoo.errors import StoreError, UserError
from recallzoo.train._large_checkpoint import finished_steps
from recallzoo.train._pretrain_engine import Engine
from recallzoo.train.pretrain import pretrain

LAST = "checkpoints/step-00000006"


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(options(data, out, save_every=3))
    return out


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A finished run, to change."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def interrupted(finished: Path) -> Path:
    """A run that stands at its last step, not yet finished."""
    (finished / "summary.json").unlink()
    return finished


def edit(path: Path, field: str, value: Any) -> None:
    """Set a field of a JSON file, such as model.mixers; "(removed)" removes it."""
    content = json.loads(path.read_text())
    *outer, last = field.split(".")
    table = content
    for name in outer:
        table = table[name]
    table[last] = value
    if value == "(removed)":
        del table[last]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", "(removed)"),
        ("data", []),
        ("data.tokenizer_hash", "(removed)"),
        ("model", 7),
        ("model.mixers", ["attention"]),
        ("order", "(removed)"),
        ("hash", "0123"),
    ],
    ids=str,
)
def test_an_edited_run_file_is_named(field, value, data, interrupted):
    edit(interrupted / "pretrain.json", field, value)
    with pytest.raises(StoreError, match=r"pretrain\.json cannot be read as it was written"):
        pretrain(options(data, interrupted))
    assert finished_steps(interrupted / "checkpoints") == [3, 6]


@pytest.mark.parametrize("name", ["summary.json", "pretrain.json"])
@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_no_advice_deletes_the_checkpoints_beside_a_damaged_file(name, content, data, finished):
    (finished / name).write_text(content)
    with pytest.raises(StoreError, match=name) as error:
        pretrain(options(data, finished))
    assert "folder it is in" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", "(removed)"),
        ("files", "(removed)"),
        ("files", []),
        ("files", {}),
        ("files", {"a": "b"}),
        ("step", 3),
    ],
    ids=str,
)
def test_an_edited_checkpoint_is_named_and_the_one_before_serves(
    field, value, data, interrupted, whole
):
    edit(interrupted / LAST / "checkpoint.json", field, value)
    with pytest.raises(StoreError, match=f"{field} is .*Delete it .* goes on from step 3"):
        pretrain(options(data, interrupted))
    shutil.rmtree(interrupted / LAST)
    pretrain(options(data, interrupted))
    assert losses(interrupted) == losses(whole)


def test_a_checkpoint_under_the_name_of_a_later_step_is_not_gone_on_from(data, interrupted):
    (interrupted / LAST).rename(interrupted / "checkpoints" / "step-00000099")
    with pytest.raises(StoreError, match="step is 6"):
        pretrain(options(data, interrupted))


def test_a_users_copy_of_a_checkpoint_is_left_alone(data, interrupted, whole):
    copy = shutil.copytree(interrupted / LAST, interrupted / "checkpoints" / "step-6-mine")
    assert pretrain(options(data, interrupted))["status"] == "finished"
    assert (copy / "checkpoint.json").exists()


def test_a_file_in_place_of_the_checkpoints_is_told_before_training(data, interrupted):
    shutil.rmtree(interrupted / "checkpoints")
    (interrupted / "checkpoints").write_text("mine")
    with pytest.raises(StoreError, match="checkpoints is a file"):
        pretrain(options(data, interrupted))
    assert (interrupted / "checkpoints").read_text() == "mine"


@pytest.mark.parametrize("field", ["valid", "train_loss_nats", "steps", "hash", "notes"])
def test_an_edited_summary_is_named_and_made_anew(field, data, finished, whole):
    edit(finished / "summary.json", field, "mine")
    with pytest.raises(StoreError, match=f"{field} is not as it was. Delete the file"):
        pretrain(options(data, finished))
    (finished / "summary.json").unlink()
    assert pretrain(options(data, finished))["train_loss_nats"] == losses(whole)[-1]


@pytest.mark.parametrize(
    "line",
    [b"", b"\x00\x00", b"\xff", b"[1]", b'{"loss_nats": 1}', b'{"step": "a"}', b'{"step": 1, "lo'],
)
def test_a_damaged_line_of_metrics_is_named_and_a_cut_one_is_redone(line, data, interrupted, whole):
    path = interrupted / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + line)
    pretrain(options(data, interrupted))
    assert losses(interrupted) == losses(whole)
    (interrupted / "summary.json").unlink()
    first, rest = before.split(b"\n", 1)
    path.write_bytes(b"\n".join([first, line, rest]))
    with pytest.raises(StoreError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        pretrain(options(data, interrupted))
    assert path.read_bytes() == b"\n".join([first, line, rest])


def test_a_run_whose_metrics_were_moved_away_ends_without_them(data, interrupted, capsys):
    (interrupted / "metrics.jsonl").unlink()
    given = options(data, interrupted)
    words = [given.preset, "--data", data, "--out", interrupted, "--no-export"]
    for name in ("d_model", "num_layers", "context", "global_batch", "steps", "precision"):
        words += [f"--{name.replace('_', '-')}", getattr(given, name)]
    for _ in range(2):  # the second time from its summary
        assert main(["pretrain", *map(str, words), "--device", "cpu"]) == 0
        assert "finished at step 6" in capsys.readouterr().out


def test_more_contexts_to_look_at_than_there_are_means_all(data, tmp_path):
    summary = pretrain(options(data, tmp_path / "a", valid_contexts=10**12))
    all_of_them = pretrain(options(data, tmp_path / "b", valid_contexts=10**4))
    assert summary["valid"] == all_of_them["valid"]


def test_a_model_too_large_to_be_built_is_one_message(data, tmp_path, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(Engine, "__init__", too_large)
    with pytest.raises(UserError, match="width 64 and 1 layers does not fit into memory"):
        pretrain(options(data, tmp_path))
