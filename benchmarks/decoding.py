"""Decoding: tokens a second and memory against the length of the context, for each mixer.

    python benchmarks/decoding.py                                     the 125m presets
    python benchmarks/decoding.py --models attention-360m rwkv-360m --contexts 1024 8192
    python benchmarks/decoding.py --d-model 64 --num-layers 2 --contexts 64 128 --device cpu

A model decodes with `step`, the recurrent form, greedily, a batch of sequences at a time. What it
carries is measured after `context` tokens: the cache's bytes, the peak memory of a step beyond
weights and cache, and the time of the next tokens. Reading a long context token by token would
take minutes, so a cache of that length is filled with noise of the right shape: time and memory do
not depend on what is in it. Models are untrained, for the same reason.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recallzoo.devices import is_out_of_memory
from recallzoo.files import write_json
from recallzoo.mixers import Cache
from recallzoo.model import LanguageModel
from recallzoo.presets import GPT2_VOCAB_SIZE, preset
from recallzoo.provenance import environment

MODELS = tuple(f"{m}-125m" for m in ("attention", "long_conv", "h3", "hyena", "rwkv", "base_conv"))
PROBE_STEPS = 3


def tensors(cache: Cache) -> Iterable[Tensor]:
    """All tensors of a cache."""
    for value in cache.values():
        if isinstance(value, dict):
            yield from tensors(value)
        else:
            yield value


def at_context(model: LanguageModel, batch: int, context: int) -> Cache:
    """A cache as it is after `context` tokens, its contents noise.

    Three steps tell which axis of a tensor grows with time, and by how much a step. So no mixer may
    have a cache that grows for a while and then stops, as a sliding window's does.
    """
    token = torch.zeros(batch, dtype=torch.int64, device=next(model.parameters()).device)
    cache = model.init_cache(batch)
    shapes = []
    for _ in range(min(PROBE_STEPS, context)):
        _, cache = model.step(token, cache)
        shapes.append([tuple(t.shape) for t in tensors(cache)])
    if context <= PROBE_STEPS:
        return cache
    return _grown(cache, shapes, context)


def _grown(cache: Cache, shapes: list[list[tuple[int, ...]]], context: int) -> Cache:
    places = iter(range(len(shapes[-1])))

    def grow(part: Cache, own_key: str = "") -> Cache:
        grown: Cache = {}
        for key, value in part.items():
            if isinstance(value, dict):
                grown[key] = grow(value, key)
                continue
            place = next(places)
            if not own_key and key == "position":
                grown[key] = torch.full_like(value, context)
                continue
            history = [shape[place] for shape in shapes]
            axes = [a for a in range(value.ndim) if history[-1][a] != history[-2][a]]
            if not axes:
                grown[key] = value
                continue
            (axis,) = axes
            size = list(value.shape)
            size[axis] += (context - PROBE_STEPS) * (history[-1][axis] - history[-2][axis])
            filled = torch.randn(size, device=value.device).to(value.dtype)
            grown[key] = filled if value.is_floating_point() else torch.zeros_like(filled)
        return grown

    return grow(cache)


@torch.inference_mode()
def measure(name: str, context: int, args: argparse.Namespace) -> dict[str, Any]:
    """One model at one length of context."""
    device = torch.device(args.device)
    chosen = preset(name).resized(args.d_model, args.num_layers)
    if any(m.name == "sliding_window" for m in chosen.model.mixers):
        raise SystemExit(f"{name} has windows, whose caches stop growing; they cannot be filled.")
    torch.manual_seed(0)
    model = chosen.build(args.vocab_size, context + PROBE_STEPS + args.steps + 2)
    model = model.to(device, getattr(torch, args.dtype)).eval()
    cache = at_context(model, args.batch, context)
    cache_bytes = sum(t.numel() * t.element_size() for t in tensors(cache))
    token = torch.zeros(args.batch, dtype=torch.int64, device=device)
    is_cuda = device.type == "cuda"
    before = 0
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = []
    for _ in range(args.steps + 1):
        began = time.perf_counter()
        logits, cache = model.step(token, cache)
        token = logits.argmax(-1)
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[1:])
    return {
        "model": name,
        "context": context,
        "batch": args.batch,
        "parameters": model.num_parameters(),
        "tokens_per_second": args.batch / step,
        "milliseconds_per_step": 1000 * step,
        "cache_bytes_per_sequence": cache_bytes / args.batch,
        "peak_bytes_of_a_step": torch.cuda.max_memory_allocated() - before if is_cuda else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), help="presets")
    add("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 16_384])
    add("--batch", type=int, default=8)
    add("--steps", type=int, default=20)
    add("--d-model", type=int)
    add("--num-layers", type=int)
    add("--vocab-size", type=int, default=GPT2_VOCAB_SIZE)
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="where to write JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.models:
        for context in args.contexts:
            try:
                rows.append(measure(name, context, args))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed = (str(error) or type(error).__name__).splitlines()[0]
                rows.append({"model": name, "context": context, "failed": failed})
                torch.cuda.empty_cache()
            print(json.dumps(rows[-1]), flush=True)
            if args.out is not None:
                settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
                is_cuda = args.device.startswith("cuda")
                device = torch.cuda.get_device_name() if is_cuda else "CPU"
                found = {"settings": settings, "device": device, "rows": rows}
                write_json(args.out, {**found, "provenance": environment()})


if __name__ == "__main__":
    main()
