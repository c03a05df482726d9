"""Tasks that are no file of this package: told apart by their source, and checked as they are used,
where the contract suite checks those of the package."""

import functools
import hashlib
import inspect

import torch

from recallzoo.errors import InvalidConfig
from recallzoo.tasks._configure import registry
from recallzoo.tasks._contract import Batch, Task

_NOT_OWN = ("recallzoo", "builtins", "abc", "typing")


@functools.cache
def source_sha256(cls: type[Task]) -> str | None:
    """A hash of the source of a task's class and of those that it derives from; None for a task of
    the package.

    So two tasks of one name, or one before and after a change, share no results. Functions that
    they call elsewhere are not in it: `version` goes up when these change. InvalidConfig where
    Python does not know the source.
    """
    if cls.name in registry and registry[cls.name] is cls:
        return None
    own = [c for c in cls.__mro__ if c.__module__.partition(".")[0] not in _NOT_OWN]
    try:
        source = "\n".join(inspect.getsource(c) for c in own)
    except (OSError, TypeError) as error:
        raise InvalidConfig(
            f"the source of task class {cls.__name__} cannot be read ({error}), so its results "
            f"could not be told from another's. Define it in a file."
        ) from error
    return hashlib.sha256(source.encode()).hexdigest()


def require_own_name(task: Task) -> None:
    """InvalidConfig for a user's task that is called as one of the package, as one is that derives
    from it and names itself no more: tables and charts could not tell them apart."""
    if source_sha256(type(task)) is not None and task.name in registry:
        raise InvalidConfig(
            f"task class {type(task).__name__} is called {task.name!r}, which is a task of the "
            f"package. Give it a name of its own: name = ..."
        )


def require_batch(task: Task, batch: object, num_rows: int) -> None:
    """InvalidConfig unless these are `num_rows` examples as the task says that they are."""

    def require(condition: object, wanted: str) -> None:
        if not condition:
            raise InvalidConfig(f"task {task.name}: generate must return {wanted}.")

    require(isinstance(batch, Batch), f"a Batch, not {type(batch).__name__}")
    assert isinstance(batch, Batch)
    streams = (task.num_streams,) if task.num_streams > 1 else ()
    asked = (num_rows, task.num_queries)
    wanted = {
        "tokens": (batch.tokens, (num_rows, task.seq_len, *streams), task.vocab_size),
        "query_positions": (batch.query_positions, asked, task.seq_len),
        "answers": (batch.answers, asked, task.vocab_size),
        **{f"slices[{name!r}]": (values, asked, None) for name, values in batch.slices.items()},
    }
    for name, (values, shape, limit) in wanted.items():
        is_whole = isinstance(values, torch.Tensor) and values.dtype == torch.int64
        found = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        require(is_whole, f"{name} of whole numbers (int64), not {found}")
        sizes = ", ".join(map(str, shape))
        require(values.shape == shape, f"{name} of shape [{sizes}], not {[*values.shape]}")
        if limit is not None and values.numel():
            low, high = int(values.min()), int(values.max())
            require(low >= 0 and high < limit, f"{name} from 0 to {limit - 1}, not {low} to {high}")


def require_equal(task: Task, batch: Batch, again: Batch) -> None:
    """InvalidConfig unless the same rows were made twice alike."""
    parts = {"tokens": "tokens", "query_positions": "query positions", "answers": "answers"}
    for name, words in parts.items():
        if not torch.equal(getattr(batch, name), getattr(again, name)):
            raise InvalidConfig(
                f"task {task.name}: generate made other {words} for the same rows, in other "
                f"company. Draw from the RowRandom that it is given and from nothing else."
            )
