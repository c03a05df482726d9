"""Which recipes there are, read from source without importing anything.

So `recallzoo run --help` can name them without waiting for PyTorch.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

RETURNS = ("list[Run]", "List[Run]")
"""How the annotation of a recipe's result is written."""


@dataclass(frozen=True)
class Found:
    """A recipe of this package."""

    name: str
    module: str
    """Where it is, under `recallzoo.recipes`."""
    summary: str
    """First line of its docstring."""


def find_recipes() -> dict[str, Found]:
    """The recipes of this package by name. Raises RuntimeError if two have the same name."""
    found: dict[str, Found] = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        for function in recipe_functions(ast.parse(path.read_text(encoding="utf-8"))):
            if function.name in found:
                raise RuntimeError(
                    f"two recipes are called {function.name!r}: {found[function.name].module} "
                    f"and {path.stem}"
                )
            summary = (ast.get_docstring(function) or "").partition("\n")[0]
            found[function.name] = Found(function.name, path.stem, summary)
    return found


def recipe_names() -> list[str]:
    """Their names."""
    return sorted(find_recipes())


def public_functions(module: ast.Module) -> list[ast.FunctionDef]:
    """Functions defined at the top of a module whose name has no leading underscore."""
    return [
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]


def recipe_functions(module: ast.Module) -> list[ast.FunctionDef]:
    """Those of them that are annotated as recipes."""
    return [f for f in public_functions(module) if is_recipe(f)]


def is_recipe(function: ast.FunctionDef) -> bool:
    """Whether a function is annotated `-> list[Run]` (also `-> "list[Run]"`, `-> list[x.Run]`)."""
    if function.returns is None:
        return False
    written = ast.unparse(function.returns).strip("'\"")
    inner = written.removeprefix("list[").removeprefix("List[").removesuffix("]")
    return f"list[{inner.rpartition('.')[2]}]" in RETURNS and written != inner
