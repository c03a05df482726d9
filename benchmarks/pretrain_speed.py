"""Speed and memory of pretraining, beside nanoGPT's training loop and a plain Fourier convolution.

    python benchmarks/pretrain_speed.py --presets attention-125m --nanogpt path/to/nanoGPT
    python benchmarks/pretrain_speed.py --presets attention-125m hyena-125m h3-125m
    python benchmarks/pretrain_speed.py --presets attention-1.4b hyena-1.4b --steps 50 \\
        --micro-batch 4 --global-batch 16 --checkpoint-activations
    python benchmarks/pretrain_speed.py --presets --convolutions --context 2048 16384

Every number is of the whole loop as users run it: `recallzoo pretrain` and nanoGPT's train.py, each
in a process of its own, reading the same synthetic tokens from disk, with the same contexts a step
and a micro-batch, one after another on the same device. The first steps, which compile, are left
out; medians of the rest. nanoGPT (github.com/karpathy/nanoGPT) is not part of this repository:
give the path of a checkout. Its model has learned positions and a GELU MLP of 4 D, ours rotary
positions and SwiGLU of 8/3 D: as many weights in products, the same attention. Neither has biases
or dropout; both have the same head, bfloat16 products through autocast, flash attention, fused
AdamW, clipping, gradient accumulation and a compiled model (nanoGPT's as a whole, ours by blocks).
MFU of both counts 6 operations a weight in products and 12 D T a layer, over the same peak.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
import numpy as np
import text_speed
import torch
from torch import Tensor

from recallzoo.files import write_json
from recallzoo.mixers._convolution import (
    causal_conv_channels,
    conv_channels_by_fft,
    conv_channels_by_toeplitz,
)
from recallzoo.mixers._fft_products import SIZES, conv_channels_by_fft_products
from recallzoo.mixers._long_convolution import conv_channels_by_tiles
from recallzoo.presets import preset
from recallzoo.provenance import environment
from recallzoo.train._flops import peak_flops
from recallzoo.train._large_model import padded
from recallzoo.train._pretrain_log import read_metrics

REPOSITORY = Path(__file__).resolve().parents[1]
UNTIMED_STEPS = 5
MAX_WRITTEN_OUT = 2048
"""Longest context for which Toeplitz matrices are written out: 6 GB of them here."""
NANOGPT = """
import json, runpy, sys
sys.argv[0] = "train.py"
found = runpy.run_path("train.py", run_name="__main__")
torch, model = found["torch"], found["raw_model"]
print("recallzoo " + json.dumps({
    "parameters": sum(p.numel() for p in model.parameters()),
    "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30
    if found["device_type"] == "cuda" else None,
}))
"""
"""Its train.py as it is, and at the end what it does not tell."""


def ours(
    args: argparse.Namespace, name: str, context: int, data: Path, out: Path
) -> dict[str, Any]:
    """A preset trained by `recallzoo pretrain`."""
    command = [sys.executable, "-m", "recallzoo", "pretrain", name, "--data", data, "--out", out]
    command += ["--context", context, "--steps", args.steps, "--global-batch", args.global_batch]
    command += ["--micro-batch", args.micro_batch, "--valid-every", 0, "--no-export"]
    command += ["--no-verify-data", "--save-minutes", 1000, "--compile", args.compile]
    command += ["--device", args.device, "--precision", args.precision, "--repeat-data"]
    for option in ("d_model", "num_layers"):
        if getattr(args, option):
            command += [f"--{option.replace('_', '-')}", getattr(args, option)]
    if args.checkpoint_activations:
        command += ["--checkpoint-activations"]
    end = _run(args, command, name)
    if end.status != "done":
        return {"what": name, "context": context, "failed": end.last_lines(3)}
    summary = json.loads((out / "summary.json").read_text())
    steps = [line for line in read_metrics(out) if "loss_nats" in line][UNTIMED_STEPS:]
    seconds = [line["seconds"] for line in steps]
    tokens = args.global_batch * context
    return {
        "what": name,
        "context": context,
        "parameters": summary["parameters"],
        "tokens_per_second": tokens / statistics.median(seconds),
        "fastest_tokens_per_second": tokens / min(seconds),
        "mfu": summary["mfu"],
        "peak_memory_gib": summary["peak_memory_gib"],
        "losses": [line["loss_nats"] for line in steps[:: max(1, len(steps) // 10)]],
        "compile": summary["compile"],
        "notes": summary["notes"],
        "device": summary["device"],
        "micro_batch": summary["micro_batch"],
        "wall_seconds": end.seconds,
    }


def nanogpt(args: argparse.Namespace, context: int, data: Path, folder: Path) -> dict[str, Any]:
    """nanoGPT's train.py on the same tokens at the shape of the first preset."""
    model = preset(args.presets[0]).resized(args.d_model, args.num_layers).model
    heads = dict(model.mixers[0].options)["num_heads"]
    tokens = np.load(next((data / "train").glob("tokens-*.npy")), mmap_mode="r")
    place = args.nanogpt / "data" / "recallzoo_speed"
    place.mkdir(parents=True, exist_ok=True)
    for name in ("train.bin", "val.bin"):
        np.asarray(tokens, dtype=np.uint16).tofile(place / name)
    with (place / "meta.pkl").open("wb") as file:  # where its loop looks for the vocabulary
        pickle.dump({"vocab_size": padded(args.vocab_size)}, file)
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    options: dict[str, Any] = {
        "dataset": place.name,
        "out_dir": str(folder),
        "block_size": context,
        "batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.global_batch // args.micro_batch,
        "n_layer": model.num_layers,
        "n_embd": model.d_model,
        "n_head": heads,
        "max_iters": args.steps,
        "eval_iters": 1,
        "eval_interval": 10**9,
        "warmup_iters": 2,
        "device": "cpu" if on_cpu else "cuda",
        "compile": not on_cpu,
        "dtype": "float32" if on_cpu else "bfloat16",
    }
    command = [sys.executable, "-c", NANOGPT, *(f"--{n}={v}" for n, v in options.items())]
    try:
        end = _run(args, command, "nanoGPT", args.nanogpt)
    finally:
        shutil.rmtree(place)
    text = end.log.read_text(encoding="utf-8", errors="replace")
    times = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", text)][UNTIMED_STEPS:]
    told = re.search(r"^recallzoo (\{.*\})$", text, re.MULTILINE)
    if end.status != "done" or not times or not told:
        return {"what": "nanoGPT", "context": context, "failed": end.last_lines(3)}
    about = json.loads(told[1])
    rate = args.global_batch * context / (statistics.median(times) / 1000)
    d_model, num_layers = model.d_model, model.num_layers
    in_products = num_layers * 12 * d_model**2 + d_model * padded(args.vocab_size)
    flops = 6 * in_products + 12 * num_layers * d_model * context
    peak = None if on_cpu else peak_flops(torch.device("cuda"))
    return {
        "what": "nanoGPT",
        "context": context,
        "parameters": about["parameters"],
        "tokens_per_second": rate,
        "fastest_tokens_per_second": args.global_batch * context / (min(times) / 1000),
        "mfu": None if peak is None else flops * rate / peak,
        "peak_memory_gib": about["peak_memory_gib"],
        "losses": [float(loss) for loss in re.findall(r"iter \d+: loss ([\d.]+)", text)],
        "commit": args.nanogpt_commit or _commit(args.nanogpt),
        "shape": f"{num_layers} x {d_model}, {heads} heads, {padded(args.vocab_size):,} words",
        "micro_batch": args.micro_batch,
        "wall_seconds": end.seconds,
    }


