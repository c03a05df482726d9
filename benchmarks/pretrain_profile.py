"""Where the time of a pretraining step goes: kernels, and how long the device waits.

    python benchmarks/pretrain_profile.py attention-125m
    python benchmarks/pretrain_profile.py attention-360m hyena-360m --micro-batch 8 --out p.json

The steps are those of `recallzoo pretrain` on one device, without its data and log: gradients in
micro-batches, clipping, AdamW. After `--warmup` steps, some are timed by the clock, and some are
recorded by PyTorch's profiler. Printed a step: milliseconds by kind of kernel and by kernel, and
what is left of the clock's time, in which no kernel ran.
"""

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import text_speed
import torch
from torch.profiler import ProfilerActivity, profile

from recallzoo.files import write_json
from recallzoo.provenance import environment
from recallzoo.train._flops import flops_per_token, peak_flops
from recallzoo.train._large_model import Processes
from recallzoo.train._pretrain_engine import Engine
from recallzoo.train._pretrain_options import PretrainOptions
from recallzoo.train._pretrain_plan import make_plan

KINDS = {
    "attention": r"flash|fmha|attention|sdpa",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|_mm_|addmm|bmm",
    "optimiser": r"adam|multi_tensor|foreach",
    "Fourier transforms": r"fft",
    "copies": r"memcpy|memset|copy",
    "compiled": r"^triton_",
}
"""Kind -> what its kernels' names match; the first that matches has it."""


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


def measure(args: argparse.Namespace, preset: str, data: Path) -> dict[str, Any]:
    """Time and profile one preset."""
    options = PretrainOptions(
        preset=preset,
        data=data,
        out=data / "unused",
        d_model=args.d_model,
        num_layers=args.num_layers,
        context=args.context,
        global_batch=args.global_batch,
        micro_batch=args.micro_batch,
        steps=1_000,
        repeat_data=True,
        precision=args.precision,
        compile=args.compile,
        checkpoint_activations=args.checkpoint_activations,
    )
    plan = make_plan(options)
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    notes: list[str] = []
    engine = Engine(options, plan, Processes(0, 1, device), args.micro_batch, notes.append)
    tokens = plan.contexts.batch(range(args.global_batch)).tokens
    count = 0

    def step() -> float:
        nonlocal count
        began = time.perf_counter()
        engine.gradients(count, tokens)
        engine.update(count)
        if on_cuda:
            torch.cuda.synchronize()
        count += 1
        return time.perf_counter() - began

    for _ in range(args.warmup):
        step()
    seconds = statistics.median(step() for _ in range(args.steps))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(args.profiled):
            step()
    name = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    kernels = [
        {"kernel": event.key, "ms": getattr(event, name) / 1000 / args.profiled,
         "times": event.count / args.profiled}
        for event in profiler.key_averages()
        if getattr(event, name) and (not on_cuda or str(event.device_type).endswith("CUDA"))
    ]  # fmt: skip
    kernels.sort(key=lambda one: -one["ms"])
    kinds = dict.fromkeys([*KINDS, "other"], 0.0)
    for one in kernels:
        kinds[kind_of(one["kernel"])] += one["ms"]
    rate = args.global_batch * args.context / seconds
    flops = flops_per_token(plan.preset.model, plan.data.vocab_size, args.context)
    peak = peak_flops(device)
    return {
        "preset": preset,
        "parameters": engine.num_parameters,
        "tokens_per_second": rate,
        "mfu": None if peak is None else flops * rate / peak,
        "step_ms": 1000 * seconds,
        "kernels_ms": sum(one["ms"] for one in kernels),
        "kinds_ms": kinds,
        "kernels": kernels[: args.top],
        "compile": engine.compiled,
        "notes": notes,
    }


def show(found: dict[str, Any]) -> None:
    """Print what was found of a preset."""
    idle = found["step_ms"] - found["kernels_ms"]
    mfu = "" if found["mfu"] is None else f", MFU {100 * found['mfu']:.1f} %"
    print(
        f"\n{found['preset']}: {found['tokens_per_second']:,.0f} tokens/s{mfu}, "
        f"{found['step_ms']:.1f} ms a step, {idle:.1f} ms of it without a kernel, "
        f"compiled: {found['compile']}"
    )
    for note in found["notes"]:
        print(f"note: {note}")
    for kind, ms in found["kinds_ms"].items():
        if ms:
            print(f"  {ms:9.2f} ms  {kind}")
    for one in found["kernels"]:
        print(f"  {one['ms']:9.2f} ms {one['times']:7.0f} x  {one['kernel'][:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("presets", nargs="+")
    add("--context", type=int, default=2048)
    add("--micro-batch", type=int, default=16)
    add("--global-batch", type=int, default=32)
    add("--warmup", type=int, default=5, help="steps before anything is measured")
    add("--steps", type=int, default=10, help="steps timed by the clock")
    add("--profiled", type=int, default=2, help="steps recorded by the profiler")
    add("--top", type=int, default=30, help="kernels to keep")
    add("--d-model", type=int)
    add("--num-layers", type=int)
    add("--vocab-size", type=int, default=50_257)
    add("--compile", default="auto", choices=["auto", "blocks", "model", "none"])
    add("--precision", default="bf16", choices=["bf16", "fp32"])
    add("--checkpoint-activations", action="store_true")
    add("--out", type=Path, help="where to write JSON")
    args = parser.parse_args()
    if args.global_batch % args.micro_batch:
        parser.error(f"--global-batch {args.global_batch} is no multiple of --micro-batch.")
    on_cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "device": torch.cuda.get_device_name() if on_cuda else "CPU",
        "provenance": environment(),
        "presets": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        text_speed.VOCAB_SIZE = args.vocab_size
        number = args.global_batch * (args.context + 1) + 4 * args.context
        data = Path(temporary) / "data"
        text_speed.zipf_data(data, max(number, 10 * text_speed.DOCUMENT_TOKENS))
        for preset in args.presets:
            found["presets"].append(measure(args, preset, data))
            show(found["presets"][-1])
            if args.out is not None:
                write_json(args.out, found)


if __name__ == "__main__":
    main()
