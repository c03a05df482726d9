"""Finding and loading recipes, and what is said of those that cannot be."""

import re
import sys

import pytest
from conftest import RECIPES, require_mistake

from recallzoo.errors import UserError
from recallzoo.recipes import load, recipe_names
from recallzoo.store import Store

HEAD = "from recallzoo.run import Run\n"


def write(tmp_path, source, name="mine.py"):
    path = tmp_path / name
    path.write_text(source)
    return path


def test_every_recipe_of_the_package_loads_and_its_runs_can_be_planned(run_cli, tmp_path):
    for name in recipe_names():
        outcome = run_cli("run", name, "--dry-run", "--out", tmp_path / name)
        assert outcome.code == 0, outcome.err
        assert "to train on" in outcome.out
        assert not (tmp_path / name).exists()


def test_every_option_of_every_recipe_is_explained():
    for name in recipe_names():
        doc = load(name).function.__doc__ or ""
        for parameter in load(name).parameters:
            assert f"{parameter.name}: " in doc


def test_options_of_a_recipe_become_options_of_the_command(run_cli, tmp_path):
    arguments = ("--dry-run", "--out", tmp_path / "o", "--seeds", 3, 4, "--learning-rates", 0.5)
    outcome = run_cli("run", RECIPES / "tiny.py", *arguments)
    assert "2 runs, 0 finished" in outcome.out
    assert "learning rate 0.5, seed 3, 2 epochs" in outcome.out
    assert "learning rate 0.5, seed 4, 2 epochs" in outcome.out


def test_options_may_stand_before_the_recipe(run_cli, tmp_path):
    outcome = run_cli("run", "--dry-run", "--out", tmp_path / "o", RECIPES / "tiny.py")
    assert outcome.code == 0
    assert "2 runs" in outcome.out


def test_help_of_a_recipe_shows_its_options_and_those_of_run(run_cli):
    outcome = run_cli("run", RECIPES / "tiny.py", "--help")
    assert outcome.code == 0
    for words in ("--num-epochs INT", "Passes over the examples.", "--device", "examples:"):
        assert words in outcome.out


@pytest.mark.parametrize(
    ("option", "hint"), [("--num-epoch", "--num-epochs"), ("--devise", "--device")]
)
def test_a_misspelt_option_is_refused_and_the_right_one_suggested(run_cli, option, hint):
    outcome = run_cli("run", RECIPES / "tiny.py", option, "3")
    assert outcome.code == 2
    assert "Perhaps you meant" in outcome.err
    assert hint in outcome.err


def test_a_value_of_the_wrong_type_is_refused(run_cli):
    outcome = run_cli("run", RECIPES / "tiny.py", "--num-epochs", "many")
    assert outcome.code == 2
    assert "--num-epochs" in outcome.err


def test_compiling_can_be_asked_for_or_left_out(run_cli, tmp_path):
    for choice in ("none", "auto"):
        arguments = ("run", RECIPES / "tiny.py", "--compile", choice, "--out", tmp_path / choice)
        assert run_cli(*arguments).code == 0
        for result in Store(tmp_path / choice).results():
            assert result.provenance["compiled"] is False
    outcome = run_cli("run", RECIPES / "tiny.py", "--compile", "sometimes")
    assert outcome.code == 2
    for word in ("sometimes", "auto", "step", "none"):
        assert word in outcome.err


def test_a_near_recipe_is_suggested(run_cli):
    require_mistake(run_cli("run", "quikstart"), "'quikstart'", "Did you mean 'quickstart'")


def test_a_missing_file_is_named(run_cli, tmp_path):
    require_mistake(run_cli("run", tmp_path / "none.py"), f"no recipe file {tmp_path / 'none.py'}")


