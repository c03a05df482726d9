"""A function of tensors that launches hundreds of kernels, launched at once as a CUDA graph.

A micro-batch of a small model is over sooner on the GPU than Python has launched its kernels. The
first calls run as they are, which compiles what is compiled; then one is captured, and every later
one replays it with its own inputs copied to where the captured one read them.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

WARM_CALLS = 2
"""Calls before the one that is captured: the first compiles, the second runs what was compiled."""


class Replayed:
    """`function`, which returns nothing and changes tensors that stay where they are: gradients
    that exist, sums. It may wait for nothing on the host, and must do the same each time.

    What cannot be captured goes on without, and `warn` is told why. A captured pass keeps its
    memory between calls, until `forget`.
    """

    def __init__(self, function: Callable[..., None], warn: Callable[[str], None]) -> None:
        self._function = function
        self._warn = warn
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self.works = True
        """Whether calls are captured, or will be."""
        self.has_captured = False
        """Whether one has been, forgotten or not."""

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

    def forget(self) -> bool:
        """Capture anew after some more calls, as what it was captured with is gone. Whether there
        was anything to forget."""
        was_captured = self._graph is not None
        self._graph, self._inputs, self._calls = None, (), 0
        return was_captured

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        copies = tuple(given.clone() for given in inputs)
        try:
            self._graph = capture(lambda: self._function(*copies))
        except RuntimeError as error:
            self.works = False
            self._warn(f"a micro-batch {not_captured(error)}")
        else:
            self._inputs, self.has_captured = copies, True
            return
        free_after_failure()


def capture(function: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """What `function` launches, as a CUDA graph. It is not run.

    Raises the RuntimeError of CUDA or PyTorch for which it cannot be captured; out of memory among
    them, but not always by name, as memory cannot be freed within a capture.
    """
    graph, first = torch.cuda.CUDAGraph(), None
    # Where a capture cannot even be ended, its context leaves its own stream the current one.
    same_stream = torch.cuda.stream(torch.cuda.current_stream())
    try:
        # What other threads do meanwhile, as saving a checkpoint, is none of its business.
        with same_stream, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            try:
                function()
            except RuntimeError as error:
                first = error
                raise
    except RuntimeError as error:
        # Ending a broken capture raises once more, and says less.
        raise first or error from None
    finally:
        first = None  # else this frame and the error keep one another, and what was allocated
    return graph


def not_captured(error: RuntimeError) -> str:
    """What to tell of something that goes on without a graph."""
    reason, *_ = str(error).splitlines() or ["no reason given"]
    return f"cannot be captured as a CUDA graph, its kernels are launched one by one: {reason}"


def free_after_failure() -> None:
    """Give back what a broken capture had allocated, once nothing holds its error."""
    # Up to PyTorch 2.12 the allocator may take a broken capture for one under way, and refuse.
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()
