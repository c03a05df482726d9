"""A user's own mixer in a language model: trained, exported, audited, and never run unasked."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import require_mistake

from recallzoo.cli import main
from recallzoo.contract import check_mixer
from recallzoo.errors import InvalidConfig, UserError
from recallzoo.files import read_json, write_json
from recallzoo.hub import RecallzooForCausalLM
from recallzoo.mixers import MixerConfig, _own, mixer, use_mixer
from recallzoo.presets import preset
from recallzoo.train._large_model import Processes
from recallzoo.train._pretrain_engine import Engine
from recallzoo.train.pretrain import pretrain
from tests.train.pretraining import options, small_data

FILE = Path(__file__).parent / "mixers" / "ema.py"
MEAN = f"{FILE}:RunningMean"
SMALL = ("--d-model", 64, "--num-layers", 3, "--context", 16, "--global-batch", 4, "--steps", 2,
         "--valid-every", 0, "--precision", "fp32", "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_data(tmp_path_factory.mktemp("own") / "data")


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    """As in a process of its own."""
    monkeypatch.setattr(_own, "_named", {})


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A finished run of a hybrid with the mixer in its special layer."""
    out = tmp_path_factory.mktemp("own") / "run"
    words = ("pretrain", "base_conv_attention-70m", "--mixer", MEAN, "--data", data, "--out", out)
    assert main([str(word) for word in (*words, *SMALL)]) == 0
    return out


def test_it_is_trained_in_the_special_layers_and_exported_with_its_file(run):
    described = read_json(run / "pretrain.json")["model"]["mixers"]
    assert [one["name"] for one in described] == ["base_conv", "ema.py:RunningMean", "base_conv"]
    assert read_json(run / "model" / "config.json")["model"]["mixers"] == described
    assert (run / "model" / "ema.py").read_bytes() == FILE.read_bytes()


def test_its_buffers_are_as_they_were_stored_or_not(data, tmp_path, monkeypatch):
    drawn = []
    update = Engine.update

    def noted(self: Engine, at: int) -> float:
        drawn.append(dict(self.model.named_buffers()))
        return update(self, at)

    monkeypatch.setattr(Engine, "update", noted)
    out, again = tmp_path / "run", tmp_path / "again"
    words = ("pretrain", "base_conv_attention-70m", "--mixer", f"{FILE}:Buffered", "--data", data)
    assert main([str(word) for word in (*words, "--out", out, *SMALL)]) == 0
    words = ("export", out, "--mixer", f"{FILE}:Buffered", "--out", again)
    assert main([str(word) for word in words]) == 0
    wanted = {name.removeprefix("blocks."): value for name, value in drawn[-1].items()}
    assert len(wanted) == 2
    for folder in (out / "model", again):
        loaded = RecallzooForCausalLM.from_pretrained(folder)
        for name, buffer in loaded.model.blocks.named_buffers():
            assert torch.equal(buffer, wanted.pop(name) if folder == again else wanted[name])
    assert not wanted


def test_a_buffer_that_is_drawn_at_random_and_not_stored_is_refused(run_cli, data, tmp_path):
    words = ("pretrain", "attention-70m", "--mixer", f"{FILE}:Forgetful", "--data", data)
    outcome = run_cli(*words, "--out", tmp_path / "run", *SMALL)
    require_mistake(outcome, "its buffer shift is drawn at random", "Leave persistent=False out")
    assert not (tmp_path / "run").exists()


def test_its_file_may_be_worked_on_while_a_model_trains(data, tmp_path, monkeypatch):
    """What is checked, trained and exported is what it was when the command began."""
    file = shutil.copyfile(FILE, tmp_path / "mine.py")

    def edited(*arguments, **options):
        file.write_text("x = 1\n")
        return check_mixer(*arguments, **options)

    monkeypatch.setattr("recallzoo.cli._user_mixer.check_mixer", edited)
    out = tmp_path / "run"
    words = ("pretrain", "attention-70m", "--mixer", f"{file}:RunningMean", "--data", data)
    assert main([str(word) for word in (*words, "--out", out, *SMALL)]) == 0
    assert (out / "model" / "mine.py").read_bytes() == FILE.read_bytes()
    use_mixer(f"{out / 'mine.py'}:RunningMean")
    RecallzooForCausalLM.from_pretrained(out / "model")


