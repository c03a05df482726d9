"""A recipe by name or by file: found, imported, called, and its result checked."""

import ast
import importlib
import inspect
import traceback
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recallzoo.errors import RecallzooError, UnknownName, UserError
from recallzoo.recipes._find import find_recipes, is_recipe, public_functions, recipe_functions

if typing.TYPE_CHECKING:
    from recallzoo.run import Run


@dataclass(frozen=True)
class Parameter:
    """One option of a recipe."""

    name: str
    type: Any
    default: Any


@dataclass(frozen=True)
class Recipe:
    """A recipe, ready to be called."""

    name: str
    function: Callable[..., Any]
    where: str
    """File and line of its definition."""
    is_own: bool
    """Whether it belongs to this package."""
    parameters: tuple[Parameter, ...]

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def runs(self, **options: Any) -> "list[Run]":
        """Call it. UserError if it fails, or returns anything but a list of runs."""
        from recallzoo.run import Run

        try:
            runs = self.function(**options)
        except RecallzooError:
            raise
        except (Exception, SystemExit) as error:
            if self.is_own:
                raise
            raise UserError(
                f"{self._line_of(error)}: recipe {self.name} failed with "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(runs, list):
            raise UserError(
                f"{self.where}: recipe {self.name} returned {_kind(runs)}; a list of runs "
                f"(recallzoo.run.Run) is wanted."
            )
        empty = [f"--{name.replace('_', '-')}" for name, value in options.items() if value == ()]
        if not runs and empty:
            raise UserError(
                f"no value was given for {' and '.join(empty)}, so that recipe {self.name} has "
                f"nothing to train. Give one or more, or leave the option out for its default."
            )
        if not runs:
            raise UserError(
                f"{self.where}: recipe {self.name} returned an empty list: there is nothing to "
                f"train."
            )
        for position, run in enumerate(runs):
            if not isinstance(run, Run):
                raise UserError(
                    f"{self.where}: item {position} (counted from 0) of the list that recipe "
                    f"{self.name} returned is {_kind(run)}; recallzoo.run.Run is wanted."
                )
        return runs

    def _line_of(self, error: BaseException) -> str:
        path = self.where.rpartition(":")[0]
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == path and frame.lineno
        ]
        return f"{path}:{lines[-1]}" if lines else self.where


def load(name: str) -> Recipe:
    """The recipe called `name`, or in the file `path.py`, or `path.py:function`.

    Raises UnknownName for an unknown recipe; UserError naming file and line for a file that
    cannot be imported, holds no recipe or several, or a recipe whose options lack a type.
    """
    if ".py" in name or "/" in name:
        return _load_file(name)
    found = find_recipes()
    if name not in found:
        raise UnknownName("recipe", name, found)
    module = importlib.import_module(f"recallzoo.recipes.{found[name].module}")
    return _recipe(name, getattr(module, name), is_own=True)


def _load_file(name: str) -> Recipe:
    written, _, function_name = name.partition(".py:")
    path = Path(written if written.endswith(".py") else f"{written}.py")
    if not path.is_file() or path.suffix != ".py":
        raise UserError(
            f"there is no recipe file {path}. Give path/to/recipe.py, path/to/recipe.py:function, "
            f"or one of the recipes {', '.join(find_recipes())}."
        )
    path = path.resolve()
    tree = _parse(path)
    function_name = _choose(tree, path, function_name)
    module = _import(path)
    return _recipe(function_name, getattr(module, function_name), is_own=False)


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise UserError(
            f"{path}:{error.lineno}: syntax error in the recipe: {error.msg}"
            + (f": {error.text.strip()}" if error.text else "")
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is no Python source: {error}") from error


def _choose(tree: ast.Module, path: Path, wanted: str) -> str:
    """The function to call: the one asked for, the only recipe, or one named like the file."""
    public = {f.name: f for f in public_functions(tree)}
    recipes = [f.name for f in recipe_functions(tree)]
    if wanted:
        if wanted not in public:
            raise UnknownName(f"recipe in {path}", wanted, recipes)
        if not is_recipe(public[wanted]):
            raise UserError(
                f"{path}:{public[wanted].lineno}: {wanted} is not annotated as a recipe. Write "
                f"def {wanted}(...) -> list[Run]."
            )
        return wanted
    if len(recipes) == 1:
        return recipes[0]
    for name in (path.stem, "recipe"):
        if name in recipes:
            return name
    if recipes:
        raise UserError(
            f"{path} holds {len(recipes)} recipes: {', '.join(recipes)}. Say which: "
            f"{path.name}:{recipes[0]}."
        )
    near = next(iter(public.values()), None)
    raise UserError(
        f"{path} holds no recipe: a public function annotated -> list[Run] is wanted."
        if near is None
        else f"{path}:{near.lineno}: no function is annotated as a recipe. Write "
        f"def {near.name}(...) -> list[Run]."
    )


def _import(path: Path) -> types.ModuleType:
    from recallzoo.mixers._user_file import find_beside, import_file

    find_beside(path)
    return import_file(path)


def _recipe(name: str, function: Callable[..., Any], *, is_own: bool) -> Recipe:
    code = inspect.unwrap(function).__code__
    where = f"{code.co_filename}:{code.co_firstlineno}"
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        raise UserError(
            f"{where}: the annotations of recipe {name} cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UserError(
                f"{where}: recipe {name} takes *{parameter.name}, which would swallow misspelt "
                f"options. Name each option with a type and a default."
            )
        if parameter.name not in hints or parameter.default is parameter.empty:
            raise UserError(
                f"{where}: option {parameter.name!r} of recipe {name} needs a type and a default, "
                f"as in {parameter.name}: int = 4."
            )
        parameters.append(Parameter(parameter.name, hints[parameter.name], parameter.default))
    return Recipe(name, function, where, is_own, tuple(parameters))


def _kind(value: object) -> str:
    if value is None:
        return "nothing (None)"
    if isinstance(value, types.GeneratorType):
        return "a generator"
    return f"{type(value).__name__} {value!r:.60}"
