"""How an operator of our own is mapped over packed runs.

Such operators work on groups that have weights of their own, the first axis of every input and
output. So `torch.func.vmap` over R runs only makes more groups, or more members of each, and calls
the operator once.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def over_groups(operator: Callable[..., Any], *, dense: bool = True) -> Callable[..., Any]:
    """The batching rule: the mapped axis becomes part of the first one, in every tensor. `dense`
    if the operator reads its inputs as they lie in memory: a copy to contiguous memory that is
    asked for here is the compiler's to write, within an operator it would be one of its own."""

    def rule(info, in_dims, *arguments):
        mapped = [
            _joined(each, axis, info.batch_size, dense) if isinstance(each, Tensor) else each
            for each, axis in zip(arguments, in_dims, strict=True)
        ]
        found = operator(*mapped)
        if isinstance(found, Tensor):
            return found.unflatten(0, (info.batch_size, -1)), 0
        return tuple(t.unflatten(0, (info.batch_size, -1)) for t in found), (0,) * len(found)

    return rule


def _joined(tensor: Tensor, axis: int | None, num_runs: int, dense: bool) -> Tensor:
    by_run = tensor.expand(num_runs, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    joined = by_run.flatten(0, 1)
    return joined.contiguous() if dense else joined
