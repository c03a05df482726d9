"""No preset's forward and backward pass waits for the host, or it could not be captured as a CUDA
graph (`train/_replay.py`). Told on the CPU, by the operators that are called."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recallzoo.mixers import _selective
from recallzoo.mixers._softmax import PLAIN_MAX_SEQ_LEN
from recallzoo.presets import preset, registry
from recallzoo.train._large_model import TrainingModel, build_model

WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "_assert_async",  # numbers are read
    "nonzero", "nonzero_numpy", "argwhere", "masked_select", "bincount", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "unique_dim_consecutive",  # values decide the shape
    "lift_fresh",  # a number of Python's is brought to the device
}  # fmt: skip
"""Operators of PyTorch that a CUDA device and the host wait for one another in."""
NAMES = [name for name in registry if name.endswith("-70m")]
"""One of each mixer and of each hybrid."""
READ_ON_THE_CPU = {f"base_conv_{s}-70m" for s in ("random", "repeated", "topk", "learned")}
"""On long sequences these read how many rows are selected, to gather no more. On CUDA the presets'
heads go through FlexAttention, which needs no such number, and nothing is read while a graph is
captured (`_rows.can_look`)."""


class Waited(Exception):
    """An operator that waits was called."""


class NoWaiting(TorchDispatchMode):
    """Raises Waited at operators that wait. It does not see into operators of our own, which on
    the CPU are single products."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITING or by_mask(name, args) or by_counts(name, kwargs):
            raise Waited(str(func))
        return func(*args, **kwargs)


def by_mask(name: str, args: Any) -> bool:
    """Whether this is an index with a mask, whose number of elements is a value."""
    if not name.strip("_").startswith(("index", "unsafe_index")) or len(args) < 2:
        return False
    indices = args[1] if isinstance(args[1], list | tuple) else ()
    masks = (torch.bool, torch.uint8)
    return any(isinstance(one, Tensor) and one.dtype in masks for one in indices)


def by_counts(name: str, kwargs: dict[str, Any]) -> bool:
    return name == "repeat_interleave" and kwargs.get("output_size") is None


def train_once(name: str, context: int) -> None:
    """A forward and backward pass as pretraining does it, without a compiler."""
    has_heads = any("num_heads" in dict(m.options) for m in preset(name).model.mixers)
    small = preset(name).resized(64 if has_heads else 16, 2, context)
    model = TrainingModel(build_model(small.model, 20, context, 0), 20)
    tokens = torch.randint(0, 20, (2, context + 1), generator=torch.Generator().manual_seed(0))
    key = torch.tensor(1)
    with NoWaiting():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens, key)
        loss.backward()
    weights = model.model.embedding.tokens.weight
    assert weights.grad is not None
    assert bool(weights.grad.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_no_preset_waits_on_short_sequences(name):
    train_once(name, 40)


@pytest.mark.parametrize("name", NAMES)
def test_only_selections_wait_on_long_sequences_and_on_the_cpu_alone(name, monkeypatch):
    context = PLAIN_MAX_SEQ_LEN + 8
    if name in READ_ON_THE_CPU:
        with pytest.raises(Waited, match="_local_scalar_dense"):
            train_once(name, context)
        monkeypatch.setattr(_selective, "can_look", lambda _: False)  # as while it is captured
    train_once(name, context)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[: x.long().amax()],
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), torch.ones(())),
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.equal(x, x),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    ],
)
def test_what_waits_is_seen(waits: Callable[[Tensor], Any]):
    x = torch.tensor([1.0, 0.0, 2.0])
    with NoWaiting(), pytest.raises(Waited):
        waits(x)
