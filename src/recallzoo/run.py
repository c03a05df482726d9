"""A run: everything that decides a result, and the name that follows from it.

run = Run(
    data=Data.of(task("mqar", seq_len=64, num_pairs=4)),
    model=ModelConfig(mixers=(mixer("attention"),), d_model=64, position="learned"),
    optimizer=Optimizer(learning_rate=1e-3),
)
run.hash       # names its results; equal runs have equal hashes, whatever made them
run.pack_key   # runs with equal keys are one program and train together
"""

import dataclasses
import functools
import hashlib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from recallzoo.errors import InvalidConfig
from recallzoo.model import ModelConfig
from recallzoo.options import checked
from recallzoo.tasks import Data, Task, source_sha256

RUN_VERSION = 1
"""Goes up when equal runs no longer train alike; part of every hash."""

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) and its learning-rate schedule."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Multiplied by the learning rate and taken off the parameters that `decayed` names."""
    decayed: Literal["matrices", "all"] = "matrices"
    """matrices, but those that a mixer exempts (see `LanguageModel.parameter_rules`), or all."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    warmup_fraction: float = 0.1
    """Share of all steps during which the learning rate rises linearly from zero."""
    schedule: Literal["cosine", "cosine_by_epoch", "constant"] = "cosine"
    """How it falls afterwards: to zero along a cosine, step by step or once an epoch."""
    max_grad_norm: float | None = None
    """Gradients with a larger L2 norm are scaled down to it; None leaves them."""

    def __post_init__(self) -> None:
        _check_types("optimizer", self)
        _check_range("optimizer.learning_rate", self.learning_rate, above=0.0)
        _check_range("optimizer.weight_decay", self.weight_decay, at_least=0.0)
        _check_range("optimizer.beta1", self.beta1, at_least=0.0, below=1.0)
        _check_range("optimizer.beta2", self.beta2, at_least=0.0, below=1.0)
        _check_range("optimizer.eps", self.eps, above=0.0)
        _check_range("optimizer.warmup_fraction", self.warmup_fraction, at_least=0.0, below=1.0)
        if self.max_grad_norm is not None:
            _check_range("optimizer.max_grad_norm", self.max_grad_norm, above=0.0)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a run trains and when it may stop."""

    num_epochs: int = 64
    """Passes over the training examples."""
    batch_size: int = 256
    """Examples in a step. Each epoch leaves out a random remainder smaller than a batch."""
    evaluate_every: int = 1
    """Epochs between two looks at the validation set."""
    stop_accuracy: float | None = 0.99
    """Validation accuracy at which a run counts as having solved the task and stops."""
    stop_group: bool = False
    """Whether runs that differ in learning rate alone stop once one of them solves the task."""

    def __post_init__(self) -> None:
        _check_types("budget", self)
        for name in ("num_epochs", "batch_size", "evaluate_every"):
            _check_range(f"budget.{name}", getattr(self, name), at_least=1)
        if self.stop_accuracy is not None:
            _check_range("budget.stop_accuracy", self.stop_accuracy, above=0.0, at_most=1.0)
        elif self.stop_group:
            raise InvalidConfig(
                "budget.stop_group needs budget.stop_accuracy, which is None: set one, e.g. 0.99."
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. `label` is for people and does not enter the hash."""

    data: Data
    model: ModelConfig
    optimizer: Optimizer = field(default_factory=Optimizer)
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    """Decides initialisation, order of examples and dropout; the data have their own seed."""
    precision: Precision = "fp32"
    """Arithmetic of the matrix products; master weights and reductions are always fp32."""
    label: str = ""
    """What charts call the model; the mixer pattern if empty."""

    def __post_init__(self) -> None:
        _check_types("run", self)
        smallest = min(segment.num_examples for segment in self.data.train)
        if smallest < self.budget.batch_size:
            raise InvalidConfig(
                f"budget.batch_size={self.budget.batch_size} is larger than the smallest training "
                f"segment ({smallest} examples), which would never be trained on. Lower the batch "
                f"size or raise the number of examples."
            )
        for config in self.model.mixers:
            if not getattr(config.find_class(), "causal", True):
                raise InvalidConfig(
                    f"mixer {config.name} is not causal by its own definition: on a recall task it "
                    f"may read what comes after the query, which would make its accuracy false."
                )

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """All of the run as plain JSON values, without its label, and without the folder that a
        user's mixer lies in: the file's content is named by its hash."""
        described = {**describe(self), "model": describe_model(self.model)}
        del described["label"]
        return {"run_version": RUN_VERSION, **described}

    @functools.cached_property
    def hash(self) -> str:
        """16 hexadecimal digits that name this run."""
        return _digest(self.config)

    @functools.cached_property
    def pack_key(self) -> str:
        """Equal for runs that are one program: all alike but seed, learning rate
        and weight decay."""
        same = {**self.config, "seed": None}
        same["optimizer"] = {
            name: value
            for name, value in self.config["optimizer"].items()
            if name not in ("learning_rate", "weight_decay")
        }
        return _digest(same)

    @functools.cached_property
    def group_key(self) -> str:
        """Equal for runs that differ in learning rate alone."""
        return _digest(
            {**self.config, "optimizer": {**self.config["optimizer"], "learning_rate": None}}
        )

    @property
    def model_label(self) -> str:
        """What charts call the model."""
        return self.label or " + ".join(dict.fromkeys(str(m) for m in self.model.mixers))


def describe(value: Any) -> Any:
    """A configuration as plain JSON values. Tasks carry their name and version, and a user's own
    the hash of its source."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Task):
            source = source_sha256(type(value))
            own = {} if source is None else {"task_source_sha256": source}
            return {"task": value.name, "task_version": value.version, **own, **fields}
        return fields
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a run cannot hold {type(value).__name__}: {value!r}")


def describe_model(model: ModelConfig) -> dict[str, Any]:
    """A model as plain JSON values, without the folder that a user's mixer lies in."""
    described = describe(model)
    for mixer in described["mixers"]:
        mixer["name"] = without_folder(mixer["name"])
    return described


def without_folder(mixer_name: str) -> str:
    """`file.py:Class` of a user's `path/to/file.py:Class`; other names as they are."""
    if ".py:" not in mixer_name:
        return mixer_name
    path, class_name = mixer_name.rsplit(":", 1)
    return f"{Path(path).name}:{class_name}"


def _digest(config: dict[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_types(owner: str, config: Any) -> None:
    """Hold every field of a frozen configuration to its type, so that equal ones, such as a
    learning rate of 1 and of 1.0, have one hash. Raises InvalidConfig."""
    hints = typing.get_type_hints(type(config))
    for each in dataclasses.fields(config):
        value = checked(f"{owner}.{each.name}", getattr(config, each.name), hints[each.name])
        object.__setattr__(config, each.name, value)


def _check_range(
    name: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    good = (
        (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )
    if not good:
        limits = [
            f"{word} {limit:g}"
            for word, limit in (
                ("at least", at_least),
                ("above", above),
                ("below", below),
                ("at most", at_most),
            )
            if limit is not None
        ]
        raise InvalidConfig(f"{name}={value!r} must be a number {' and '.join(limits)}.")
