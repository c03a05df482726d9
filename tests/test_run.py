"""Runs and their hashes: equal for equal runs, different for anything that decides a result."""

# pyright: reportArgumentType=false
# Wrong types are handed over on purpose.

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recallzoo.errors import InvalidConfig
from recallzoo.mixers import MixerConfig, mixer, registry
from recallzoo.model import ModelConfig
from recallzoo.run import Budget, Optimizer, Run, describe
from recallzoo.tasks import Data, Segment, task

DATA = Data.of(task("mqar", vocab_size=64, seq_len=16, num_pairs=2), train=512, valid=8, test=8)
MODEL = ModelConfig(mixers=(mixer("attention"),))
RUN = Run(data=DATA, model=MODEL)

OTHER: dict[str, dict[str, Any]] = {
    "optimizer": {
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "decayed": "all",
        "beta1": 0.8,
        "beta2": 0.99,
        "eps": 1e-6,
        "warmup_fraction": 0.2,
        "schedule": "constant",
        "max_grad_norm": 1.0,
    },
    "budget": {
        "num_epochs": 3,
        "batch_size": 64,
        "evaluate_every": 2,
        "stop_accuracy": None,
        "stop_group": True,
    },
    "model": {
        "mixers": (mixer("attention", num_heads=2),),
        "d_model": 32,
        "num_layers": 3,
        "state_mixer": "mlp",
        "mlp_ratio": 2.0,
        "position": "learned",
        "norm": "rms",
        "tie_embeddings": False,
        "embed_dropout": 0.1,
        "residual_dropout": 0.1,
        "rescale_out_proj": False,
    },
    "data": {
        "train": (Segment(task=DATA.train[0].task, num_examples=513),),
        "valid": (Segment(task=DATA.train[0].task, num_examples=9),),
        "test": DATA.test * 2,
        "seed": 1,
    },
}
"""Another value for every field of every part of a run."""

CHANGES = [(part, field) for part, fields in OTHER.items() for field in fields]


def changed(part: str, field: str, run: Run = RUN) -> Run:
    other = dataclasses.replace(getattr(run, part), **{field: OTHER[part][field]})
    return dataclasses.replace(run, **{part: other})


def with_task(**options: Any) -> Run:
    of = task("mqar", **{"vocab_size": 64, "seq_len": 16, "num_pairs": 2, **options})
    return dataclasses.replace(RUN, data=Data.of(of, train=512, valid=8, test=8))


@pytest.mark.parametrize("part", OTHER)
def test_every_field_has_another_value_here(part):
    fields = {f.name for f in dataclasses.fields(getattr(RUN, part))}
    assert set(OTHER[part]) == fields, "a new field needs a line above, and its place in a key"


def test_every_field_changes_the_hash_and_in_its_own_way():
    runs = [RUN, *(changed(part, field) for part, field in CHANGES)]
    runs += [dataclasses.replace(RUN, seed=1), dataclasses.replace(RUN, precision="bf16")]
    runs += [with_task(seq_len=18), with_task(power=0.5), with_task(filler="random")]
    assert len({run.hash for run in runs}) == len(runs)


def test_the_label_is_for_people_alone():
    labelled = dataclasses.replace(RUN, label="ours")
    assert (labelled.hash, labelled.pack_key) == (RUN.hash, RUN.pack_key)
    assert "label" not in labelled.config
    assert (labelled.model_label, RUN.model_label) == ("ours", "attention")


def test_the_pattern_of_mixers_names_a_model_without_label():
    pattern = (mixer("base_conv", kernel_size=5), mixer("attention"))
    model = ModelConfig(mixers=pattern, num_layers=3)
    assert Run(data=DATA, model=model).model_label == "base_conv(kernel_size=5) + attention"


def test_another_version_of_a_task_or_of_training_is_another_run(monkeypatch):
    hashes = {RUN.hash}
    monkeypatch.setattr("recallzoo.run.RUN_VERSION", 99)
    hashes.add(dataclasses.replace(RUN).hash)
    monkeypatch.undo()
    monkeypatch.setattr(type(DATA.train[0].task), "version", 99)
    hashes.add(dataclasses.replace(RUN).hash)
    assert len(hashes) == 3