def _commit(folder: Path) -> str | None:
    """Of a checkout; None for a copy without history, lest that of a folder around it is named."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _run(
    args: argparse.Namespace, command: list[Any], name: str, folder: Path | None = None
) -> children.End:
    """A child's end; what it said last is shown if that is not as it should be."""
    words = [str(word) for word in command]
    log = args.logs / f"{name}.log"
    end = children.run(words, log, dict(os.environ), args.child_seconds, folder)
    if end.status != "done":
        print("\n".join([f"{name}: {end.status}", *end.last_lines()]), flush=True)
    return end


def plain_fourier(x: Tensor, taps: Tensor) -> Tensor:
    """The formulation of HazyResearch/zoology at dbcb60d: float32, twice the length, time last."""
    seq_len = x.shape[-1]
    u = x.float()
    u_f = torch.fft.rfft(u, n=2 * seq_len)
    taps_f = torch.fft.rfft(taps.float(), n=2 * seq_len)[:, None] / (2 * seq_len)
    return torch.fft.irfft(u_f * taps_f, n=2 * seq_len, norm="forward")[..., :seq_len].to(x.dtype)


def convolution(args: argparse.Namespace, context: int) -> dict[str, Any]:
    """Forward and backward of one long convolution, channels first as within mixers: what these
    use, each form that it may choose, and a plain Fourier transform."""
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    dtype = torch.float32 if on_cpu else torch.bfloat16
    width, batch = args.d_model or 768, args.micro_batch
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(width, batch, context, generator=generator).to(device, dtype)
    taps = torch.randn(width, context, generator=generator).to(device) / context**0.5
    x.requires_grad_()
    taps.requires_grad_()
    gradient = torch.randn_like(x)
    found: dict[str, Any] = {"context": context, "batch": batch, "width": width}
    outputs = {}
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "plain_fourier": plain_fourier,
        "ours": causal_conv_channels,
        "fourier": conv_channels_by_fft,
    }
    if not on_cpu:
        functions["tiles"] = conv_channels_by_tiles
        if context <= max(SIZES):
            functions["fft_products"] = conv_channels_by_fft_products
    if context <= MAX_WRITTEN_OUT:
        functions["toeplitz"] = conv_channels_by_toeplitz
    for name, function in functions.items():

        def once(function: Callable[[Tensor, Tensor], Tensor] = function) -> list[Tensor]:
            y = function(x, taps)
            return [y.detach(), *torch.autograd.grad(y, (x, taps), gradient)]

        outputs[name] = once()
        seconds = timed(once, args.steps, on_cpu)
        found[f"{name}_ms"] = 1000 * statistics.median(seconds)
    found["times_faster"] = found["plain_fourier_ms"] / found["ours_ms"]
    found["largest_relative_error"] = {
        name: max(
            float((a.float() - b.float()).abs().max() / b.float().abs().max())
            for a, b in zip(outputs[name], outputs["plain_fourier"], strict=True)
        )
        for name in functions
    }
    return found


