"""Results that belong together: runs that differ in learning rate and seed alone.

A cell is one point of a figure. Its learning rate is chosen on validation, its accuracy is
reported on test. Nothing here imports torch.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from recallzoo.result import Result
from recallzoo.store import flatten


@dataclass(frozen=True)
class Cell:
    """Runs that differ in learning rate and seed alone."""

    label: str
    config: dict[str, Any]
    """Flattened, without learning rate and seed."""
    results: tuple[Result, ...]

    @cached_property
    def by_learning_rate(self) -> dict[float, list[Result]]:
        """The runs at each learning rate tried, ascending."""
        by_rate: dict[float, list[Result]] = {}
        for result in self.results:
            by_rate.setdefault(result.config["optimizer"]["learning_rate"], []).append(result)
        return dict(sorted(by_rate.items()))

    @cached_property
    def at_best(self) -> list[Result]:
        """The runs, one a seed, at the learning rate with the best mean validation accuracy
        over seeds; the smaller one if two are equal. One that lacks seeds which others have is
        left out.

        Where runs stopped because another learning rate had solved the task, their accuracy is
        what it was by then and no mean over seeds can be compared: each seed has its own best.
        """
        by_rate = self.by_learning_rate
        if self.is_chosen_by_seed:
            by_seed: dict[int, list[Result]] = {}
            for result in chain.from_iterable(by_rate.values()):
                by_seed.setdefault(result.config["seed"], []).append(result)
            return [max(runs, key=_valid_accuracy) for _, runs in sorted(by_seed.items())]
        most = max(len(runs) for runs in by_rate.values())
        complete = {rate: runs for rate, runs in by_rate.items() if len(runs) == most}
        best = max(complete, key=lambda rate: _mean_valid(complete[rate]))
        return complete[best]

    @property
    def is_chosen_by_seed(self) -> bool:
        """Whether each seed has a best learning rate of its own."""
        return any(result.status == "group_solved" for result in self.results)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The best one, by validation; where seeds have their own, all of them, ascending."""
        rates = {result.config["optimizer"]["learning_rate"] for result in self.at_best}
        return tuple(sorted(rates))

    @property
    def test_accuracy(self) -> float:
        """Mean over seeds at the best learning rate."""
        return statistics.fmean(result.test_accuracy for result in self.at_best)

    @property
    def sizes(self) -> dict[str, str]:
        """Length and pairs of the test examples, and the model's width."""
        tasks = [segment["task"] for segment in json.loads(self.config["data.test"])]
        sizes = {"task": _distinct(task["task"] for task in tasks)}
        for name, column in (("seq_len", "length"), ("num_pairs", "pairs")):
            if any(name in task for task in tasks):
                sizes[column] = _distinct(task[name] for task in tasks if name in task)
        return {**sizes, "width": str(self.config["model.d_model"])}


def cells(results: Iterable[Result]) -> list[Cell]:
    """Group results by everything but learning rate and seed, in the order given."""
    groups: dict[str, tuple[dict[str, Any], list[Result]]] = {}
    for result in results:
        config = flatten(result.config)
        del config["optimizer.learning_rate"], config["seed"]
        key = json.dumps(config, sort_keys=True)
        groups.setdefault(key, (config, []))[1].append(result)
    return [Cell(runs[0].label, config, tuple(runs)) for config, runs in groups.values()]


def cell_words(label: str, config: dict[str, Any]) -> str:
    """The cell of a run in a few plain words, by which a results folder knows it before it is
    finished."""
    tasks = [segment["task"] for segment in config["data"]["test"]]
    names, lengths, pairs = (
        _distinct(task.get(name) for task in tasks) for name in ("task", "seq_len", "num_pairs")
    )
    model = config["model"]
    return (
        f"{label}, {model['num_layers']} layers, width {model['d_model']}, {config['precision']}; "
        f"{names}, {lengths} tokens" + f", {pairs} pairs" * (pairs != "None")
    )


def data_words(grid: list[Cell]) -> list[str]:
    """For each cell the options of its data, such as `power=1.0`, in which it differs from others
    of equal task and sizes; "" where sizes say all."""
    options = [data_options(cell) for cell in grid]
    alike: dict[str, list[dict[str, Any]]] = {}
    for cell, own in zip(grid, options, strict=True):
        alike.setdefault(_data_sizes(cell), []).append(own)
    return [
        ", ".join(f"{n}={own.get(n)}" for n in sorted(differing(alike[_data_sizes(cell)])))
        for cell, own in zip(grid, options, strict=True)
    ]


def mixer_words(grid: list[Cell]) -> list[str]:
    """For each cell what its mixers have, such as `window=4`, that those of others of equal label
    and sizes have not; "" where these say all."""
    options = [_mixer_options(cell) for cell in grid]
    places = [json.dumps([cell.label, cell.sizes]) for cell in grid]
    alike: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for place, own in zip(places, options, strict=True):
        alike[place].append(own)
    words = []
    for place, own in zip(places, options, strict=True):
        others = alike[place]
        named = ["mixers"] if "mixers" in differing(others) else []
        telling = differing([other for other in others if other["mixers"] == own["mixers"]])
        words.append(", ".join(f"{name}={own.get(name)}" for name in [*named, *sorted(telling)]))
    return words


def _mixer_options(cell: Cell) -> dict[str, str]:
    """Names of the mixers, and each option: one value if it is all layers', else theirs in turn."""
    mixers = json.loads(cell.config["model.mixers"])
    values: dict[str, list[str]] = defaultdict(list)
    for one in mixers:
        for name, value in one["options"]:
            values[name].append(str(value))
        if one.get("source_sha256"):
            values["source"].append(one["source_sha256"][:8])
    return {
        "mixers": " + ".join(one["name"] for one in mixers),
        **{name: own[0] if len(set(own)) == 1 else "+".join(own) for name, own in values.items()},
    }


def _data_sizes(cell: Cell) -> str:
    return json.dumps({name: size for name, size in cell.sizes.items() if name != "width"})


def data_options(cell: Cell) -> dict[str, Any]:
    """Options of the data by a short name: of the test examples as they are, others under
    their split's name, and only where they differ from the test's."""
    options: dict[str, Any] = {"data_seed": cell.config["data.seed"]}
    for split in ("test", "train", "valid"):
        segments = json.loads(cell.config[f"data.{split}"])
        leaves: dict[str, list[Any]] = defaultdict(list)
        for segment in segments:
            for name, value in {**segment["task"], "num_examples": segment["num_examples"]}.items():
                leaves[name].append(value)
        for name, values in leaves.items():
            text = ", ".join(map(str, dict.fromkeys(values)))
            if split == "test":
                options[name] = text
            elif name == "num_examples" or text != options.get(name):
                options[f"{split}_{name}"] = text
    return options


def differing(options: list[dict[str, Any]]) -> set[str]:
    names = {name for option in options for name in option}
    return {n for n in names if len({json.dumps(option.get(n)) for option in options}) > 1}


def rates_text(rates: Iterable[float]) -> str:
    """Learning rates to read."""
    return ", ".join(f"{rate:.4g}" for rate in rates)


def _valid_accuracy(result: Result) -> float:
    return result.valid_accuracy


def _mean_valid(results: list[Result]) -> float:
    return statistics.fmean(map(_valid_accuracy, results))


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))
