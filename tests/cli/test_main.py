"""The command line as a whole: commands, exit codes, what goes where."""

import errno
import json
import os
import re
import subprocess

import pytest
from conftest import RECIPES, command, environment, in_process, require_mistake

from recallzoo import __version__
from recallzoo.cli import known_commands, main
from recallzoo.errors import StoreError, UserError

OPTIONS = {
    "run": "checkpoint-seconds compile device device-sharing devices dry-run executor help known "
    "max-pack-size minutes mixer out packs-per-device ray-address",
    "export": "data help mixer out overwrite step",
    "pretrain": (
        "beta checkpoint-activations compile context cut-rates d-model data device epochs "
        "final-learning-rate global-batch help keep-checkpoints learning-rate log-seconds "
        "max-grad-norm micro-batch mixer no-export no-verify-data num-layers out parallel "
        "precision repeat-data save-every save-minutes seed steps stop-after-minutes "
        "tensorboard tokens valid-contexts valid-every wandb warmup weight-decay"
    ),
    "report": "formats help out",
    "list": "help json",
    "doctor": "help json",
    "prepare": "boundary boundary-token domain-field executor help id-field memory-mib name "
    "no-count-pairs on-error out overwrite seed shard-tokens source-field test test-fraction "
    "text-documents text-field tokenizer tokenizer-sample-bytes train valid valid-fraction "
    "vocab-size workers",
    "audit": "batch-size bos context counts cut-rates data device documents dtype formats help "
    "json max-tokens mixer out overwrite passages reference resamples seed split stride",
}
"""The options of each command. The command line stays small: think twice before adding one."""


def test_help_names_every_command_with_its_summary(run_cli):
    outcome = run_cli("--help")
    assert outcome.code == 0
    for name, summary in known_commands().items():
        assert re.search(rf"{name} +{re.escape(summary)}", outcome.out)
    assert "examples:" in outcome.out
    assert run_cli().code == 2
    assert run_cli("--version").out.split() == ["recallzoo", __version__]


@pytest.mark.parametrize("name", known_commands())
def test_every_command_has_the_options_that_were_agreed_on(run_cli, name):
    outcome = run_cli(name, "--help")
    assert outcome.code == 0
    assert f"recallzoo {name}" in outcome.out.partition("examples:")[2]
    found = re.findall(r"^\W*(?:-h, )?--([a-z][a-z-]*)", outcome.out, flags=re.MULTILINE)
    assert sorted(set(found)) == OPTIONS[name].split()


@pytest.mark.parametrize("name", [name for name in known_commands() if "no-" in OPTIONS[name]])
def test_an_option_that_says_no_is_explained_as_what_is_not_done(run_cli, name):
    explained = run_cli(name, "--help").out.partition("--no-")[2].split("--no-")
    for text in explained:
        assert re.match(r"\S+ +(Do not|Leave) ", text), text
        assert "default: True" not in text


def test_a_near_command_is_suggested(run_cli):
    require_mistake(run_cli("reprot"), "'reprot'", "Did you mean 'report'")


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (UserError("a mistake."), 2, "error: a mistake."),
        (StoreError("a broken disk."), 1, "error: a broken disk."),
        (KeyboardInterrupt(), 130, "stopped; finished work is kept"),
        (PermissionError(errno.EACCES, "Permission denied", "mine"), 2, "error: mine is closed"),
    ],
)
def test_errors_become_a_message_and_an_exit_code(run_cli, monkeypatch, raised, code, words):
    def fail(argv):
        raise raised

    monkeypatch.setattr("recallzoo.cli.commands.doctor.main", fail)
    outcome = run_cli("doctor")
    assert (outcome.code, outcome.out) == (code, "")
    assert words in outcome.err


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(argv):
        raise TypeError("ours")

    monkeypatch.setattr("recallzoo.cli.commands.doctor.main", fail)
    with pytest.raises(TypeError, match="ours"):
        main(["doctor"])


