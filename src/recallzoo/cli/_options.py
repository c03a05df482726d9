"""Options of commands: typed, checked, explained; by tyro."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import tyro

from recallzoo.errors import InvalidConfig, UserError

T = TypeVar("T")


def parse(options: type[T], argv: Sequence[str], command: str, help_text: str | None) -> T:
    """Fill a dataclass from arguments. Prints help or what is wrong, and exits, as asked.

    tyro suggests near names for misspelt options and exits with code 2.
    """
    return tyro.cli(
        options,
        args=list(argv),
        prog=f"recallzoo {command}",
        description=inspect.cleandoc(help_text or ""),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def require_once(option: str, argv: Sequence[str], why: str) -> None:
    """Raise UserError for an option that is given again, of which tyro would take the last."""
    times = sum(argument.partition("=")[0] == option for argument in argv)
    if times > 1:
        raise UserError(f"{option} is given {times} times: {why}. Give it once.")


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
