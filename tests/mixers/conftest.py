"""Triton's interpreter, as its kernels here need it."""

import functools
import importlib.util
import inspect
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter makes loop bounds of arrays of one number, which NumPy 2.4 refuses."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(interpreter, "_patch_builtin", _patch_builtin)


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """The interpreter's own, but for what it looks at: all of a package at each call of a kernel
    takes longer than many kernels do."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    for name in _builtins(package):
        member = getattr(package, name)
        if is_builtin(member):  # not patched already, under another of the package's names
            interpreter._patch_attr(package, name, member, builder, scope)


@functools.cache
def _builtins(package: Any) -> list[str]:
    from triton.language.core import is_builtin

    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]
