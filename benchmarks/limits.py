"""What a device can do at best, and how much of it a training step needs at least."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from recallzoo.model import LanguageModel
from recallzoo.tasks import Batch


def measured_peaks(
    device: torch.device, precision: str, clock: Callable[[], float]
) -> dict[str, float]:
    """FLOP/s of one square matrix product, and bytes/s, read and written, of one copy: the best
    of several, after a first."""
    is_gpu = device.type == "cuda"
    size, num_bytes = (8192, 2**31) if is_gpu else (2048, 2**28)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return {
        "matrix_product_flops_per_second": 2 * size**3 / _best(lambda: a @ b, device, clock),
        "copy_bytes_per_second": 2 * num_bytes / _best(lambda: target.copy_(source), device, clock),
    }


def _best(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    seconds = []
    for _ in range(8):
        synchronise(device)
        start = clock()
        work()
        synchronise(device)
        seconds.append(clock() - start)
    return min(seconds[1:])


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_flops(model: LanguageModel, batch: Batch, batch_size: int) -> int:
    """FLOPs of the matrix products of one training step of one run, counted by PyTorch over
    a few examples of `batch` and over twice as many, and extended linearly to `batch_size`:
    filters, which do not grow with the batch, are counted once. Kernels of our own and FFTs are
    not seen by the counter."""
    few = len(batch) // 2
    one, two = (_count(model, batch, num) for num in (few, 2 * few))
    return round(one + (two - one) * (batch_size - few) / few)


def _count(model: LanguageModel, batch: Batch, num_examples: int) -> int:
    rows = batch.rows(torch.arange(num_examples, device=batch.tokens.device))
    with FlopCounterMode(display=False) as counter:
        model.loss(rows.tokens, rows.query_positions, rows.answers).backward()
    model.zero_grad()
    return counter.get_total_flops()


def step_bytes(model: LanguageModel, batch_size: int, seq_len: int, element_bytes: int) -> int:
    """Bytes that one training step of one run must move at the least, estimated:

    32 a parameter (AdamW in float32 reads and writes it and two moments; its gradient is written
    and read once), and the residual stream [B, T, D] written and read once by every layer, forward
    and backward. Logits and everything inside a layer count as never leaving the chip.
    """
    stream = batch_size * seq_len * model.config.d_model * element_bytes
    return 32 * model.num_parameters() + 4 * (model.config.num_layers + 1) * stream
