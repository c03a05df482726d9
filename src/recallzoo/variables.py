"""Environment variables for as long as something lasts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def environment_with(**changed: str) -> Iterator[None]:
    """The environment of this process, and of what it starts, with other values."""
    before = {name: os.environ.get(name) for name in changed}
    try:
        os.environ.update(changed)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
