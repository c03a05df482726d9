"""Progress bars, shown on a terminal only."""

from collections.abc import Iterable
from typing import Any


def bar(
    items: Iterable[Any] | None = None, *, what: str, unit: str, progress: bool, **options: Any
) -> Any:
    """A tqdm bar over `items`, or to be updated by hand; silent without `progress`."""
    if items is not None and not progress:
        return items
    from tqdm import tqdm  # counting without a bar, reading and labelling do without it

    return tqdm(items, desc=what, unit=unit, disable=None if progress else True, **options)
