"""Print the tasks, mixers, models or recipes there are, with their options.

examples:
  recallzoo list mixers
  recallzoo list tasks --json
"""

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from recallzoo.cli._options import parse, plain

Kind = Literal["tasks", "mixers", "models", "recipes"]


@dataclass(frozen=True)
class ListOptions:
    """What to list, and how."""

    kind: tyro.conf.Positional[Kind]
    """What to list."""
    json: bool = False
    """Print JSON, for programs."""


def main(argv: list[str]) -> int:
    """`recallzoo list`."""
    options = parse(ListOptions, argv, "list", __doc__)
    entries = _ENTRIES[options.kind]()
    if options.json:
        json.dump(entries, sys.stdout, indent=2)
        print()
    else:
        _print(entries, options.kind)
    return 0


def _print(entries: list[dict[str, Any]], kind: str) -> None:
    if not entries:
        print(f"no {kind} are registered.")
    for entry in entries:
        print(f"{entry['name']}  {entry['summary']}")
        for option in entry["options"]:
            print(f"    {option['name']}: {option['type']} = {option['default']!r}")


def _tasks() -> list[dict[str, Any]]:
    from recallzoo.tasks import option_types, registry

    return [
        {**_entry(name, cls, option_types(cls)), "version": cls.version}
        for name, cls in registry.items()
    ]


def _mixers() -> list[dict[str, Any]]:
    from recallzoo.mixers import option_types, registry

    return [
        {
            **_entry(name, cls, option_types(cls)),
            "causal": cls.causal,
            "needs_tokens": cls.needs_tokens,
        }
        for name, cls in registry.items()
    ]


def _models() -> list[dict[str, Any]]:
    if importlib.util.find_spec("recallzoo.presets") is None:
        return []
    presets: Any = importlib.import_module("recallzoo.presets")
    return [
        {"name": name, "summary": _first_line(preset), "options": []}
        for name, preset in presets.registry.items()
    ]


def _recipes() -> list[dict[str, Any]]:
    from recallzoo.recipes import find_recipes, load

    entries = []
    for name in sorted(find_recipes()):
        recipe = load(name)
        types = {p.name: (p.type, p.default) for p in recipe.parameters}
        entries.append(_entry(name, recipe.function, types))
    return entries


_ENTRIES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "tasks": _tasks,
    "mixers": _mixers,
    "models": _models,
    "recipes": _recipes,
}


def _entry(name: str, component: Any, types: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "summary": _first_line(component),
        "options": [
            {"name": option, "type": _type_name(wanted), "default": plain(default)}
            for option, (wanted, default) in types.items()
        ],
    }


def _first_line(component: Any) -> str:
    return (inspect.getdoc(component) or "").partition("\n")[0]


def _type_name(wanted: Any) -> str:
    text = inspect.formatannotation(wanted)
    return text.removeprefix("typing.").replace("typing.", "")
