"""Options of commands: typed, checked, explained; by tyro."""

import inspect
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import takewhile
from typing import Annotated, Any, TypeVar

import tyro

from recallzoo.errors import InvalidConfig, UserError

T = TypeVar("T")


def parse(options: type[T], argv: Sequence[str], command: str, help_text: str | None) -> T:
    """Fill a dataclass from arguments. Prints help or what is wrong, and exits, as asked.

    tyro suggests near names for misspelt options and exits with code 2. UserError for an option
    of several values that is given again, unless it is declared with UseAppendAction.
    """
    for option in _of_several_values(options):
        require_once(
            option,
            argv,
            "the last would replace what was given before",
            f"Give all values after one {option}.",
        )
    return tyro.cli(
        options,
        args=list(argv),
        prog=f"recallzoo {command}",
        description=inspect.cleandoc(help_text or ""),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def require_once(
    option: str, argv: Sequence[str], why: str, instead: str = "Give it once."
) -> None:
    """Raise UserError for an option that is given again, of which tyro would take the last."""
    given = takewhile(lambda argument: argument != "--", argv)
    # tyro takes --an_option for --an-option, and knows no abbreviations.
    times = sum(argument.partition("=")[0].replace("_", "-") == option for argument in given)
    if times > 1:
        raise UserError(f"{option} is given {times} times: {why}. {instead}")


def _of_several_values(options: type) -> Iterator[str]:
    """Options whose values all stand after one name, those of nested dataclasses included."""
    for name, kind in typing.get_type_hints(options, include_extras=True).items():
        markers = getattr(kind, "__metadata__", ())
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _of_several_values(kind)
        elif _is_collection(kind) and not (
            tyro.conf.UseAppendAction in markers or tyro.conf.Positional in markers
        ):
            yield f"--{name.replace('_', '-')}"


def _is_collection(kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(map(_is_collection, typing.get_args(kind)))
    if origin is Annotated:
        return _is_collection(typing.get_args(kind)[0])
    found = origin or kind
    return isinstance(found, type) and issubclass(found, Collection) and not issubclass(found, str)


@contextmanager
def plain_mistakes() -> Iterator[None]:
    """For a dataclass that checks its fields: a mistake is our message, not tyro's box around it,
    which it draws for every ValueError."""
    try:
        yield
    except InvalidConfig as error:
        raise UserError(str(error)) from error


def plain(value: Any) -> Any:
    """An option's default as JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)
