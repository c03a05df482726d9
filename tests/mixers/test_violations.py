"""Each way to break the mixer contract is found by the check meant for it, and told in numbers."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from recallzoo.contract import CHECKS, check_mixer
from recallzoo.mixers import Context, Mixer, MixerConfig, mixer
from recallzoo.mixers._adapt import adapt

FILE = Path(__file__).parent / "broken.py"
QUICK = tuple(check for check in CHECKS if check != "compiles")


def report_on(name: str, only: tuple[str, ...] = QUICK):
    return check_mixer(mixer(f"{FILE}:{name}"), only=only)


def test_a_sound_mixer_of_ones_own_passes_every_check():
    report = report_on("Sound")
    assert all(check.passed for check in report.checks), report.summary()
    assert report.state_size == {"conv": 16}
    assert f"{len(QUICK)} of {len(QUICK)} checks passed" in report.summary()


@pytest.mark.parametrize(
    ("name", "check", "words"),
    [
        ("LeaksOnePosition", "causal in training", "output at t=0 changes by|input at t=1 "),
        ("LeaksOnePosition", "causal in evaluation", "output at t=0 changes by|input at t=1 "),
        ("LeaksFromFourToThree", "causal in evaluation", "output at t=3 changes|input at t=4 "),
        ("LeaksByMean", "causal in training", "output at t=0 changes|(16 positions leak)"),
        ("LeaksByChoice", "causal in evaluation", "changes by|when the input"),
        ("LeaksByFaintGradient", "causal in evaluation", "t=0 has a gradient of|input at t=1"),
        ("LeaksInTrainingOnly", "causal in training", "output at t=0 changes|input at t=16 "),
        ("DropsAPosition", "output shape and dtype", "[2, 16, 16] for input [2, 17, 16]"),
        ("ReturnsAPair", "output shape and dtype", "returns tuple; one tensor [2, 17, 16]"),
        ("ReturnsFloat64", "output shape and dtype", "float64 for float32"),
        ("NotANumberAtSeven", "finite", "NaN at t=7 (row 0, channel 0; 32 of 544 values)"),
        ("OverflowsOnLargeInputs", "finite", "infinite at t=0|inputs of size"),
        ("MixesRows", "rows apart", "in training the output of row 0 at t=0 changes by"),
        ("MixesRowsInTraining", "rows apart", "in training the output of row 0 at t=0"),
        ("StepForgetsBias", "step equals forward", "output differs|at t=1 first"),
        ("StepDetaches", "step equals forward", "gradient of the input differs"),
        ("StepWritesIntoItsCache", "step equals forward", "changes the cache|at t=0"),
        ("NamesItsStateOddly", "state size", "memory|kv, conv, matrix, index"),
        ("StateWithoutBatch", "state size", "shape [1] at batch size 3"),
        ("RandomAtEvaluation", "deterministic", "differ at t=0 first"),
        ("FailsAtLengthOne", "lengths", "at 1 tokens: broken.py:|no second position"),
        ("DependsOnTheLength", "lengths", "1 tokens and 17: at t=0 first"),
        ("KeepsAHiddenTensor", "packs", "module.scale is a tensor|register_buffer"),
        ("DropsOutGlobally", "packs", "depends on what it is packed with|context.dropout(x, rate)"),
        ("AsksAndDropsOutGlobally", "packs", "depends on what it is packed with"),
        ("HalfPrecisionWeights", "constructs", "linear.weight is float16|float32"),
        ("FreezesAPart", "constructs", "features.weight, module.features.bias|register_buffer"),
        ("FailsWhenBuilt", "constructs", "broken.py:|ZeroDivisionError: odd width"),
        ("TakesThreeInputs", "constructs", "forward(x, mask, context)|forward(self, x, context)"),
        ("NamesAParameterItLacks", "initialisation", "'module.filter'"),
    ],
)
def test_a_violation_is_found_by_its_check(name: str, check: str, words: str):
    report = report_on(name, only=(check,))
    assert [failure.name for failure in report.failures] == [check], report.summary()
    for part in words.split("|"):
        assert part in report.failures[0].detail
    assert "FAILED" in report.summary()


def test_a_leak_in_training_alone_is_found_in_training_alone():
    report = report_on("LeaksInTrainingOnly", only=("causal in training", "causal in evaluation"))
    assert [failure.name for failure in report.failures] == ["causal in training"]


@pytest.mark.parametrize("name", ["DropsOutByContext", "DropsOutGlobally"])
def test_dropout_passes_where_its_masks_are_the_runs_own_or_there_are_none(name):
    config = mixer(f"{FILE}:{name}", **({"rate": 0.0} if name == "DropsOutGlobally" else {}))
    report = check_mixer(config, only=("packs", "causal in training", "rows apart"))
    assert report.passed, report.summary()


@pytest.mark.parametrize("name", ["DropsOutByContext", "DropsOutGlobally"])
def test_dropout_is_not_taken_for_looking_ahead_at_any_length(name):
    report = check_mixer(mixer(f"{FILE}:{name}"), seq_len=64, only=("lengths",))
    assert report.passed, report.summary()


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("name", "check", "words"),
    [
        ("AsksForANumber", "packs", "cannot be mapped over runs|.item()|one by one"),
        ("BreaksTheGraph", "compiles", "the compiler cannot take it"),
    ],
)
def test_what_only_costs_speed_is_told_and_not_refused(name: str, check: str, words: str):
    report = report_on(name, only=(check,))
    assert report.passed
    [judged] = [each for each in report.checks if each.name == check]
    assert judged.passed is None
    for part in words.split("|"):
        assert part in judged.detail


def test_parameters_that_no_gradient_reaches_are_named_without_failing():
    report = report_on("LeavesParametersOut", only=("initialisation",))
    assert report.passed, report.summary()
    names = "module.behind, module.muted, module.spare.weight"
    assert f"no gradient reached parameters {names}, counted" in report.summary()


def test_what_cannot_be_judged_after_a_failure_is_said_to_be_unchecked():
    report = report_on("DropsAPosition")
    assert not report.passed
    assert {check.name for check in report.undecided} == set(QUICK) - {
        "constructs",
        "output shape and dtype",
    }
    assert "needs 'output shape and dtype'" in report.summary()


def test_a_mixer_that_declares_to_look_ahead_is_reported_so_without_failing():
    report = report_on("LooksAheadAsDeclared")
    assert report.passed, report.summary()
    causal = {check.name: check.detail for check in report.checks}["causal in evaluation"]
    assert "declared as not causal; the output at t=0 depends on the input at t=1" in causal


def test_without_step_the_state_size_of_ones_own_mixer_is_unknown():
    report = report_on("NoStep")
    assert report.passed, report.summary()
    assert report.state_size is None
    assert [check.name for check in report.undecided] == ["step equals forward", "state size"]
    assert "the state size is unknown" in report.summary()


def test_bfloat16_of_ones_own_mixer_may_fail_and_is_reported():
    report = report_on("FailsInBfloat16")
    assert report.passed, report.summary()
    assert "no bfloat16 here" in {c.name: c.detail for c in report.checks}["bfloat16"]


@dataclass(frozen=True)
class Registered(MixerConfig):
    """A mixer as if it were the package's own."""

    def build(self, d_model: int, max_seq_len: int) -> Mixer:
        cls = mixer(self.name)
        return cls.build(d_model, max_seq_len)


