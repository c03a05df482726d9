"""How long Hyena's short filters and first gate take as a kernel, against what memory allows.

    python benchmarks/gated_short_conv.py
    python benchmarks/gated_short_conv.py --shapes 1,864,16,2048 --dtype float32
    python benchmarks/gated_short_conv.py --other other.py     # beside another version of the file

A shape is runs, width, batch, time. Rows are tiles, fastest last: microseconds of a call (of all
runs); the speed that this means if each input is read once and each output is written once (forward
5, backward 8 tensors of [R, D, B, T]); its share of 3.35 TB/s, which is what an H100's memory is
said to move. A copy measured in the same process tells what can be had. Results of the first run
are compared with the form in PyTorch, and a second call must give the same bits. With `--other`,
the tiles of another file of kernels, which may name their sizes otherwise, are timed beside.
"""

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from recallzoo.mixers._gated_short_conv import in_pytorch
from recallzoo.mixers._kernels import gated_short_conv as kernel

SHAPES = ("1,864,16,2048", "1,704,32,1024", "8,128,256,256")
"""Hyena at 125M and 70M as they are pretrained, and a pack of small runs."""
PEAK_BYTES_PER_SECOND = 3.35e12
CALLS = 20

Tile = dict[str, int]
FORWARD_TILES: list[Tile] = [
    *({"CHUNKS": c, "num_warps": w} for c, w in ((32, 1), (64, 2), (128, 4), (256, 8), (256, 4))),
    *({"BLOCK": b, "num_warps": w} for b, w in ((512, 2), (1024, 2), (1024, 4), (2048, 8))),
]
BACKWARD_TILES: list[Tile] = [
    *({"CHUNKS": 32, "STEPS": steps, "num_warps": 1} for steps in (1, 2, 4, 8, 16, 32)),
    *({"CHUNKS": 64, "STEPS": steps, "num_warps": 2} for steps in (1, 4, 8, 16)),
    *({"CHUNKS": 128, "STEPS": steps, "num_warps": 4} for steps in (1, 4, 8, 16)),
    *({"CHUNKS": 64, "STEPS": steps, "num_warps": 1} for steps in (4, 8)),
    *({"BLOCK": b, "num_warps": w} for b, w in ((256, 1), (512, 1), (512, 2), (512, 4), (1024, 4))),
]


def microseconds(function: Callable[[], object]) -> float:
    for _ in range(3):
        function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / CALLS * 1000


def largest_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Relative to the largest number of each tensor."""
    return max(
        float((g.float() - w.float()).abs().max() / w.float().abs().max())
        for g, w in zip(got, wanted, strict=True)
    )


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("other_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(
    modules: dict[str, ModuleType],
    constant: str,
    tiles: list[Tile],
    call: Callable[[ModuleType], tuple[Tensor, Tensor]],
    first_run: Callable[[tuple[Tensor, Tensor]], list[Tensor]],
    wanted: list[Tensor],
    moved_bytes: int,
) -> None:
    """Print a row for each tile of each module; `constant` names the module's tile."""
    rows = []
    for label, module in modules.items():
        default = getattr(module, constant)
        for tile in [default, *(t for t in tiles if t.keys() == default.keys() and t != default)]:
            setattr(module, constant, tile)
            got = call(module)
            again = call(module)
            same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
            error = largest_error(first_run(got), wanted)
            del got, again
            time_us = microseconds(lambda module=module: call(module))
            sizes = ", ".join(f"{name} {size}" for name, size in tile.items())
            rows.append((time_us, label, sizes, tile is default, error, same))
        setattr(module, constant, default)
    for time_us, label, sizes, is_default, error, same in sorted(rows, reverse=True):
        speed = moved_bytes / time_us * 1e6
        print(
            f"  {constant.lower():8s} {label:5s} {sizes:35s} {time_us:7.1f} us "
            f"{speed / 1e9:6.0f} GB/s {speed / PEAK_BYTES_PER_SECOND:4.0%} of 3.35 TB/s; "
            f"largest relative error {error:.1e}"
            f"{'' if same else '; NOT THE SAME BITS TWICE'}{'  (as it is set)' * is_default}"
        )


def measure_shape(
    modules: dict[str, ModuleType], R: int, D: int, B: int, T: int, K: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    p = torch.randn(R, 3 * D, B, T, device="cuda", dtype=dtype)
    weights = [torch.randn(R, 3 * D, *shape, device="cuda") for shape in ((), (K,), ())]
    given = [torch.randn(R, D, B, T, device="cuda", dtype=dtype) for _ in range(2)]

    leaves = [t[0].clone().requires_grad_() for t in (p, *weights)]
    outputs = in_pytorch(*leaves)
    gradients = list(torch.autograd.grad(outputs, leaves, [g[0] for g in given]))
    outputs = [y.detach() for y in outputs]

    copied_bytes = 2 * given[0].nbytes
    target = torch.empty_like(given[0])
    copy_us = microseconds(lambda: target.copy_(given[0]))
    print(f"R={R} D={D} B={B} T={T} K={K} {str(dtype).removeprefix('torch.')}")
    print(
        f"  copy: {copied_bytes / copy_us / 1e3:.0f} GB/s, by which forward would take "
        f"{2.5 * copy_us:.1f} us and backward {4 * copy_us:.1f} us"
    )

    def first_gradients(got: tuple[Tensor, Tensor]) -> list[Tensor]:
        d_p, sums = (t[0] for t in got)
        return [d_p, sums[:, -1], sums[:, :K], sums[:, -2]]

    one = given[0].nbytes
    measure(
        *(modules, "FORWARD", FORWARD_TILES, lambda module: module.forward(p, *weights)),
        *(lambda got: [y[0] for y in got], outputs, 5 * one),
    )
    measure(
        *(modules, "BACKWARD", BACKWARD_TILES, lambda m: m.backward(p, *weights, *given)),
        *(first_gradients, gradients, 8 * one),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="R,D,B,T")
    parser.add_argument("--taps", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--other", type=Path, help="another file with forward and backward")
    options = parser.parse_args()
    modules = {"this": kernel}
    if options.other is not None:
        modules["other"] = load(options.other)
    print(torch.cuda.get_device_name())
    for shape in options.shapes:
        R, D, B, T = map(int, shape.split(","))
        measure_shape(modules, R, D, B, T, options.taps, getattr(torch, options.dtype))


if __name__ == "__main__":
    main()