def test_every_process_trains_what_the_first_one_recorded(data, tmp_path, monkeypatch):
    file, out = shutil.copyfile(FILE, tmp_path / "mine.py"), tmp_path / "run"
    chosen = options(data, out, mixer=f"{file}:RunningMean", steps=2, valid_every=0)
    pretrain(replace(chosen, stop_after_minutes=0))
    file.write_text(FILE.read_text() + "# changed\n")
    second = Processes(rank=1, world_size=1, device=torch.device("cpu"))
    monkeypatch.setattr("recallzoo.train._large_model.join_processes", lambda device: second)
    assert pretrain(chosen)["hash"] == read_json(out / "pretrain.json")["hash"]


def require_own_copy(outcome, run: Path) -> None:
    """It is named as what would be executed, and was not."""
    words = ("ema.py:RunningMean", "is not run", "executed once you name it")
    require_mistake(outcome, *words, f"--mixer {run}/ema.py:RunningMean")
    assert not _own._named


@pytest.mark.parametrize("folder", ["model", "changed"])
def test_a_file_that_is_no_whole_copy_of_a_run_is_not_proposed(run_cli, run, tmp_path, folder):
    given = shutil.copytree(run, tmp_path / "changed")
    (given / "ema.py").write_text(FILE.read_text() + "# changed\n")
    given = run / "model" if folder == "model" else given
    outcome = run_cli("audit", given, "--data", "d", "--out", tmp_path / "a")
    require_mistake(outcome, "is not run", "--mixer path/to/ema.py:RunningMean")


def test_an_audit_wants_its_file_named_and_then_has_losses(run_cli, run, data, tmp_path):
    call = ("audit", run, "--data", data, "--context", 16, "--resamples", 20, "--split", "valid")
    outcome = run_cli(*call, "--out", tmp_path / "a")
    require_own_copy(outcome, run)
    assert not (tmp_path / "a").exists()
    outcome = run_cli(*call, "--out", tmp_path / "a", "--mixer", f"{run}/ema.py:RunningMean")
    assert outcome.code == 0, outcome.err
    assert "perplexity" in outcome.out


def test_a_loaded_model_computes_what_was_trained(run):
    with pytest.raises(UserError, match="use_mixer in Python"):
        RecallzooForCausalLM.from_pretrained(run / "model")
    use_mixer(MEAN)
    model = RecallzooForCausalLM.from_pretrained(run / "model").eval()
    tokens = torch.arange(12)[None]
    whole = model(tokens).logits
    steps = model(tokens, use_cache=True).logits
    # float32, in another order of sums
    torch.testing.assert_close(steps[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)


def test_an_export_wants_its_file_named(run_cli, run, tmp_path):
    require_own_copy(run_cli("export", run, "--out", tmp_path / "m"), run)
    assert not (tmp_path / "m").exists()
    outcome = run_cli("export", run, "--out", tmp_path / "m", "--mixer", MEAN)
    assert outcome.code == 0, outcome.err


def test_a_file_of_another_content_is_not_taken_for_it(run, tmp_path):
    other = tmp_path / "ema.py"
    other.write_text(FILE.read_text() + "# changed\n")
    use_mixer(f"{other}:RunningMean")
    with pytest.raises(UserError, match="was given, but its content is another"):
        RecallzooForCausalLM.from_pretrained(run / "model")


def test_a_run_does_not_go_on_with_a_changed_file(run_cli, run, data, tmp_path):
    changed = tmp_path / "ema.py"
    changed.write_text(FILE.read_text() + "# changed\n")
    words = ("pretrain", "base_conv_attention-70m", "--data", data, "--out", run, *SMALL)
    outcome = run_cli(*words, "--mixer", f"{changed}:RunningMean")
    require_mistake(outcome, "another run of another model", "sha256", f"--mixer {run}/ema.py:Runn")
    changed.write_text("1 / 0")
    outcome = run_cli(*words, "--mixer", f"{changed}:RunningMean")
    require_mistake(outcome, "ZeroDivisionError", "goes on with its own copy of the file: --mixer")
    assert run_cli(*words, "--mixer", f"{run}/ema.py:RunningMean").code == 0


def test_a_time_limit_ends_with_a_code_of_its_own_and_the_same_command_goes_on(
    run_cli, data, tmp_path, monkeypatch
):
    where = ("--data", data, "--out", tmp_path / "run")
    words = ("pretrain", "attention-70m", *where, *SMALL, "--steps", 4)
    outcome = run_cli(*words, "--stop-after-minutes", 0)
    assert outcome.code == 75
    assert "the same command goes on" in outcome.err
    with monkeypatch.context() as under_torchrun:
        under_torchrun.setenv("TORCHELASTIC_RUN_ID", "none")
        outcome = run_cli(*words, "--stop-after-minutes", 0)
        assert (outcome.code, "stopped at step" in outcome.out) == (0, True)
    assert run_cli(*words).code == 0


@pytest.mark.parametrize("sha", [None, "0" * 64])
def test_a_folder_of_weights_cannot_choose_code_to_run(run, tmp_path, sha):
    """Its config names a file that is there, with or without a hash."""
    folder = shutil.copytree(run / "model", tmp_path / "model")
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = read_json(folder / "config.json")
    for one in config["model"]["mixers"]:
        one.update(name=f"{trap}:Trap", source_sha256=sha)
    write_json(folder / "config.json", config)
    with pytest.raises(UserError, match="code that comes with a model is not run"):
        RecallzooForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "model", "words"),
    [
        (f"{FILE}:Leaking", "attention-70m", ("causal in training", "Nothing was trained")),
        (f"{FILE}:Nothing", "attention-70m", ("no torch.nn.Module in", "'Nothing'")),
        ("attention", "attention-70m", ("attention is no file", "path/to/file.py:Class")),
        ("nowhere.py:X", "attention-70m", ("there is no file nowhere.py",)),
        (MEAN, "rwkv-70m", ("time mixing and channel mixing", "attention-70m")),
        ("modeling_recallzoo.py:X", "attention-70m", ("every exported model", "another name")),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    run_cli, data, tmp_path, name, model, words
):
    out = tmp_path / "o"
    outcome = run_cli("pretrain", model, "--mixer", name, "--data", data, "--out", out, *SMALL)
    assert outcome.code == 2
    for word in words:
        assert word in outcome.err
    assert not out.exists()


