"""Options of components: is a value of the declared type, and what to say if it is not."""

import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from recallzoo.errors import InvalidConfig, UnknownName

OptionValue = int | float | bool | str | None


def checked(name: str, value: Any, wanted: Any) -> Any:
    """`value` if it is of type `wanted`, whole numbers turned into floats where those are wanted.

    Raises InvalidConfig otherwise, and for a float that is infinite or not a number. So equal
    options are equal in type as well, and a configuration has one hash.
    """
    if not fits(value, wanted):
        raise InvalidConfig(
            f"{name} wants {describe_type(wanted)}, got {value!r} ({type(value).__name__})."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidConfig(f"{name} wants a finite number, got {value!r}.")
    if isinstance(value, int) and not isinstance(value, bool) and not fits(value, wanted, False):
        return float(value)
    return value


def fits(value: Any, wanted: Any, whole_is_float: bool = True) -> bool:
    """Whether a value is of a declared type: a class, a Literal or a union of these."""
    origin = typing.get_origin(wanted)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in typing.get_args(wanted))
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part, whole_is_float) for part in typing.get_args(wanted))
    if wanted is float:
        return isinstance(value, float) or (whole_is_float and fits(value, int))
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted in (None, type(None)):
        return value is None
    return isinstance(value, wanted) if isinstance(wanted, type) else True


def describe_type(wanted: Any) -> str:
    """A declared type in words."""
    if typing.get_origin(wanted) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(wanted)))
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(map(describe_type, typing.get_args(wanted)))
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False",
             list: "a list"}  # fmt: skip
    if wanted in (None, type(None)):
        return "None"
    return words.get(wanted) or getattr(wanted, "__name__", str(wanted))


def require_known(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise InvalidConfig, near names suggested, for an option that `owner` does not have."""
    known = list(known)
    for option in given:
        if option not in known:
            raise InvalidConfig(str(UnknownName(f"option of {owner}", option, known)))
