"""Synthetic recall tasks, one file each."""

from recallzoo.tasks._configure import option_types, registry, task
from recallzoo.tasks._contract import Batch, Task
from recallzoo.tasks._data import Data, Segment, Split, make_split, make_splits
from recallzoo.tasks._own import require_batch, require_equal, require_own_name, source_sha256

__all__ = [
    "Batch",
    "Data",
    "Segment",
    "Split",
    "Task",
    "make_split",
    "make_splits",
    "option_types",
    "registry",
    "require_batch",
    "require_equal",
    "require_own_name",
    "source_sha256",
    "task",
]
