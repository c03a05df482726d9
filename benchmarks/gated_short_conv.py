"""How long Hyena's short filters and first gate take as a kernel, against what memory allows.

    python benchmarks/gated_short_conv.py --runs 8

Rows: microseconds a run for forward and backward, by tile; the bound reads each input and writes
each output once (forward 5, backward 8 tensors of [D, B, T]) at the speed of a copy measured in the
same process. Every tile is first compared with the form in PyTorch.
"""

import argparse

import torch

from recallzoo.mixers._gated_short_conv import in_pytorch
from recallzoo.mixers._kernels import gated_short_conv as kernel

TILES = [(256, 1), (512, 1), (512, 2), (512, 4), (1024, 2), (1024, 4), (2048, 8)]


def microseconds(function) -> float:
    for _ in range(3):
        function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 20 * 1000


def largest_error(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Relative to the largest number of each tensor."""
    return max(
        float((g.float() - w.float()).abs().max() / w.float().abs().max())
        for g, w in zip(got, wanted, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    for name, default in (("runs", 8), ("batch", 256), ("time", 256), ("width", 128), ("taps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    R, B, T, D, K = (getattr(options, n) for n in ("runs", "batch", "time", "width", "taps"))
    torch.manual_seed(0)
    p = torch.randn(R, 3 * D, B, T, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(R, 3 * D, *shape, device="cuda") for shape in ((), (K,), ())]
    given = [torch.randn(R, D, B, T, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    leaves = [t[0].clone().requires_grad_() for t in (p, *weights)]
    outputs = in_pytorch(*leaves)
    d_p, *sums = torch.autograd.grad(outputs, leaves, [g[0] for g in given])
    copy = microseconds(lambda: given[0].copy_(given[1])) / 2 / R
    print(f"{torch.cuda.get_device_name()}: R={R} B={B} T={T} D={D} K={K} bfloat16")
    print(f"memory allows: forward {5 * copy:.1f}, backward {8 * copy:.1f} us a run")
    for block, warps in TILES:
        kernel.FORWARD = kernel.BACKWARD = {"BLOCK": block, "num_warps": warps}
        forward = list(kernel.forward(p, *weights))
        d_all, d_weights = kernel.backward(p, *weights, *given)
        got = [d_all[0], d_weights[0, :, -1], d_weights[0, :, :K], d_weights[0, :, -2]]
        errors = (
            largest_error([y[0] for y in forward], list(outputs)),
            largest_error(got, [d_p, *sums]),
        )
        times = [
            microseconds(lambda: kernel.forward(p, *weights)) / R,
            microseconds(lambda: kernel.backward(p, *weights, *given)) / R,
        ]
        print(
            f"tile {block:4d}, {warps} warps: forward {times[0]:6.1f}, backward {times[1]:6.1f} us "
            f"a run; largest relative error {errors[0]:.1e}, {errors[1]:.1e}"
        )


if __name__ == "__main__":
    main()