def shuffled(value: Any, order: Any) -> Any:
    """A JSON value with the keys of all its objects in another order."""
    if isinstance(value, dict):
        return {k: shuffled(value[k], order) for k in order.draw(st.permutations(list(value)))}
    return [shuffled(item, order) for item in value] if isinstance(value, list) else value


@given(st.data())
def test_the_order_of_fields_does_not_enter_the_hash(order):
    again = dataclasses.replace(RUN)
    again.__dict__["config"] = shuffled(RUN.config, order)
    assert again.hash == RUN.hash
    assert again.pack_key == RUN.pack_key
    assert again.group_key == RUN.group_key


@given(rate=st.integers(1, 5), decay=st.integers(0, 5), ratio=st.integers(1, 4))
def test_whole_numbers_and_floats_that_are_equal_name_the_same_run(rate, decay, ratio):
    whole, floating = (
        Run(
            data=DATA,
            model=ModelConfig(mixers=mixers, mlp_ratio=kind(ratio)),
            optimizer=Optimizer(learning_rate=kind(rate), weight_decay=kind(decay)),
        )
        for kind, mixers in ((int, [mixer("attention")]), (float, (mixer("attention"),)))
    )
    assert whole == floating
    assert whole.hash == floating.hash


def test_a_configuration_survives_json():
    config = json.loads(json.dumps(RUN.config, allow_nan=False))
    assert config == RUN.config
    assert config["data"]["train"][0]["task"]["task"] == "mqar"
    assert config["model"]["mixers"][0]["name"] == "attention"
    assert len(RUN.hash) == 16
    assert int(RUN.hash, 16) >= 0


PACKED_TOGETHER = {("optimizer", "learning_rate"), ("optimizer", "weight_decay")}


@pytest.mark.parametrize(("part", "field"), CHANGES)
def test_runs_share_a_pack_if_learning_rate_weight_decay_or_seed_alone_differ(part, field):
    run = changed(part, field)
    assert (run.pack_key == RUN.pack_key) == ((part, field) in PACKED_TOGETHER)


@pytest.mark.parametrize(("part", "field"), CHANGES)
def test_runs_are_of_one_group_if_the_learning_rate_alone_differs(part, field):
    run = changed(part, field)
    assert (run.group_key == RUN.group_key) == ((part, field) == ("optimizer", "learning_rate"))


def test_seeds_share_a_pack_but_no_group():
    other = dataclasses.replace(RUN, seed=1)
    assert other.pack_key == RUN.pack_key
    assert other.group_key != RUN.group_key
    assert dataclasses.replace(RUN, precision="bf16").pack_key != RUN.pack_key


