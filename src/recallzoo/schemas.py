"""Is what a file holds of the shape that is read of it, and what to say if it is not.

A shape is a type as options have them; a dict of names with shapes, ... for all other names;
`[shape]`, a list of at least one; `[shape, ...]`, a list; `(shape, None)`, which may be null. What
a shape does not name may be anything.
"""

import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from recallzoo.errors import StoreError
from recallzoo.options import describe_type, fits


def read_described(path: Path, shape: Any, remedy: str, optional: Collection[str] = ()) -> Any:
    """Read JSON. StoreError, ending in `remedy`, if it cannot be read or is of another shape."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}. {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: it is not valid JSON ({error}). {remedy}") from error
    wrong = mistake(content, shape, optional)
    if wrong is not None:
        raise StoreError(f"{path} is damaged: {wrong}. {remedy}")
    return content


def mistake(content: Any, shape: Any, optional: Collection[str] = ()) -> str | None:
    """What keeps content from being of a shape, such as `config.seed is "0", where a whole number
    is wanted`; None if nothing does. Names that are `optional` may be absent."""
    return next(_mistakes(content, shape, optional, ""), None)


def is_finite(value: Any) -> bool:
    """False for what is no number in JSON, and for one that is too large for a float."""
    return not isinstance(value, int | float) or abs(value) <= sys.float_info.max


def wanted(name: str, value: Any, what: str) -> str:
    """What to say of a value that should be another."""
    text = json.dumps(value, default=str)
    short = text if len(text) <= 40 else f"{text[:37]}..."
    return f"{name or 'it'} is {short}, where {what} wanted"


def _mistakes(value: Any, shape: Any, optional: Collection[str], name: str) -> Iterator[str]:
    if isinstance(shape, tuple):
        if value is not None:
            yield from _mistakes(value, shape[0], optional, name)
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            yield wanted(name, value, "names with values are")
            return
        others = [key for key in value if key not in shape] if ... in shape else []
        for key in (*(key for key in shape if key is not ...), *others):
            inner = f"{name}.{key}".lstrip(".")
            if key in value:
                yield from _mistakes(value[key], shape.get(key, shape.get(...)), optional, inner)
            elif key not in optional:
                yield f"{inner} is missing"
    elif isinstance(shape, list):
        if not isinstance(value, list) or not (value or ... in shape):
            yield wanted(name, value, "a list is" if ... in shape else "a list of at least one is")
            return
        for number, one in enumerate(value):
            yield from _mistakes(one, shape[0], optional, f"{name}[{number}]")
    elif not fits(value, shape):
        yield wanted(name, value, f"{describe_type(shape)} is")
    elif not is_finite(value):
        yield wanted(name, value, "a finite number is")