@pytest.mark.parametrize(
    ("source", "line", "words"),
    [
        (HEAD + "def a() -> list[Run]:\n    return [\n", 3, "syntax error"),
        (HEAD + "import nothing_of_this_name\n\ndef a() -> list[Run]: ...\n", 2, "ModuleNotFound"),
        (HEAD + "\ndef a():\n    return []\n", 3, "def a(...) -> list[Run]"),
        (HEAD + "\n\ndef a() -> list[Run]:\n    return 3\n", 4, "returned int 3; a list"),
        (HEAD + "\n\ndef a() -> list[Run]:\n    pass\n", 4, "returned nothing"),
        (HEAD + "\n\ndef a() -> list[Run]:\n    return []\n", 4, "an empty list"),
        (HEAD + "\n\ndef a() -> list[Run]:\n    return ['x']\n", 4, "item 0"),
        (HEAD + "\n\ndef a() -> list[Run]:\n    yield 1\n", 4, "a generator"),
        (HEAD + "def a() -> list[Run]:\n    b = 1\n    return 1 / 0\n", 4, "ZeroDivisionError"),
        (HEAD + "def a(n) -> list[Run]:\n    return []\n", 2, "'n'"),
        (HEAD + "def a(n: int) -> list[Run]:\n    return []\n", 2, "'n'"),
        (HEAD + "def a(**more: int) -> list[Run]:\n    return []\n", 2, "swallow misspelt"),
        (HEAD + "def a(out: int = 1) -> list[Run]:\n    return []\n", 2, "'out'"),
        (HEAD + "def a(n: 'Nix' = 1) -> list[Run]:\n    return []\n", 2, "Nix"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_line(run_cli, tmp_path, source, line, words):
    path = write(tmp_path, source)
    outcome = run_cli("run", path, "--out", tmp_path / "o")
    require_mistake(outcome, f"{path}:{line}", words)
    assert not (tmp_path / "o").exists()


def test_an_option_without_a_value_is_named_where_nothing_is_left_to_train(run_cli, tmp_path):
    outcome = run_cli("run", "figure2", "--seeds", "--out", tmp_path / "o")
    require_mistake(outcome, "no value was given for --seeds", "leave the option out")
    assert not (tmp_path / "o").exists()


def test_a_file_without_functions_holds_no_recipe(run_cli, tmp_path):
    require_mistake(run_cli("run", write(tmp_path, HEAD)), "holds no recipe")


def test_of_several_recipes_one_has_to_be_named(run_cli):
    require_mistake(run_cli("run", RECIPES / "several.py"), "2 recipes: first, second", ":first")
    require_mistake(run_cli("run", f"{RECIPES / 'several.py'}:frist"), "Did you mean 'first'")
    assert load(f"{RECIPES / 'several.py'}:second").name == "second"


def test_of_several_recipes_the_one_named_like_the_file_is_taken(tmp_path):
    source = HEAD + "def other() -> list[Run]: ...\ndef mine() -> 'list[Run]': ...\n"
    assert load(str(write(tmp_path, source))).name == "mine"


def test_helpers_beside_a_recipe_are_no_recipes(tmp_path):
    source = HEAD + "def _help() -> list[Run]: ...\ndef size() -> int: ...\n"
    with pytest.raises(UserError, match="no function is annotated"):
        load(str(write(tmp_path, source)))
    source += "def only(n: int = 3) -> list[Run]: ...\n"
    assert load(str(write(tmp_path, source))).name == "only"


def test_a_recipe_imports_what_lies_beside_it_from_wherever_it_is_called(
    run_cli, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "rates_beside.py").write_text("RATES = (0.25, 0.5)\n")
    source = HEAD + (
        "from rates_beside import RATES\nfrom recallzoo.recipes import load\n"
        "def mine(rates: tuple[float, ...] = RATES) -> list[Run]:\n"
        "    return load('quickstart').runs(learning_rates=rates)\n"
    )
    outcome = run_cli("run", write(tmp_path, source), "--dry-run", "--out", tmp_path / "o")
    assert outcome.code == 0, outcome.err
    assert "learning rate 0.25" in outcome.out


def test_two_identical_runs_are_refused_before_anything_is_trained(run_cli, tmp_path):
    arguments = ("--seeds", 1, 1, "--learning-rates", 0.1)
    outcome = run_cli("run", RECIPES / "tiny.py", *arguments, "--out", tmp_path / "o")
    require_mistake(outcome, "identical", "seed 1")
    dry = run_cli("run", RECIPES / "tiny.py", *arguments, "--dry-run", "--out", tmp_path / "o")
    require_mistake(dry, "identical")


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_a_model_that_cannot_be_built_is_refused_before_anything_is_written(
    run_cli, tmp_path, dry_run
):
    sizes = ("--seq-lens", 16, "--num-pairs", 2, "--widths", 6, "--vocab-size", 64)
    arguments = ("--models", "base_conv", "hash", *sizes, "--out", tmp_path / "o", *dry_run)
    require_mistake(run_cli("run", "hybrids", *arguments), "num_heads=4 does not divide d_model=6")
    assert not (tmp_path / "o").exists()


def test_impossible_sizes_reach_the_user_as_one_message(run_cli):
    require_mistake(
        run_cli("run", "ladder", "--mixers", "attention", "--seq-lens", 16, "--num-pairs", 40),
        "mqar.seq_len=16 does not fit num_pairs=40",
    )
    require_mistake(run_cli("run", "ladder", "--mixers", "atention"), "Did you mean 'attention'")
    require_mistake(
        run_cli("run", "ladder", "--seq-lens", 16, 32, "--num-pairs", 2), "one number of pairs"
    )


def test_an_own_bug_keeps_its_traceback(monkeypatch):
    recipe = load("quickstart")
    monkeypatch.setattr("recallzoo.recipes.quickstart.task", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recipe.runs()


def test_a_recipe_is_needed(run_cli):
    require_mistake(run_cli("run"), "name a recipe", "quickstart")
    require_mistake(run_cli("run", "--device", "cpu"), "name a recipe")
    require_mistake(run_cli("run", "--seq-lens", 3, 4), "name a recipe")


def test_a_time_limit_ends_with_a_code_of_its_own_and_the_same_command_goes_on(run_cli, tmp_path):
    folder = tmp_path / "o"
    arguments = ("run", RECIPES / "tiny.py", "--out", folder, "--minutes")
    stopped = run_cli(*arguments, 1e-9)
    assert (stopped.code, stopped.out) == (75, f"no run is finished in {folder} yet\n")
    assert (
        "stopped for --minutes 1e-09: 2 of 2 runs are left; run the same command to go on."
        in stopped.err
    )
    # Recorded as one pack, in which nothing has begun, so that a smaller size is a new plan.
    dry = ("run", RECIPES / "tiny.py", "--out", folder, "--seeds", 0, 1, "--dry-run")
    assert re.findall("^pack.*", run_cli(*dry).out, re.M) == [
        "pack 1: attention d=16, mqar T=8 Q=1, recorded by an earlier command",
        "pack 2: attention d=16, mqar T=8 Q=1",
    ]
    planned = run_cli(*dry, "--max-pack-size", 1).out
    assert "0 finished" in planned
    assert "to train on cpu in 4 packs" in planned
    done = run_cli(*arguments, 10, "--max-pack-size", 1)
    assert done.code == 0
    assert "2 runs, 2 to train in 2 packs" in done.err
    assert "left" not in done.err
    assert run_cli(*arguments, 1e-9).code == 0, "nothing is left"


@pytest.mark.parametrize("minutes", ["0", "-1", "inf", "nan"])
def test_a_time_limit_that_is_no_time_is_refused(run_cli, tmp_path, minutes):
    arguments = ("run", RECIPES / "tiny.py", "--out", tmp_path / "o", "--minutes", minutes)
    require_mistake(run_cli(*arguments), f"--minutes {float(minutes)}", "above 0")
    assert not (tmp_path / "o").exists()