@given(st.lists(st.sampled_from(CHANGES), max_size=4, unique=True))
def test_runs_of_one_group_share_a_pack_and_equal_runs_a_group(changes):
    run = RUN
    for part, field in sorted(changes, key=lambda c: c[1] == "stop_accuracy"):
        if {("budget", "stop_accuracy"), ("budget", "stop_group")} <= set(changes):
            return  # excluded by Budget
        run = changed(part, field, run)
    if run.hash == RUN.hash:
        assert run.group_key == RUN.group_key
    if run.group_key == RUN.group_key:
        assert run.pack_key == RUN.pack_key
    assert (run.hash == RUN.hash) == (not changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Optimizer(learning_rate=0.0),
            "optimizer.learning_rate=0.0 must be a number ab",
        ),
        (lambda: Optimizer(learning_rate=-1), "optimizer.learning_rate=-1.0"),
        (lambda: Optimizer(learning_rate=float("nan")), "optimizer.learning_rate wants a finite"),
        (lambda: Optimizer(learning_rate=float("inf")), "wants a finite number, got inf"),
        (
            lambda: Optimizer(learning_rate="1e-3"),
            "optimizer.learning_rate wants a number, got '",
        ),
        (lambda: Optimizer(learning_rate=True), "optimizer.learning_rate wants a number, got T"),
        (lambda: Optimizer(weight_decay=-0.1), "optimizer.weight_decay=-0.1 must be a number at l"),
        (
            lambda: Optimizer(beta1=1.0),
            "optimizer.beta1=1.0 must be a number at least 0 and b",
        ),
        (lambda: Optimizer(beta2=-0.1), "optimizer.beta2=-0.1"),
        (lambda: Optimizer(eps=0), "optimizer.eps=0.0"),
        (lambda: Optimizer(warmup_fraction=1.0), "optimizer.warmup_fraction=1.0"),
        (lambda: Optimizer(max_grad_norm=0.0), "optimizer.max_grad_norm=0.0"),
        (lambda: Optimizer(schedule="linear"), "optimizer.schedule wants one of 'cosine'"),
        (lambda: Optimizer(decayed="biases"), "optimizer.decayed wants one of 'matrices', 'all'"),
        (lambda: Budget(num_epochs=0), "budget.num_epochs=0 must be a number at least 1"),
        (lambda: Budget(num_epochs=1.5), "budget.num_epochs wants a whole number, got 1.5"),
        (lambda: Budget(batch_size=0), "budget.batch_size=0"),
        (lambda: Budget(evaluate_every=0), "budget.evaluate_every=0"),
        (lambda: Budget(stop_accuracy=0.0), "budget.stop_accuracy=0.0"),
        (
            lambda: Budget(stop_accuracy=99),
            "budget.stop_accuracy=99.0 must be a number above 0 a",
        ),
        (lambda: Budget(stop_accuracy=None, stop_group=True), "stop_group needs budget.stop_acc"),
        (lambda: Run(data=DATA, model=MODEL, precision="fp16"), "run.precision wants one of"),
        (lambda: Run(data=DATA, model=MODEL, seed=0.5), "run.seed wants a whole number, got 0.5"),
        (lambda: Run(data=DATA, model=MODEL, label=5), "run.label wants text, got 5"),
        (lambda: Run(data=task("mqar"), model=MODEL), "run.data wants Data, got MQAR"),
        (lambda: Run(data=DATA, model="attention"), "run.model wants ModelConfig, got 'attention'"),
        (
            lambda: Run(data=DATA, model=MODEL, budget=Budget(batch_size=1024)),
            "budget.batch_size=1024 is larger than the smallest training segment (512 examples)",
        ),
        (lambda: ModelConfig(mixers=()), "model.mixers is empty"),
        (
            lambda: ModelConfig(mixers=("attention",)),
            "model.mixers=('attention',) must be conf",
        ),
        (lambda: ModelConfig(mixers=mixer("attention")), "must be configured mixers in a tuple"),
        (
            lambda: ModelConfig(mixers=(mixer("attention"),), d_model=64.5),
            "model.d_model wants a",
        ),
    ],
)
def test_what_cannot_be_a_run_is_refused(make, message):
    with pytest.raises(InvalidConfig) as error:
        make()
    assert message in str(error.value)


def test_a_mixer_that_looks_ahead_by_definition_is_refused(monkeypatch):
    class LooksAhead(registry["attention"]):
        name = "looks_ahead"
        causal = False

    monkeypatch.setitem(registry._scan(), "looks_ahead", LooksAhead)
    model = ModelConfig(mixers=(mixer("attention"), MixerConfig("looks_ahead")))
    with pytest.raises(InvalidConfig, match="looks_ahead is not causal by its own definition"):
        Run(data=DATA, model=model)


def test_only_plain_values_can_be_described():
    with pytest.raises(TypeError, match="a run cannot hold set"):
        describe({1})


def test_a_mixer_of_ones_own_is_named_by_its_content_however_its_path_is_typed(
    tmp_path, monkeypatch
):
    source = (
        "from torch import nn\n\n\nclass Own(nn.Linear):\n"
        "    def __init__(self, d_model, max_seq_len):\n"
        "        super().__init__(d_model, d_model)\n"
    )
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(source)
    monkeypatch.chdir(tmp_path / "here")

    def run(name: str) -> Run:
        return Run(data=DATA, model=ModelConfig(mixers=(mixer(name),)))

    typed = ("own.py", "./own.py", "../here/own.py", f"{tmp_path}/here/own.py", "../there/own.py")
    runs = [run(f"{path}:Own") for path in typed]
    assert len({one.hash for one in runs}) == len({one.pack_key for one in runs}) == 1
    assert runs[1].config["model"]["mixers"][0]["name"] == "own.py:Own"
    (tmp_path / "there" / "own.py").write_text(source + "\n# another\n")
    assert run("../there/own.py:Own").hash != runs[0].hash
