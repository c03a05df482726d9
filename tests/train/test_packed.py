"""Runs that train in a pack end as they would alone, and as a plain loop would train them."""

import copy
import dataclasses
import functools
import importlib.metadata
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_training import Plain, train_plainly
from tiny_runs import losses, one_step_an_epoch, outcome, own, tiny_run, tiny_task, train

from recallzoo.errors import ContractViolation
from recallzoo.mixers import MixerConfig, mixer, mixer_class, registry
from recallzoo.result import Result
from recallzoo.run import Run
from recallzoo.tasks import Data, Segment
from recallzoo.train._stack import build_model
from recallzoo.train.packed import Pack

TOLERANCE_NATS = 1e-4
"""Largest difference of two losses, of about 2 nats each, that count as equal. Batched products
sum in another order, and AdamW divides by gradients that may be as small as their rounding: up to
8e-6 was seen. Leaving out one term of the update makes 1e-2 (see test_adamw.py)."""


def assert_same_losses(result: Result, wanted: list[float]) -> None:
    assert losses(result) == pytest.approx(wanted, rel=0, abs=TOLERANCE_NATS)


def assert_trained_alike(got: Result, wanted: Result) -> None:
    """Equal but for rounding: the losses of all epochs, the end, and what is counted."""
    assert (got.hash, got.status, got.steps) == (wanted.hash, wanted.status, wanted.steps)
    assert_same_losses(got, losses(wanted))
    assert got.test_loss_nats == pytest.approx(wanted.test_loss_nats, abs=TOLERANCE_NATS)
    assert got.test_accuracy == wanted.test_accuracy
    assert got.rows == wanted.rows


def assert_as_plain(result: Result, plain: Plain) -> None:
    assert_same_losses(result, plain.epoch_losses)
    assert result.test_loss_nats == pytest.approx(plain.test_loss_nats, abs=TOLERANCE_NATS)
    assert result.test_accuracy == pytest.approx(plain.test_accuracy)
    assert result.num_parameters == plain.num_parameters


def plain_state_size(run: Run) -> dict[str, int]:
    """State of the run's whole model, stepped on the CPU to the longest sequence."""
    try:
        return build_model(run).state_size(run.data.max_seq_len)
    except NotImplementedError:
        return {}


