"""A task by name and options, checked when it is written down."""

import dataclasses
import typing

from recallzoo.options import OptionValue, require_known
from recallzoo.registry import Registry
from recallzoo.tasks._contract import Task

registry: Registry[Task] = Registry("recallzoo.tasks", Task, "task")


def task(name: str, **options: OptionValue) -> Task:
    """Configure a task: `task("mqar", seq_len=128, num_pairs=8)`.

    Raises UnknownName for an unknown task, and InvalidConfig for an option that it does not
    have, a value of the wrong type, or sizes that do not fit together.
    """
    cls = registry[name]
    require_known(f"task {name}", options, option_types(cls))
    return cls(**typing.cast(dict[str, typing.Any], options))


def option_types(cls: type[Task]) -> dict[str, tuple[typing.Any, OptionValue]]:
    """The options of a task class: name -> (type, default), in the order declared."""
    hints = typing.get_type_hints(cls)
    options: dict[str, tuple[typing.Any, OptionValue]] = {}
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING:
            raise TypeError(f"{cls.__name__}.{field.name} needs a default that is a plain value")
        options[field.name] = (hints[field.name], field.default)
    return options
