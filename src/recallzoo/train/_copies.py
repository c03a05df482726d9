"""Copies of a model in several processes: equal at the start, gradients averaged once a step.

PyTorch's DistributedDataParallel averages in hooks of the last backward pass, which a pass captured
as a CUDA graph does not call. Averaged after it, gradients travel while nothing is computed: 1.4 GB
of a model of 360M, some milliseconds of a step of hundreds over NVLink, where launching the kernels
of uncaptured micro-batches doubled Hyena's step.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

ALIGNMENT = 128
"""Elements: a gradient begins at a multiple of them, so that kernels can read it in wide loads."""


def make_equal(model: nn.Module) -> None:
    """Give all processes the first one's weights, which one seed drew in each; buffers follow from
    the model's shape. A step of all processes."""
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), src=0)


class SharedGradients:
    """The gradients of float32 parameters in one tensor, which processes can average as one.

    Every gradient exists from the start and stays where it is: `clear` makes it zero.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        starts, size = [], 0
        for parameter in parameters:
            starts.append(size)
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        first = parameters[0]
        self._all: Tensor = torch.zeros(size, dtype=first.dtype, device=first.device)
        for parameter, start in zip(parameters, starts, strict=True):
            part = self._all[start : start + parameter.numel()]
            parameter.grad = part.view_as(parameter)

    def average(self) -> None:
        """Replace every gradient by its mean over processes. A step of all processes."""
        dist.all_reduce(self._all)
        self._all /= dist.get_world_size()

    def clear(self) -> None:
        """Make every gradient zero."""
        self._all.zero_()
