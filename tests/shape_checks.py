"""The checker of the second test pass: annotated shapes and dtypes.

Used by `make test-shapes`. A call is checked, with what it returns, unless one of the same function
with arguments of the same kinds was: tensors of equal shapes and dtypes, equal numbers and words,
the same objects. Signatures without a tensor shape are left alone: what they are given
by mistake is the business of the messages that the first pass tests. jaxtyping would wrap them
nevertheless, and bind their arguments at every call, which was most of this pass's time; so its
decorator is replaced by one that asks first.
"""

import dataclasses
import functools
import inspect
import itertools
import typing
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jaxtyping
import torch
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
    if not _states_shapes(function):
        return function
    checked = wrap(function, typechecker=typechecker)
    return _once_a_kind(function, checked) if inspect.isfunction(function) else checked


def _once_a_kind(function: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    """`checked` where arguments of these kinds are new, `function` where they have passed."""
    passed: set[Hashable] = set()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            kinds = _kind(args), _kind(kwargs)
            has_passed = kinds in passed
        except TypeError:  # something can be referred to neither by its value nor weakly
            return checked(*args, **kwargs)
        if has_passed:
            return function(*args, **kwargs)
        result = checked(*args, **kwargs)
        passed.add(kinds)
        return result

    return call


_alive: dict[int, tuple[weakref.ref[Any], int]] = {}
"""By address, objects that were arguments and a number of each, as addresses are used again."""
_numbers = itertools.count()


def _kind(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if value is None or isinstance(value, bool | int | str | torch.dtype):
        return type(value), value
    if isinstance(value, float):
        return float
    if isinstance(value, tuple | list):
        return type(value), *map(_kind, value)
    if isinstance(value, dict):
        return dict, *((name, _kind(one)) for name, one in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value))
        return type(value), *(_kind(getattr(value, name)) for name in names)
    known, number = _alive.get(id(value), (None, 0))
    if known is None or known() is not value:
        number = next(_numbers)
        _alive[id(value)] = weakref.ref(value), number
    return type(value), number


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