def timed(function: Callable[[], Any], repeats: int, on_cpu: bool) -> list[float]:
    """Seconds of each call; on a GPU those of its kernels, replayed as a CUDA graph, as Python may
    take longer to launch them than they run."""
    run: Callable[[], Any] = function
    if not on_cpu:
        for _ in range(3):
            function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        run = graph.replay
    seconds = []
    for _ in range(repeats):
        if not on_cpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if not on_cpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--presets", nargs="*", default=["attention-125m"])
    add("--context", type=int, nargs="+", default=[2048])
    add("--micro-batch", type=int, default=16)
    add("--global-batch", type=int, default=32)
    add("--steps", type=int, default=30)
    add("--d-model", type=int)
    add("--num-layers", type=int)
    add("--vocab-size", type=int, default=50_257)
    add("--compile", default="auto", choices=["auto", "blocks", "model", "none"])
    add("--precision", default="bf16", choices=["bf16", "fp32"])
    add("--checkpoint-activations", action="store_true")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT to run beside")
    add("--nanogpt-commit", help="its commit, if it is a copy without history")
    add("--child-seconds", type=float, default=600.0, help="most that one run may take")
    add("--convolutions", action="store_true", help="time one long convolution by itself")
    add("--out", type=Path, help="where to write JSON")
    args = parser.parse_args()
    if args.global_batch % args.micro_batch:
        parser.error(f"--global-batch {args.global_batch} is no multiple of --micro-batch.")
    if args.steps <= UNTIMED_STEPS:
        parser.error(f"--steps {args.steps} must be more than the {UNTIMED_STEPS} not timed.")
    if args.nanogpt and not (args.nanogpt / "train.py").exists():
        parser.error(f"--nanogpt {args.nanogpt} holds no train.py: give a checkout of nanoGPT.")
    children.end_with_children()
    found: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "provenance": environment(),
        "training": [],
        "convolutions": [],
    }
    os.environ.setdefault("PYTHONPATH", str(REPOSITORY / "src"))
    for context in args.context:
        if args.convolutions:
            _keep(found, "convolutions", convolution(args, context), args.out)
        if not args.presets:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            args.logs = folder / "logs"
            text_speed.VOCAB_SIZE = args.vocab_size
            # A hundred steps at most come from distinct contexts; after that they repeat.
            number = min(args.steps, 100) * args.global_batch * (context + 1) + 4 * context
            text_speed.zipf_data(folder / "data", max(number, 10 * text_speed.DOCUMENT_TOKENS))
            if args.nanogpt:
                row = nanogpt(args, context, folder / "data", folder / "nanogpt")
                _keep(found, "training", row, args.out)
            for name in args.presets:
                row = ours(args, name, context, folder / "data", folder / name)
                _keep(found, "training", row, args.out)
                shutil.rmtree(
                    folder / name, ignore_errors=True
                )  # a checkpoint of 12 bytes a weight


def _keep(found: dict[str, Any], kind: str, row: dict[str, Any], out: Path | None) -> None:
    found[kind].append(row)
    brief = {k: v for k, v in row.items() if k not in ("losses", "notes")}
    print(json.dumps(brief), flush=True)
    if out is not None:
        write_json(out, found)


if __name__ == "__main__":
    main()
