"""Name -> class, by scanning a folder: adding a component is adding one file.

Every public module of the package is imported once, on first use, and every class in it
that derives from `base` and carries its own `name` is registered. Two classes with one name
are refused. A module whose name starts with an underscore is not scanned.
"""

import importlib
import pkgutil
from typing import Generic, TypeVar

from recallzoo.errors import UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """The components of one kind.

    >>> from recallzoo.mixers import registry
    >>> registry["attention"].__name__
    'Attention'
    """

    def __init__(self, package: str, base: type[T], kind: str) -> None:
        self._package = package
        self._base = base
        self._kind = kind
        self._classes: dict[str, type[T]] | None = None

    def _scan(self) -> dict[str, type[T]]:
        if self._classes is None:
            classes: dict[str, type[T]] = {}
            package = importlib.import_module(self._package)
            for info in pkgutil.iter_modules(package.__path__):
                if info.name.startswith("_"):
                    continue
                module = importlib.import_module(f"{self._package}.{info.name}")
                for value in vars(module).values():
                    if (
                        isinstance(value, type)
                        and issubclass(value, self._base)
                        and value.__module__ == module.__name__
                        and "name" in vars(value)
                    ):
                        name: str = vars(value)["name"]
                        if name in classes:
                            raise RuntimeError(
                                f"two {self._kind} classes are called {name!r}: "
                                f"{classes[name].__module__} and {value.__module__}"
                            )
                        classes[name] = value
            self._classes = dict(sorted(classes.items()))
        return self._classes

    def __getitem__(self, name: str) -> type[T]:
        classes = self._scan()
        if name not in classes:
            raise UnknownName(self._kind, name, classes)
        return classes[name]

    def __iter__(self):
        return iter(self._scan())

    def __contains__(self, name: object) -> bool:
        return name in self._scan()

    def items(self):
        return self._scan().items()
