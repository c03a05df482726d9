"""The checker of the second test pass: annotated shapes and dtypes, at every call.

Used by `make test-shapes`. Signatures without a tensor shape are left alone: what they are given
by mistake is the business of the messages that the first pass tests.
"""

import typing
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check calls of `function` if it states a tensor's shape."""
    if any(_has_shape(hint) for hint in function.__annotations__.values()):
        return _check(function)
    return function


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_has_shape(part) for part in typing.get_args(hint))
