"""A function of tensors that launches hundreds of kernels, launched at once as a CUDA graph.

A micro-batch of a small model is over sooner on the GPU than Python has launched its kernels. The
first calls run as they are, which compiles what is compiled; then one is captured, and every later
one replays it with its own inputs copied to where the captured one read them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_CALLS = 2
"""Calls before the one that is captured: the first compiles, the second runs what was compiled."""


class Replayed:
    """`function`, which returns nothing and changes tensors that stay where they are: gradients
    that exist, sums. It may wait for nothing on the host, and must do the same each time.

    What cannot be captured goes on without, and `warn` is told why.
    """

    def __init__(self, function: Callable[..., None], warn: Callable[[str], None]) -> None:
        self._function = function
        self._warn = warn
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self.works = True
        """Whether calls are captured, or will be."""

    def __call__(self, *inputs: Tensor) -> None:
        if self._graph is None and self.works and self._calls >= WARM_CALLS:
            self._capture(inputs)
        if self._graph is None:
            self._calls += 1
            self._function(*inputs)
            return
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()

    def forget(self) -> None:
        """Capture anew after some more calls, as what it was captured with is gone."""
        self._graph, self._inputs, self._calls = None, (), 0

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        graph, copies = torch.cuda.CUDAGraph(), tuple(given.clone() for given in inputs)
        try:
            # What other threads do meanwhile, as saving a checkpoint, is none of its business.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._function(*copies)
        except RuntimeError as error:  # of CUDA, out of memory among them
            self.works = False
            self._warn(
                f"a micro-batch cannot be captured as a CUDA graph, its kernels are launched one "
                f"by one: {str(error).splitlines()[0]}"
            )
            torch.cuda.empty_cache()
            return
        self._graph, self._inputs = graph, copies
