"""When a run leaves its pack, and that those who stay do not notice."""

import dataclasses
import functools

import pytest
from plain_training import train_plainly
from tiny_runs import BATCH_SIZE, losses, own, tiny_run, tiny_task, train

from recallzoo.mixers import mixer
from recallzoo.result import Result
from recallzoo.run import Run
from recallzoo.tasks import Data

TOLERANCE_NATS = 1e-4
"""As in test_packed.py."""

RATES = (1e-4, 3e-3, 1e-2, 3e-2)
# Thresholds below lie at least half a query away from every accuracy that is compared with them.
EASY = Data.of(tiny_task(num_pairs=1), train=4 * BATCH_SIZE, valid=64, test=32)
NEVER_STOPPING = tuple(
    tiny_run(
        data=EASY,
        num_epochs=15,
        learning_rate=rate,
        seed=seed,
        weight_decay=decay,
        residual_dropout=0.05,
    )
    for rate in RATES
    for seed, decay in ((0, 0.1), (1, 2.0))
)


@functools.cache
def to_the_end() -> list[Result]:
    return train(*NEVER_STOPPING)


def stopping(at: float, group: bool = False) -> list[Run]:
    return [
        dataclasses.replace(
            run, budget=dataclasses.replace(run.budget, stop_accuracy=at, stop_group=group)
        )
        for run in NEVER_STOPPING
    ]


def first_epoch_at(result: Result, accuracy: float) -> int | None:
    """When the validation accuracy first reaches a threshold; None if it never does."""
    reached = [line["epoch"] for line in result.metrics if line["valid_accuracy"] >= accuracy]
    return reached[0] if reached else None


def assert_is_beginning_of(result: Result, whole: Result) -> None:
    assert losses(result) == pytest.approx(losses(whole)[: result.epochs], abs=TOLERANCE_NATS)
    accuracies = [[line["valid_accuracy"] for line in r.metrics] for r in (result, whole)]
    assert accuracies[0] == accuracies[1][: result.epochs]


@pytest.mark.parametrize("threshold", [0.29, 0.45, 0.95])
def test_a_run_stops_when_it_reaches_the_threshold_and_the_others_go_on(threshold):
    for result, whole in zip(train(*stopping(threshold)), to_the_end(), strict=True):
        epoch = first_epoch_at(whole, threshold)
        assert result.status == ("finished" if epoch is None else "solved")
        assert result.epochs == (epoch or 15)
        assert result.steps == 4 * result.epochs
        assert_is_beginning_of(result, whole)
        if epoch is None:
            assert result.rows == whole.rows
            assert result.test_loss_nats == pytest.approx(whole.test_loss_nats, abs=TOLERANCE_NATS)


def test_some_runs_stop_early_and_some_never():
    epochs = {first_epoch_at(result, 0.45) for result in to_the_end()}
    assert None in epochs
    assert len(epochs) > 2


@pytest.mark.parametrize("threshold", [0.195, 0.95])
def test_a_group_stops_with_the_first_of_it_that_solves_the_task(threshold):
    runs = stopping(threshold, group=True)
    first: dict[str, int] = {}
    for run, whole in zip(runs, to_the_end(), strict=True):
        epoch = first_epoch_at(whole, threshold)
        if epoch is not None:
            first[run.group_key] = min(epoch, first.get(run.group_key, epoch))
    assert len(set(first.values())) == 2, "two groups, one for each seed, that stop apart"
    for run, result, whole in zip(runs, train(*runs), to_the_end(), strict=True):
        epoch = first[run.group_key]
        own_epoch = first_epoch_at(whole, threshold)
        assert result.status == ("solved" if own_epoch == epoch else "group_solved")
        assert result.epochs == epoch
        assert_is_beginning_of(result, whole)


@pytest.mark.parametrize("rate", [1e30, 1e12])
def test_a_diverged_run_is_recorded_with_its_step_and_leaves_its_mates_alone(rate):
    runs = [
        tiny_run(learning_rate=r, num_epochs=5, warmup_fraction=0.0, seed=seed)
        for r, seed in ((3e-3, 0), (rate, 1), (1e-2, 2))
    ]
    first, diverged, third = train(*runs)
    by_step = train_plainly(runs[1]).losses
    first_bad = next(step for step, loss in enumerate(by_step) if not abs(loss) < float("inf"))
    assert (diverged.status, diverged.diverged_step) == ("diverged", first_bad)
    assert diverged.steps == first_bad + 1
    assert diverged.train_loss_nats is None
    assert losses(diverged)[-1] is None
    for run, result in ((runs[0], first), (runs[2], third)):
        (alone,) = train(run)
        assert (result.status, result.diverged_step, result.steps) == ("finished", None, 5)
        assert losses(result) == pytest.approx(losses(alone), abs=TOLERANCE_NATS)
        assert result.test_loss_nats == pytest.approx(alone.test_loss_nats, abs=TOLERANCE_NATS)
        assert result.rows == alone.rows


def test_a_run_that_its_last_step_spoils_has_diverged():
    """No later step sees it; the loss of the step that would come next is the validation loss."""
    rate = 1e30
    steady, diverged = train(
        *(tiny_run(learning_rate=r, num_epochs=1, warmup_fraction=0.0) for r in (3e-3, rate))
    )
    whole = tiny_run(learning_rate=rate, num_epochs=2, warmup_fraction=0.0)
    assert [abs(loss) < float("inf") for loss in train_plainly(whole).losses] == [True, False]
    assert (diverged.status, diverged.diverged_step, diverged.steps) == ("diverged", 1, 1)
    assert diverged.valid_loss_nats is None
    assert (steady.status, steady.diverged_step) == ("finished", None)


def test_a_run_that_diverges_between_two_looks_keeps_its_first_bad_step():
    runs = [
        tiny_run(own("Exploding", limit=0.05), learning_rate=rate, num_epochs=12, evaluate_every=6)
        for rate in (1e-5, 1e-2)
    ]
    steady, diverged = train(*runs)
    by_step = train_plainly(runs[1]).losses
    first_bad = next(step for step, loss in enumerate(by_step) if not abs(loss) < float("inf"))
    assert 1 < first_bad < 12
    assert (diverged.status, diverged.diverged_step) == ("diverged", first_bad)
    assert diverged.steps in (6, 12)
    assert first_bad < diverged.steps <= first_bad + 6
    assert (steady.status, steady.steps) == ("finished", 12)
    assert None not in losses(steady)


def test_runs_that_all_diverge_end_the_pack():
    runs = [
        tiny_run(mixer("base_conv"), learning_rate=1e30, seed=seed, num_epochs=50)
        for seed in (0, 1)
    ]
    for result in train(*runs):
        assert result.status == "diverged"
        assert result.epochs < 10
        assert 0.0 <= result.test_accuracy <= 1.0
