"""The checker of the second test pass: annotated shapes and dtypes, at every call.

Used by `make test-shapes`. Signatures without a tensor shape are left alone: what they are given
by mistake is the business of the messages that the first pass tests. jaxtyping would wrap them
nevertheless, and bind their arguments at every call, which was most of this pass's time; so its
decorator is replaced by one that asks first.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
wrap = jaxtyping.jaxtyped


def checker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check calls of `function` if it states a tensor's shape."""
    return _check(function) if _states_shapes(function) else function


def wrap_if_shapes_are_stated(function: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """jaxtyping's decorator, for what states a tensor's shape."""
    if function is None:
        return functools.partial(wrap_if_shapes_are_stated, typechecker=typechecker)
    return wrap(function, typechecker=typechecker) if _states_shapes(function) else function


def _states_shapes(what: Any) -> bool:
    if isinstance(what, property):
        return any(_states_shapes(part) for part in (what.fget, what.fset, what.fdel))
    if isinstance(what, classmethod | staticmethod):
        return _states_shapes(what.__func__)
    if inspect.isclass(what):
        return dataclasses.is_dataclass(what) and _states_shapes(what.__init__)
    return any(_has_shape(hint) for hint in getattr(what, "__annotations__", {}).values())


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_has_shape(part) for part in typing.get_args(hint))


jaxtyping.jaxtyped = wrap_if_shapes_are_stated
