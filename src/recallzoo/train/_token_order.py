"""Which contexts a step trains on, and reading them ahead.

    position i of the run  ->  pass i // N,  context permutation(N, seed, pass)[i % N]

Step s takes positions [s G, (s + 1) G), a process its own stretch of them. So the data of a step is
a function of (seed, step) alone: not of the model, of the number of processes, or of where a run
was interrupted.

Letters  N contexts of the split, G contexts a step.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from recallzoo.random import permutation
from recallzoo.text import Contexts

READ_AHEAD = 3
"""Steps whose contexts are read before they are needed."""


class TokenOrder:
    """The contexts of every step."""

    def __init__(self, num_contexts: int, seed: int, global_batch: int) -> None:
        self.num_contexts = num_contexts
        self.seed = seed
        self.global_batch = global_batch
        self._orders: dict[int, np.ndarray] = {}

    def contexts_of(self, step: int) -> Integer[np.ndarray, "G"]:
        """Numbers of the contexts of a step, counted from 0, in order."""
        position = step * self.global_batch + np.arange(self.global_batch)
        passes, place = np.divmod(position, self.num_contexts)
        found = np.empty(self.global_batch, dtype=np.int64)
        for one in np.unique(passes):
            found[passes == one] = self._order(int(one))[place[passes == one]]
        return found

    def _order(self, which: int) -> np.ndarray:
        order = self._orders.get(which)
        if order is None:
            order = permutation(self.num_contexts, self.seed, "pretrain", which).numpy()
            # Replaced as a whole: the thread that reads ahead is not the only one that asks.
            before = {k: v for k, v in self._orders.items() if k == which - 1}
            self._orders = {**before, which: order}
        return order


class Batches:
    """The share of each step's contexts that falls to one process, read ahead by a thread."""

    def __init__(
        self,
        contexts: Contexts,
        order: TokenOrder,
        rank: int,
        world_size: int,
        pin_memory: bool,
    ) -> None:
        self._contexts = contexts
        self._order = order
        share = order.global_batch // world_size
        self._part = slice(rank * share, (rank + 1) * share)
        self._pin_memory = pin_memory

    def read(self, step: int) -> Int[Tensor, "B T"]:
        """This process's tokens of one step, one more than the context a row."""
        tokens = self._contexts.batch(self._order.contexts_of(step)[self._part]).tokens
        return tokens.pin_memory() if self._pin_memory else tokens

    def from_step(self, first: int, end: int) -> Iterator[Int[Tensor, "B T"]]:
        """The tokens of steps first .. end - 1. Errors of reading are raised where they are met."""
        with ThreadPoolExecutor(1, "recallzoo-batches") as pool:
            ahead: list[Future[torch.Tensor]] = [
                pool.submit(self.read, step) for step in range(first, min(end, first + READ_AHEAD))
            ]
            try:
                for step in range(first, end):
                    tokens = ahead.pop(0).result()
                    if step + READ_AHEAD < end:
                        ahead.append(pool.submit(self.read, step + READ_AHEAD))
                    yield tokens
            finally:
                for future in ahead:
                    future.cancel()