HYBRID = (mixer("base_conv"), mixer("attention", num_heads=2))
MODELS: dict[str, tuple[tuple[MixerConfig, ...], dict[str, Any]]] = {
    **{name: ((mixer(name),), {}) for name, cls in registry.items() if cls.causal},
    "hybrid": (HYBRID, {"num_layers": 3}),
    "without_step": ((own("PreviousToken"),), {}),
    "with_buffers": ((own("Buffered"),), {}),
    "gated_mlp_rms_untied": (
        HYBRID,
        {"state_mixer": "gated_mlp", "norm": "rms", "tie_embeddings": False},
    ),
    "mlp_no_positions_unscaled": (
        HYBRID,
        {"state_mixer": "mlp", "position": "none", "rescale_out_proj": False},
    ),
    "dropout": (HYBRID, {"embed_dropout": 0.2, "residual_dropout": 0.3, "state_mixer": "tanh_mlp"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_single_and_plain_training_agree_step_by_step(name):
    mixers, options = MODELS[name]
    runs = [
        tiny_run(
            *mixers, seed=seed, learning_rate=rate, weight_decay=decay, num_epochs=4, **options
        )
        for seed, rate, decay in ((0, 3e-3, 0.1), (1, 3e-2, 1.0))
    ]
    results = train(*runs)
    assert_trained_alike(results[1], train(runs[1])[0])
    assert results[0].state_size == plain_state_size(runs[0])
    for run, packed in zip(runs, results, strict=True):
        assert_as_plain(packed, train_plainly(run))


@pytest.mark.parametrize("name", ["stacked", "forgetting", "multi_token"])
def test_tasks_of_other_shapes_train_as_in_the_plain_loop(name):
    of = tiny_task(name) if name == "stacked" else tiny_task(name, seq_len=24, vocab_size=32)
    run = tiny_run(data=one_step_an_epoch(of))
    assert_as_plain(train(run)[0], train_plainly(run))


def mixture() -> Data:
    """Segments of different lengths and pairs, and one whose remainder is left out."""
    short, long = tiny_task(num_pairs=1), tiny_task(seq_len=12, num_pairs=3)
    return Data(
        train=(
            Segment(task=short, num_examples=32),
            Segment(task=long, num_examples=40),
            Segment(task=short, num_examples=16),
        ),
        valid=(Segment(task=long, num_examples=8), Segment(task=short, num_examples=12)),
        test=(Segment(task=short, num_examples=20), Segment(task=long, num_examples=24)),
    )


def test_a_mixture_of_lengths_trains_as_in_the_plain_loop():
    runs = [tiny_run(data=mixture(), seed=seed, num_epochs=3) for seed in (0, 1)]
    for run, result in zip(runs, train(*runs), strict=True):
        plain = train_plainly(run)
        assert (plain.steps_per_epoch, result.steps) == (5, 15)
        assert_as_plain(result, plain)


def test_accuracy_by_slice_adds_up_to_accuracy():
    run = tiny_run(data=mixture(), num_epochs=3, learning_rate=3e-2)
    (result,), plain = train(run), train_plainly(run)
    num_queries = {"short": 20 * 1, "long": 24 * 3}
    slices = {row.slice for row in result.rows}
    assert slices == {"distance", "slot", "num_pairs", "seq_len"}
    for name in slices:
        rows = [row for row in result.rows if row.slice == name]
        assert sum(row.total for row in rows) == sum(num_queries.values())
        right = sum(row.correct for row in rows)
        assert right / sum(num_queries.values()) == pytest.approx(result.test_accuracy)
    by_pairs = {row.value: row for row in result.rows if row.slice == "num_pairs"}
    assert {value: row.total for value, row in by_pairs.items()} == {1: 20, 3: 72}
    assert [by_pairs[1].correct, by_pairs[3].correct] == [int(c.sum()) for c in plain.test_correct]


def test_validation_counts_its_own_examples_and_not_the_test_set():
    valid, test = 7, 11  # shares of 14 and of 22 queries have nothing in common but 0, 1/2 and 1
    data = one_step_an_epoch(valid=valid, test=test)
    run = tiny_run(data=data, num_epochs=8, learning_rate=3e-2)
    (result,) = train(run)
    for line in result.metrics:
        right = line["valid_accuracy"] * valid * 2
        assert right == pytest.approx(round(right), abs=1e-9)
    right = result.test_accuracy * test * 2
    assert right == pytest.approx(round(right), abs=1e-9)
    as_test = dataclasses.replace(data, valid=data.test, test=data.valid)
    (swapped,) = train(dataclasses.replace(run, data=as_test))
    assert swapped.metrics != result.metrics
    assert_same_losses(swapped, losses(result))


MATES = tuple(
    tiny_run(seed=seed, learning_rate=rate, weight_decay=decay, residual_dropout=0.2)
    for seed, rate, decay in ((0, 3e-3, 0.1), (0, 3e-2, 0.1), (1, 3e-3, 0.0), (2, 1e-2, 1.0))
)


@functools.cache
def all_mates() -> dict[str, Result]:
    return {result.hash: result for result in train(*MATES)}


@settings(max_examples=5)
@given(st.permutations(MATES), st.integers(1, len(MATES)))
def test_a_result_depends_neither_on_pack_mates_nor_on_their_order(order, size):
    for result in train(*order[:size]):
        assert_trained_alike(result, all_mates()[result.hash])


def test_runs_of_different_shapes_do_not_share_a_pack():
    with pytest.raises(ValueError, match="pack_key"):
        Pack([tiny_run(), tiny_run(d_model=32)], "cpu")


def test_dropout_acts_follows_the_seed_and_stays_out_of_evaluation():
    first, second = (
        tiny_run(seed=seed, embed_dropout=0.3, residual_dropout=0.3, learning_rate=1e-30)
        for seed in (0, 1)
    )
    without = tiny_run(seed=0, learning_rate=1e-30)
    one, again, other = train(first)[0], train(first)[0], train(second)[0]
    plain = train(without)[0]
    assert one.metrics == again.metrics
    assert losses(one) != losses(other)
    assert len(set(losses(one))) == len(losses(one)), "every step has masks of its own"
    assert losses(plain) == pytest.approx([losses(plain)[0]] * 6, abs=TOLERANCE_NATS)
    assert abs(losses(one)[0] - losses(plain)[0]) > TOLERANCE_NATS
    assert one.test_loss_nats == pytest.approx(plain.test_loss_nats, abs=TOLERANCE_NATS)


def test_a_mixers_own_dropout_acts_in_training_alone():
    options: dict[str, Any] = {"learning_rate": 1e-30, "rescale_out_proj": False}
    dropping, plain = (
        train(tiny_run(own(name), **options))[0] for name in ("WithDropout", "PreviousToken")
    )
    # PyTorch's own dropout draws from the process's generator, so one step may come out near.
    gaps = [abs(a - b) for a, b in zip(losses(dropping), losses(plain), strict=True)]
    assert max(gaps) > TOLERANCE_NATS
    assert dropping.test_loss_nats == pytest.approx(plain.test_loss_nats, abs=TOLERANCE_NATS)
    valid = {line["valid_loss_nats"] for line in dropping.metrics}
    assert max(valid) - min(valid) < TOLERANCE_NATS


@pytest.mark.parametrize("name", ["attention", "base_conv", "hyena", "rwkv4"])
def test_bf16_trains_close_to_fp32_and_not_equal_to_it(name):
    exact, rounded = (
        tiny_run(mixer(name), precision=precision, learning_rate=1e-2)
        for precision in ("fp32", "bf16")
    )
    (wanted,), (got,) = train(exact), train(rounded)
    # bf16 keeps 8 bits: products are off by up to 2 ** -8, losses of 2.8 nats by about 1e-2.
    assert losses(got) == pytest.approx(losses(wanted), abs=0.05)
    assert losses(got) != losses(wanted)
    assert got.config["precision"] == "bf16"


def test_training_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    (first,) = train(tiny_run(own("Buffered"), residual_dropout=0.1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    (second,) = train(tiny_run(own("Buffered"), residual_dropout=0.1))
    assert first.metrics == second.metrics


def test_parameters_and_state_are_counted():
    attention, conv = train(tiny_run())[0], train(tiny_run(mixer("base_conv", kernel_size=3)))[0]
    # After 8 tokens each of 2 layers keeps keys and values of width 16.
    assert attention.state_size == {"kv": 2 * 2 * 8 * 16}
    assert conv.state_size == {"conv": 2 * 2 * 16}
    embedding = 16 * 16 + 8 * 16
    assert conv.num_parameters > embedding


STATE_OF_STEPPING = {"conv": 2 * 16}


def steps_with_numbers() -> int:
    """That mixers of the class Stepping have made so far."""
    return vars(mixer_class(own("Stepping").name))["num_steps"]


def test_the_state_of_a_mixer_is_computed_once_for_its_layers_and_packs():
    config = own("Stepping", use="once")
    before = steps_with_numbers()
    for seed in (0, 1):
        (result,) = train(tiny_run(config, seed=seed, num_epochs=1))
        assert result.state_size == STATE_OF_STEPPING
    assert steps_with_numbers() == before + 8


def test_a_large_state_is_found_without_computing_it(monkeypatch):
    monkeypatch.setattr("recallzoo.train.packed.MAX_COMPUTED_STATE", 16 * 8 - 1)
    config = own("Stepping", use="large")
    before = steps_with_numbers()
    assert train(tiny_run(config, num_epochs=1))[0].state_size == STATE_OF_STEPPING
    assert steps_with_numbers() == before


def test_a_step_that_the_cpu_cannot_compute_has_a_known_state():
    (result,) = train(tiny_run(own("Stepping", kernel=True), num_epochs=1))
    assert result.state_size == STATE_OF_STEPPING


def test_sizing_a_state_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    train(tiny_run(own("Stepping", use="random state"), num_epochs=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_mixer_without_step_has_no_known_state():
    run = tiny_run(own("PreviousToken"))
    (result,) = train(run)
    assert (result.state_size, result.status) == ({}, "finished")


def test_a_result_says_what_made_it():
    runs = [tiny_run(seed=0, label="mine"), tiny_run(seed=1)]
    first, second = train(*runs)
    for run, result in zip(runs, (first, second), strict=True):
        assert (result.hash, result.group, result.config) == (run.hash, run.group_key, run.config)
        assert (result.status, result.steps, result.epochs) == ("finished", 6, 6)
        assert [line["epoch"] for line in result.metrics] == [1, 2, 3, 4, 5, 6]
        assert [line["step"] for line in result.metrics] == [1, 2, 3, 4, 5, 6]
        assert result.train_loss_nats == result.metrics[-1]["train_loss_nats"]
        assert result.valid_accuracy == result.metrics[-1]["valid_accuracy"]
        assert result.provenance["pack_size"] == 2
        assert result.provenance["torch"] == importlib.metadata.version("torch")
        assert "CPU" in result.provenance["device"]
        assert result.provenance["fallbacks"] == []
        assert result.train_seconds > 0
    assert (first.label, second.label) == ("mine", "attention")


def test_evaluation_every_few_epochs_looks_less_often_and_trains_the_same():
    often, seldom = (tiny_run(num_epochs=7, evaluate_every=every) for every in (1, 3))
    (wanted,), (got,) = train(often), train(seldom)
    assert [line["epoch"] for line in got.metrics] == [3, 6, 7]
    every = losses(wanted)
    assert_same_losses(got, [sum(every[:3]) / 3, sum(every[3:6]) / 3, every[6]])
    assert got.test_loss_nats == wanted.test_loss_nats


def test_weights_that_are_not_float32_are_refused(tmp_path):
    file = tmp_path / "double.py"
    file.write_text(
        "import torch\n"
        "class Double(torch.nn.Linear):\n"
        "    def __init__(self, d_model, max_seq_len):\n"
        "        super().__init__(d_model, d_model, dtype=torch.float64)\n"
    )
    with pytest.raises(ContractViolation, match=r"float64.*Create it as float32"):
        Pack([tiny_run(mixer(f"{file}:Double"))], "cpu")


def test_runs_given_to_a_pack_are_not_changed():
    runs = [tiny_run(seed=0), tiny_run(seed=1)]
    before = copy.deepcopy(runs)
    assert outcome(train(*runs)[0]) == outcome(train(*before)[0])
    assert runs == before
