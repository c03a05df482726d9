"""Runs that train in a blink, and ways to train them."""

import dataclasses
from pathlib import Path
from typing import Any

from recallzoo.mixers import MixerConfig, mixer
from recallzoo.model import ModelConfig
from recallzoo.result import Result
from recallzoo.run import Budget, Optimizer, Run
from recallzoo.tasks import Data, Task, task
from recallzoo.train.packed import Pack, PackOptions

OWN = Path(__file__).with_name("own_mixers.py")
BATCH_SIZE = 16


def own(name: str, **options: Any) -> MixerConfig:
    """A mixer of `own_mixers.py`."""
    return mixer(f"{OWN}:{name}", **options)


def tiny_task(name: str = "mqar", **options: Any) -> Task:
    return task(name, **{"seq_len": 8, "num_pairs": 2, "vocab_size": 16, **options})


def one_step_an_epoch(of: Task | None = None, valid: int = 16, test: int = 16) -> Data:
    """Data of which an epoch is one step, so that the loss of every step is in the metrics."""
    return Data.of(of or tiny_task(), train=BATCH_SIZE, valid=valid, test=test)


def tiny_run(*mixers: MixerConfig, seed: int = 0, **options: Any) -> Run:
    """A run; `options` go to whichever of Run, ModelConfig, Optimizer and Budget has them."""
    chosen: dict[str, Any] = {
        "data": one_step_an_epoch(),
        "learning_rate": 3e-3,
        "num_epochs": 6,
        "batch_size": BATCH_SIZE,
        "stop_accuracy": None,
        "d_model": 16,
        "position": "learned",
        **options,
    }

    def part(cls: type) -> dict[str, Any]:
        return {f.name: chosen.pop(f.name) for f in dataclasses.fields(cls) if f.name in chosen}

    run = Run(
        model=ModelConfig(mixers=mixers or (mixer("attention"),), **part(ModelConfig)),
        optimizer=Optimizer(**part(Optimizer)),
        budget=Budget(**part(Budget)),
        seed=seed,
        **part(Run),
    )
    assert not chosen, f"nothing has the options {chosen}"
    return run


def train(*runs: Run, options: PackOptions | None = None) -> list[Result]:
    """Results of one pack, in the order of the runs given."""
    results = {r.hash: r for r in Pack(list(runs), "cpu", options).train()}
    assert len(results) == len(runs)
    return [results[run.hash] for run in runs]


def losses(result: Result) -> list[float]:
    """Training loss of every epoch, in nats."""
    return [line["train_loss_nats"] for line in result.metrics]


def outcome(result: Result) -> Result:
    """A result without what may differ between two trainings of a run: time, and its mates."""
    return dataclasses.replace(
        result, train_seconds=0.0, provenance={**result.provenance, "pack_size": 0}
    )
