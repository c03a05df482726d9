"""A user's own mixer through `run --mixer`, without a change to the package."""

import json
from pathlib import Path

import pytest
from conftest import RECIPES, in_process, require_mistake

FILE = Path(__file__).parent / "mixers" / "ema.py"
SMALL = ("--seq-lens", 16, "--widths", 16, "--learning-rates", 1e-2)
SHORT = ("--num-epochs", 1, "--num-examples", 256)


@pytest.mark.slow
def test_a_mixer_of_ones_own_goes_from_its_file_to_a_verdict_and_a_report(tmp_path):
    folder = tmp_path / "o"
    outcome = in_process("run", "--mixer", f"{FILE}:RunningMean", *SMALL, *SHORT, "--out", folder)
    assert outcome.code == 0, outcome.err
    assert "state after 16 tokens at width 16: 16 elements a layer (matrix 16)" in outcome.out
    assert "RunningMean solves none of 1 cells" in outcome.out
    for label in ("attention", "base_conv", "RunningMean"):
        assert label in outcome.out
    (stored,) = (folder / "contracts").glob("RunningMean-*.json")
    assert json.loads(stored.read_text())["passed"] is True
    reported = in_process("report", folder, "--formats", "html")
    assert reported.code == 0, reported.err
    (page,) = (Path(line) for line in reported.out.splitlines() if line.endswith(".html"))
    assert "RunningMean" in page.read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Leaking", ("5",)),
        ("WrongShape", ("shape",)),
        ("NotANumber", ("NaN",)),
        ("WrongType", ("float64",)),
        ("TokensAhead", ("in training", "when the token at t=1 changes")),
        ("ChangesItsInput", ("changes its input in place",)),
        ("ChangesItsCache", ("step changes the cache that it is given",)),
    ],
)
def test_a_mixer_that_breaks_the_contract_is_refused_before_training(
    run_cli, tmp_path, name, words
):
    folder = tmp_path / "o"
    outcome = run_cli("run", "--mixer", f"{FILE}:{name}", *SMALL, *SHORT, "--out", folder)
    require_mistake(outcome, "is refused", "Nothing was trained", *words)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["LeakingLate", "LeakingLateInTraining"])
def test_a_mixer_that_looks_ahead_from_its_second_block_on_is_refused(run_cli, tmp_path, name):
    folder = tmp_path / "o"
    arguments = ("--seq-lens", 64, "--widths", 16, *SHORT, "--out", folder)
    outcome = run_cli("run", "--mixer", f"{FILE}:{name}", *arguments)
    words = "looks ahead: in training, at 64 tokens, the output at t=31 changes"
    require_mistake(outcome, "is refused", "lengths", words)
    assert "at 64 tokens: lengths FAILED" in outcome.out
    assert not folder.exists()


RECIPE = """
from recallzoo.mixers import mixer
from recallzoo.model import ModelConfig
from recallzoo.run import Budget, Run
from recallzoo.tasks import Data, task

def own(name: str = "attention", values: tuple[float, ...] = ()) -> list[Run]:
    return [
        Run(
            data=Data.of(
                task("mqar", seq_len=8, num_pairs=1, vocab_size=32, power=power),
                train=64, valid=32, test=32,
            ),
            model=ModelConfig(mixers=(mixer(name, **options),), d_model=16, num_layers=1),
            budget=Budget(num_epochs=1, batch_size=32),
        )
        for options in ({}, *({"decay": value} for value in values))
        for power in (0.01, 1.0)
    ]
"""


def test_a_mixer_that_a_recipe_names_is_checked_under_all_its_options(run_cli, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    good = ("run", recipe, "--name", f"{FILE}:RunningMean", "--out", tmp_path / "good")
    outcome = run_cli(*good, "--values", 0.5)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("15 of 15 checks passed") == 2
    assert len(list((tmp_path / "good" / "contracts").iterdir())) == 2
    # Cells that differ in an option of the data alone can be told apart.
    assert outcome.out.count("power=0.01") == outcome.out.count("power=1.0") == 2
    for bad in (("Leaking", 0.9), ("RunningMean", 1e30)):
        arguments = ("--name", f"{FILE}:{bad[0]}", "--values", bad[1], "--out", tmp_path / "bad")
        require_mistake(run_cli("run", recipe, *arguments), "is refused", "Nothing was trained")
        assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        (f"{FILE}:RuningMean", "Did you mean 'RunningMean'"),
        (f"{FILE}", "path/to/file.py:Class"),
        ("nowhere.py:Mixer", "there is no file nowhere.py"),
    ],
)
def test_a_mixer_that_is_not_there_is_named(run_cli, mixer, words):
    require_mistake(run_cli("run", "--mixer", mixer), words)


def test_a_recipe_without_mixers_cannot_take_one(run_cli):
    outcome = run_cli("run", "--mixer", f"{FILE}:RunningMean", "quickstart")
    require_mistake(outcome, "quickstart has no option `mixers`", "Leave the recipe out")


def test_a_named_recipe_takes_the_mixer_beside_its_own(run_cli, tmp_path):
    arguments = ("--dry-run", "--out", tmp_path, "--mixers", "attention")  # an empty folder
    outcome = run_cli("run", RECIPES / "tiny.py", "--mixer", f"{FILE}:RunningMean", *arguments)
    assert outcome.code == 0, outcome.err
    assert "attention" in outcome.out
    assert "RunningMean" in outcome.out


LABELLED = """
from recallzoo.mixers import mixer
from recallzoo.model import ModelConfig
from recallzoo.run import Budget, Run
from recallzoo.tasks import Data, task

def labelled(mixers: tuple[str, ...] = ("attention",)) -> list[Run]:
    return [
        Run(
            data=Data.of(
                task("mqar", seq_len=8, num_pairs=1, vocab_size=32), train=64, valid=32, test=32
            ),
            model=ModelConfig(mixers=(mixer(name),), d_model=16, num_layers=1),
            budget=Budget(num_epochs=1, batch_size=32),
            label=label,
        )
        for name, label in zip(mixers, ("[/x] <b>", "ema[k=3] :fire:"))
    ]
"""


def test_markup_in_labels_is_shown_as_it_is(run_cli, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(LABELLED)
    arguments = ("--mixer", f"{FILE}:RunningMean", "--out", tmp_path / "o")
    outcome = run_cli("run", recipe, *arguments)
    assert outcome.code == 0, outcome.err
    outcomes, title, verdict = outcome.out.partition("test accuracy at the best learning rate")
    assert title
    for table in (outcomes, verdict):
        assert "[/x] <b>" in table
        assert "ema[k=3] :fire:" in table