def test_one_that_fails_at_the_width_and_length_of_the_run_is_refused(run_cli, data, tmp_path):
    """A width, too, that the attention in its place could not have."""
    words = ("--mixer", f"{FILE}:Narrow", "--data", data, "--out", tmp_path / "o", *SMALL)
    outcome = run_cli("pretrain", "attention-70m", *words, "--d-model", 48)
    require_mistake(outcome, "at width 48 and 16 tokens", "ValueError: too wide", "--d-model or")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", [("pretrain", "attention-70m", "--data", "d"), ("export", "r")])
def test_a_second_mixer_does_not_replace_the_first_unsaid(run_cli, tmp_path, command):
    outcome = run_cli(*command, "--out", tmp_path / "o", "--mixer", MEAN, f"--mixer={MEAN}")
    require_mistake(outcome, "--mixer is given 2 times", "Give it once")


def test_one_that_does_not_work_in_bfloat16_wants_another_precision(run_cli, data, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        FILE.read_text()
        + "\n\nclass Float32Only(RunningMean):\n"
        + "    def forward(self, x):\n"
        + "        if torch.is_autocast_enabled(x.device.type) or x.dtype != torch.float32:\n"
        + "            raise TypeError('float32 alone')\n"
        + "        return super().forward(x)\n"
    )
    words = ("--mixer", f"{file}:Float32Only", "--data", data, "--out", tmp_path / "o", *SMALL)
    outcome = run_cli("pretrain", "attention-70m", *words, "--precision", "bf16")
    assert outcome.code == 2
    assert "does not work in bfloat16" in outcome.err
    assert "--precision fp32" in outcome.err
    assert not (tmp_path / "o").exists()


def test_it_stands_in_all_layers_of_a_model_that_is_no_hybrid():
    config = mixer(MEAN, decay=0.5)
    changed = preset("base_conv-70m").with_mixer(config)
    assert set(changed.model.layer_mixers()) == {config}
    assert changed.name == "base_conv-70m with RunningMean(decay=0.5)"
    hybrid = preset("base_conv_lookup-125m").with_mixer(config)
    places = [i for i, one in enumerate(hybrid.model.layer_mixers()) if one == config]
    assert places == list(preset("base_conv_lookup-125m").special_layers)
    headed = mixer(f"{FILE}:Headed")  # whose options are its own
    assert set(preset("attention-70m").with_mixer(headed).resized(48, 2, 16).model.mixers) == {
        headed
    }


def test_one_that_says_that_it_looks_ahead_is_refused():
    with pytest.raises(InvalidConfig, match="it is not causal"):
        preset("attention-70m").with_mixer(MixerConfig("selective_attention_topk"))