@pytest.mark.parametrize(
    ("name", "failing"),
    [("NoStep", {"step equals forward", "state size"}), ("FailsInBfloat16", {"bfloat16"})],
)
def test_a_registered_mixer_owes_everything(name, failing):
    report = check_mixer(Registered(f"{FILE}:{name}"), only=("bfloat16", *QUICK))
    assert failing <= {failure.name for failure in report.failures}


def test_an_adapted_module_is_called_with_context_only_if_it_takes_one():
    class TakesContext(torch.nn.Module):
        def forward(self, x, context):
            return x + context.tokens[..., None]

    tokens = torch.tensor([[1, 2]])
    y = adapt(TakesContext(), 1, 2)(torch.zeros(1, 2, 1), Context(tokens=tokens))
    assert y.flatten().tolist() == [1.0, 2.0]


def test_a_mixer_that_reads_tokens_ahead_is_found(tmp_path):
    path = tmp_path / "ahead.py"
    path.write_text(
        "from torch import nn\n"
        "class Ahead(nn.Module):\n"
        "    needs_tokens = True\n"
        "    def __init__(self, d_model, max_seq_len):\n"
        "        super().__init__()\n"
        "    def forward(self, x, context):\n"
        "        same = context.tokens == context.tokens.roll(-1, dims=-1)\n"
        "        return x * (1 + same[..., None])\n"
    )
    report = check_mixer(mixer(f"{path}:Ahead"), only=("causal in evaluation",))
    assert "when the token at t=1 changes" in report.summary()
