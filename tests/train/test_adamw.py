"""The packed optimiser is torch.optim.AdamW, with LambdaLR as its schedule.

Seen from outside, by the losses of every step: each differs measurably from those of a run
without the setting under test, and equals those of a plain loop with it.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_training import train_plainly
from tiny_runs import BATCH_SIZE, losses, own, tiny_run, tiny_task, train

from recallzoo.run import Run
from recallzoo.tasks import Data

TOLERANCE_NATS = 1e-4
"""As in test_packed.py."""
VISIBLE_NATS = 1e-3
"""A setting counts as acting from this difference on, far above the tolerance."""

STEEP: dict[str, Any] = {"learning_rate": 3e-2, "weight_decay": 3.0, "num_epochs": 10}


def assert_as_torch(*runs: Run) -> list[list[float]]:
    found = [losses(result) for result in train(*runs)]
    for run, seen in zip(runs, found, strict=True):
        assert seen == pytest.approx(train_plainly(run).epoch_losses, rel=0, abs=TOLERANCE_NATS)
    return found


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("schedule", "cosine", "constant"),
        ("schedule", "cosine_by_epoch", "constant"),
        ("warmup_fraction", 0.35, 0.0),
        ("max_grad_norm", 0.05, None),
        ("eps", 1e-2, 1e-8),
        ("beta1", 0.5, 0.9),
        ("beta2", 0.8, 0.999),
        ("weight_decay", 3.0, 0.0),
        ("decayed", "all", "matrices"),
        ("learning_rate", 3e-2, 1e-2),
    ],
)
def test_every_setting_acts_as_in_torch(name, value, other):
    (with_it,) = assert_as_torch(tiny_run(**{**STEEP, name: value}))
    (without,) = assert_as_torch(tiny_run(**{**STEEP, name: other}))
    assert difference(with_it, without) > VISIBLE_NATS


def test_learning_rate_and_weight_decay_are_each_runs_own():
    runs = [
        tiny_run(**{**STEEP, "learning_rate": rate, "weight_decay": decay})
        for rate, decay in ((3e-2, 3.0), (3e-2, 0.0), (3e-3, 3.0))
    ]
    found = assert_as_torch(*runs)
    assert difference(found[0], found[1]) > VISIBLE_NATS
    assert difference(found[0], found[2]) > VISIBLE_NATS


def test_clipping_looks_at_each_run_alone():
    runs = [tiny_run(**STEEP, seed=seed, max_grad_norm=0.3) for seed in (0, 1)]
    runs.append(tiny_run(**{**STEEP, "learning_rate": 0.5}, seed=2, max_grad_norm=0.3))
    assert_as_torch(*runs)


@pytest.mark.parametrize("fixed_rate", [None, 0.1])
@pytest.mark.parametrize("decayed", [True, False])
def test_a_mixers_rules_for_its_parameters_are_followed(decayed, fixed_rate):
    ruled = own("Ruled", decayed=decayed, fixed_rate=fixed_rate)
    runs = [
        tiny_run(ruled, **{**STEEP, "learning_rate": rate, "weight_decay": decay})
        for rate, decay in ((3e-3, 3.0), (3e-2, 10.0))
    ]
    found = assert_as_torch(*runs)
    other_decay = own("Ruled", decayed=not decayed, fixed_rate=fixed_rate)
    (otherwise,) = assert_as_torch(tiny_run(other_decay, **{**STEEP, "weight_decay": 10.0}))
    assert difference(found[1], otherwise) > VISIBLE_NATS


@settings(max_examples=8)
@given(
    num_epochs=st.integers(1, 6),
    steps_per_epoch=st.integers(1, 3),
    warmup_fraction=st.floats(0, 0.99),
    schedule=st.sampled_from(["cosine", "cosine_by_epoch", "constant"]),
    max_grad_norm=st.none() | st.floats(0.01, 10),
)
def test_any_schedule_is_torchs(
    num_epochs, steps_per_epoch, warmup_fraction, schedule, max_grad_norm
):
    run = tiny_run(
        own("PreviousToken"),
        **{**STEEP, "num_epochs": num_epochs},
        data=Data.of(tiny_task(), train=steps_per_epoch * BATCH_SIZE + 3, valid=8, test=8),
        warmup_fraction=warmup_fraction,
        schedule=schedule,
        max_grad_norm=max_grad_norm,
    )
    assert_as_torch(run)