def test_a_closed_pipe_ends_quietly():
    process = subprocess.Popen(
        command("list", "mixers"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


@pytest.mark.parametrize("kind", ["tasks", "mixers", "recipes", "models"])
def test_lists_are_printed_for_people_and_for_programs(run_cli, kind):
    listed = run_cli("list", kind)
    assert listed.code == 0
    entries = json.loads(run_cli("list", kind, "--json").out)
    assert (kind == "models" and not entries) or entries
    for entry in entries:
        assert f"{entry['name']}  {entry['summary']}" in listed.out
        assert entry["summary"].endswith((".", "?")), f"{entry['name']} has no summary"
        for option in entry["options"]:
            assert f"    {option['name']}: {option['type']} = " in listed.out


def test_listed_options_carry_type_and_default(run_cli):
    entries = {e["name"]: e for e in json.loads(run_cli("list", "tasks", "--json").out)}
    assert {"name": "num_pairs", "type": "int", "default": 4} in entries["mqar"]["options"]
    assert entries["mqar"]["version"] >= 1


def test_an_unknown_list_is_refused(run_cli):
    outcome = run_cli("list", "mixer")
    assert outcome.code == 2
    assert "'mixers'" in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "tpu"), "'tpu'"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--max-pack-size", 0), "--max-pack-size 0"),
        (("--checkpoint-seconds", -1), "--checkpoint-seconds -1"),
        (("--checkpoint-seconds", "nan"), "--checkpoint-seconds nan"),
    ],
)
def test_impossible_ways_to_run_are_refused(run_cli, tmp_path, options, words):
    arguments = ("run", RECIPES / "tiny.py", "--out", tmp_path / "o", *options)
    require_mistake(run_cli(*arguments), words)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("run", RECIPES / "tiny.py"), "a results folder"),
        (("run", RECIPES / "tiny.py", "--dry-run"), "a results folder"),
        (("pretrain", "attention-70m", "--data", "d"), "a folder for the run"),
        (("prepare", RECIPES / "tiny.py"), "a folder for the data"),
    ],
    ids=str,
)
def test_a_file_is_no_folder_to_write_to_and_none_can_be_in_it(run_cli, tmp_path, words, wanted):
    file = tmp_path / "o"
    file.write_text("mine")
    require_mistake(run_cli(*words, "--out", file), f"{file} is a file; {wanted} is wanted")
    for below in (file / "sub", file / "sub" / "sub"):
        outcome = run_cli(*words, "--out", below)
        require_mistake(outcome, f"{file} is a file, so there can be no {below}; {wanted}")
    require_mistake(run_cli(*words, "--out", tmp_path / ("o" * 300)), "Give a shorter one")
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("prepare", "--train", "a", "--train", "b"), "--train"),
        (("prepare", "--train", "a", "--valid=b", "--valid", "c"), "--valid"),
        (("prepare", "--train", "a", "--test", "b", "--test=c"), "--test"),
        (("audit", "m", "--data", "d", "--reference", "b=m", "--reference", "c=m"), "--reference"),
        (("audit", "m", "--data", "d", "--cut-rates", 0, "--cut_rates", 0.1), "--cut-rates"),
        (("pretrain", "rwkv-70m", "--data", "d", "--cut_rates=0", "--cut_rates=1"), "--cut-rates"),
        (("report", "a", "--formats", "svg", "--formats", "png"), "--formats"),
        (("run", "figure2", "--dry-run", "--seeds", 0, "--seeds=1"), "--seeds"),
        (("run", "--seq_lens", 16, "--mixer", "a.py:A", "--seq-lens", 32), "--seq-lens"),
    ],
    ids=str,
)
def test_values_given_after_a_second_name_do_not_replace_the_first_unsaid(
    run_cli, tmp_path, words, option
):
    outcome = run_cli(*words, "--out", tmp_path / "o")
    require_mistake(outcome, f"{option} is given 2 times", f"Give all values after one {option}.")
    assert not (tmp_path / "o").exists()


def test_what_stands_after_two_dashes_is_no_option_given_again(run_cli, tmp_path):
    outcome = run_cli("report", "--formats", "svg", "--", "--formats")
    require_mistake(outcome, "--formats holds no results")


def test_a_report_of_no_format_is_refused(run_cli, tmp_path):
    require_mistake(run_cli("report", tmp_path, "--formats"), "--formats", "html, svg, png")


def test_a_report_of_nothing_or_of_several_folders_to_nowhere_is_refused(run_cli, tmp_path):
    require_mistake(run_cli("report"), "no folder is given", "recallzoo report runs/quickstart")
    require_mistake(run_cli("report", tmp_path, tmp_path), "--out is wanted")


def test_without_a_terminal_progress_is_plain_lines(tmp_path):
    outcome = in_process("run", RECIPES / "tiny.py", "--out", tmp_path / "o")
    assert outcome.code == 0, outcome.err
    assert "\r" not in outcome.err
    assert "\x1b" not in outcome.out + outcome.err
    lines = outcome.err.splitlines()
    assert lines[:2] == ["2 runs, 2 to train in 1 pack", "pack 1/1 attention d=16: 2 runs"]
    assert all(re.match(r"run \d/2 attention: finished, test accuracy 0\.", x) for x in lines[2:])
    assert re.search(r"attention +mqar +8 +1 +16 +0\.0", outcome.out)


def test_finished_runs_are_not_trained_again(run_cli, tmp_path):
    arguments = ("run", RECIPES / "tiny.py", "--out", tmp_path / "o")
    first, second = run_cli(*arguments), run_cli(*arguments)
    assert "2 runs, 2 finished before\n" in second.err
    assert "pack" not in second.err
    assert second.out == first.out


@pytest.mark.slow
def test_the_doctor_tries_every_fast_path_and_gives_reasons():
    outcome = in_process("doctor", "--json")
    assert outcome.code == 0, outcome.err
    content = json.loads(outcome.out)
    assert content["versions"]["torch"]
    assert content["free_disk_gb"] > 0
    found = {finding["name"]: finding for finding in content["fast_paths"]}
    assert found["core: train a tiny model on the CPU"]["works"]
    assert all(finding["detail"] for finding in found.values())
    if not content["devices"]:
        assert "GPU" in found["CUDA graph"]["detail"]


def test_the_doctor_says_on_a_terminal_what_it_tries_and_in_a_pipe_what_it_found(
    run_cli, monkeypatch
):
    from recallzoo.cli import _probes

    monkeypatch.setattr(_probes, "all_probes", lambda: iter([("core", lambda: "it trains")]))
    outcome = run_cli("doctor")
    assert outcome.err == ""
    assert outcome.out.endswith("yes  core: it trains\n")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "trying core" in run_cli("doctor").err


def test_the_doctor_fails_when_nothing_can_be_trained(run_cli, monkeypatch):
    from recallzoo.cli import _probes

    def broken():
        raise ImportError("no such library")

    monkeypatch.setattr(_probes, "all_probes", lambda: iter([("core", broken)]))
    outcome = run_cli("doctor")
    assert outcome.code == 1
    assert "no such library" in outcome.err
    assert os.linesep in outcome.out
