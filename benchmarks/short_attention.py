"""How long attention over short sequences takes as kernels, by the tiles they work on.

    python benchmarks/short_attention.py
    python benchmarks/short_attention.py --shapes 8,256,256,1,128 --other other.py

A shape is runs, batch, time, heads, head width; dropout of 0.1, bfloat16. Rows are tiles, fastest
last: microseconds of a forward and a backward pass (of all runs), and the products that they need
at least (2 and 5, causal) per second. `--other` times another version of the file of kernels
beside, and the largest difference of its results is told.
"""

import argparse
from pathlib import Path
from types import ModuleType

import torch
from gated_short_conv import largest_error, load, microseconds
from triton.runtime.errors import OutOfResources

from recallzoo.mixers._kernels import short_attention as kernel

SHAPES = ("16,512,64,1,64", "8,512,128,1,128", "8,256,256,1,128", "8,128,512,1,64")
"""Attention's cells of Figure 2 that are not wider than a kernel's heads."""
TILES = [
    {"BLOCK": block, "num_warps": warps, "num_stages": stages}
    for block in (32, 64, 128)
    for warps in (4, 8)
    for stages in (1, 2, 3)
]
RATE = 0.1


def measure_shape(modules: dict[str, ModuleType], shape: tuple[int, int, int, int, int]) -> None:
    R, B, T, H, K = shape
    torch.manual_seed(0)
    qkv = torch.randn(R * B, T, 3 * H * K, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(R, 3 * H * K, device="cuda")
    low, high = torch.randint(-(2**31), 2**31, (2, R), device="cuda", dtype=torch.int32)
    d_y = torch.randn(R * B, T, H * K, device="cuda", dtype=torch.bfloat16)
    product = R * B * H * T * T * K  # 2 operations, half of them causal
    wanted = None
    rows = []
    for label, module in modules.items():
        choose = getattr(module, "tile_of", None)
        for tile in [None, *(TILES if choose is not None else [])]:
            if choose is not None:
                module.tile_of = choose if tile is None else lambda *_, tile=tile: tile  # pyright: ignore[reportAttributeAccessIssue]
            try:
                y, normalizers = module.forward(qkv, bias, low, high, H, RATE)
                rest = (qkv, bias, y, normalizers, d_y, low, high, H, RATE)
                got = (y, module.backward(*rest))
                there = microseconds(lambda m=module: m.forward(qkv, bias, low, high, H, RATE))
                back = microseconds(lambda m=module, rest=rest: m.backward(*rest))
            except OutOfResources as error:  # more shared memory than a multiprocessor has
                print(f"  {label} {tile}: {error}")
                continue
            wanted = wanted or got
            rows.append((there + back, there, back, label, tile, largest_error(got, wanted)))
        if choose is not None:
            module.tile_of = choose  # pyright: ignore[reportAttributeAccessIssue]
    print(f"R={R} B={B} T={T} H={H} K={K}")
    for total, there, back, label, tile, error in sorted(rows, reverse=True):
        sizes = "as it is set" if tile is None else ", ".join(f"{n} {s}" for n, s in tile.items())
        print(
            f"  {label:5s} {sizes:38s} {there:7.1f} + {back:7.1f} = {total:7.1f} us, "
            f"{2 * product / there / 1e6:4.0f} and {5 * product / back / 1e6:4.0f} TFLOP/s; "
            f"differs from the first by {error:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="R,B,T,H,K")
    parser.add_argument("--other", type=Path, help="another file with forward and backward")
    options = parser.parse_args()
    modules = {} if options.other is None else {"other": load(options.other)}
    modules["this"] = kernel
    print(torch.cuda.get_device_name())
    for shape in options.shapes:
        R, B, T, H, K = map(int, shape.split(","))
        measure_shape(modules, (R, B, T, H, K))


if __name__ == "__main__":
    main()
