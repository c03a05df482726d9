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
positions and SwiGLU of 8/3 D: as many weights in products, the same attention.
"""

import argparse
import json
import os
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

import numpy as np
import text_speed
import torch
from torch import Tensor

from recallzoo.files import write_json
from recallzoo.mixers._convolution import causal_conv, conv_by_fft
from recallzoo.mixers._long_convolution import conv_by_tiles, conv_in_blocks
from recallzoo.presets import preset
from recallzoo.provenance import environment
from recallzoo.train._large_model import padded
from recallzoo.train._pretrain_log import read_metrics

REPOSITORY = Path(__file__).resolve().parents[1]
UNTIMED_STEPS = 5


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
    started = time.monotonic()
    done = _run(command, None)
    if done.returncode:
        return {"what": name, "context": context, "failed": done.stderr.strip().splitlines()[-1]}
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
        "wall_seconds": time.monotonic() - started,
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
    command = [sys.executable, "train.py", *(f"--{n}={v!r}" for n, v in options.items())]
    command = [word.replace("'", "") for word in command]
    try:
        done = _run(command, args.nanogpt)
    finally:
        for name in ("train.bin", "val.bin"):
            (place / name).unlink()
        place.rmdir()
    times = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", done.stdout)][UNTIMED_STEPS:]
    if done.returncode or not times:
        return {"what": "nanoGPT", "context": context, "failed": done.stderr.strip()[-500:]}
    count = args.global_batch * context
    version = subprocess.run(
        ["git", "-C", str(args.nanogpt), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "what": "nanoGPT",
        "context": context,
        "tokens_per_second": 1000 * count / statistics.median(times),
        "fastest_tokens_per_second": 1000 * count / min(times),
        "commit": version or None,
        "shape": f"{model.num_layers} x {model.d_model}, {heads} heads, vocabulary 50,304",
    }


def _run(command: list[Any], folder: Path | None) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


def plain_fourier(x: Tensor, taps: Tensor) -> Tensor:
    """The formulation of HazyResearch/zoology at dbcb60d: float32, twice the length, time last."""
    seq_len = x.shape[1]
    u = x.transpose(1, 2).float()
    u_f = torch.fft.rfft(u, n=2 * seq_len)
    taps_f = torch.fft.rfft(taps.float(), n=2 * seq_len) / (2 * seq_len)
    y = torch.fft.irfft(u_f * taps_f, n=2 * seq_len, norm="forward")[..., :seq_len]
    return y.to(x.dtype).transpose(1, 2).contiguous()


def convolution(args: argparse.Namespace, context: int) -> dict[str, Any]:
    """Forward and backward of one long convolution: what mixers use, each form it may choose, and
    a plain Fourier transform."""
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    dtype = torch.float32 if on_cpu else torch.bfloat16
    width, batch = args.d_model or 768, args.micro_batch
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, context, width, generator=generator).to(device, dtype)
    taps = torch.randn(width, context, generator=generator).to(device) / context**0.5
    x.requires_grad_()
    taps.requires_grad_()
    gradient = torch.randn_like(x)
    found: dict[str, Any] = {"context": context, "batch": batch, "width": width}
    outputs = {}
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "plain_fourier": plain_fourier,
        "ours": causal_conv,
        "fourier": conv_by_fft,
        "blocks": conv_in_blocks,
    }
    if not on_cpu:
        functions["tiles"] = conv_by_tiles
    for name, function in functions.items():
        seconds = []

        def once(function: Callable[[Tensor, Tensor], Tensor] = function) -> list[Tensor]:
            y = function(x, taps)
            return [y.detach(), *torch.autograd.grad(y, (x, taps), gradient)]

        outputs[name] = once()
        for _ in range(args.steps):
            began = time.perf_counter()
            once()
            if not on_cpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        found[f"{name}_ms"] = 1000 * statistics.median(seconds[min(3, len(seconds) - 1) :])
    found["times_faster"] = found["plain_fourier_ms"] / found["ours_ms"]
    found["largest_relative_error"] = {
        name: max(
            float((a.float() - b.float()).abs().max() / b.float().abs().max())
            for a, b in zip(outputs[name], outputs["plain_fourier"], strict=True)
        )
        for name in functions
    }
    return found


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
    add("--convolutions", action="store_true", help="time one long convolution by itself")
    add("--out", type=Path, help="where to write JSON")
    args = parser.parse_args()
    if args.nanogpt and padded(args.vocab_size) != 50_304:
        print("note: nanoGPT has 50,304 words; give --vocab-size 50257 for equal heads")
    found: dict[str, Any] = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
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
