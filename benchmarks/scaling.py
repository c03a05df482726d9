"""Time and memory of a training step over the length of the sequence: hybrids beside attention.

    python benchmarks/scaling.py --device cuda
    python benchmarks/scaling.py --device cuda --models attention lookup --seq-lens 8192 16384
    python benchmarks/scaling.py --device cpu --seq-lens 256 512 1024 --d-model 32 --num-heads 2 \
        --fit-from 256 --repeats 2                                       a dry run, minutes

Each model is BaseConv (3 taps) with one special layer in `--num-layers` of 16, which is the 6 % of
the paper's 3 in 48, placed in the middle; `attention` has attention in every layer, by PyTorch's
fused operator. All have the same widths and gated MLPs. A step is forward and backward of the
hidden states of one sequence under bfloat16 autocast, with neither head nor optimiser, whose cost
is the same for all and linear in the length. Models take turns at every length.

Before anything is timed, the selected rows' forms must agree with the plain one. The exponent is
the slope of a least-squares line through log(median seconds) over log(tokens), of the lengths of at
least `--fit-from` tokens. A model that does not fit into memory is recorded as such. What was
measured so far is in the file after every length.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recallzoo.devices import is_out_of_memory
from recallzoo.files import write_json
from recallzoo.mixers import Context, MixerConfig, mixer
from recallzoo.mixers._rows import Form, attend_rows
from recallzoo.model import LanguageModel, ModelConfig, place
from recallzoo.provenance import environment

VOCAB_SIZE = 16_384
SEQ_LENS = [2048, 4096, 8192, 16_384, 32_768, 65_536]
WARMUP = 2


def special_mixers(num_heads: int, num_rows: int, seq_len: int) -> dict[str, MixerConfig]:
    """The special layer of each model. The budget of rows is for this length: k stays fixed."""
    heads: dict[str, Any] = {"num_heads": num_heads, "positions": "rotary"}
    return {
        "base_conv": mixer("base_conv"),
        "lookup": mixer("lookup_attention", num_heads=num_heads),
        "lookup_hash": mixer("lookup_attention", num_heads=num_heads, match="hash", hash_bits=12),
        "learned": mixer(
            "selective_attention", selector="learned", num_rows=min(num_rows, seq_len), **heads
        ),
        "top_k": mixer("selective_attention_topk", num_rows=min(num_rows, seq_len), **heads),
        "repeated": mixer("selective_attention", selector="repeated", **heads),
        "random": mixer("selective_attention", selector="random", rate=0.1, **heads),
        "sliding": mixer("selective_attention", selector="sliding", window=128, **heads),
        "shift": mixer("shift_conv"),
        "full": mixer("attention", **heads),
        "attention": mixer("attention", **heads),
    }


MODELS = list(special_mixers(1, 1, 1))


def build(name: str, options: argparse.Namespace, seq_len: int) -> LanguageModel:
    """One model, on the device."""
    special = special_mixers(options.num_heads, options.num_rows, seq_len)[name]
    base = special if name == "attention" else mixer("base_conv")
    config = ModelConfig(
        mixers=place(base, special, options.num_layers, layers=(options.num_layers // 2,)),
        d_model=options.d_model,
        num_layers=options.num_layers,
        state_mixer="gated_mlp",
        norm="rms",
    )
    torch.manual_seed(0)
    model = LanguageModel(config, vocab_size=VOCAB_SIZE, max_seq_len=seq_len)
    model.to(options.device)
    if options.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    return model


def zipf_tokens(seq_len: int, device: str) -> Tensor:
    """Ids i with probability in proportion to 1 / (i + 1): tokens repeat about as in text."""
    weights = 1 / torch.arange(1, VOCAB_SIZE + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(weights, seq_len, replacement=True, generator=generator)
    return ids[None].to(device)


def timed(step: Callable[[], None], repeats: int, device: str) -> dict[str, Any]:
    """Seconds of each run after the warm-up, and the most memory that one took."""
    is_gpu = device == "cuda"
    for _ in range(WARMUP):
        step()
    if is_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if is_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": [round(one, 6) for one in seconds],
        "median_seconds": round(statistics.median(seconds), 6),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if is_gpu else None,
    }


def measure_model(name: str, seq_len: int, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the result."""
    torch._dynamo.reset()
    model = build(name, options, seq_len)
    tokens = zipf_tokens(seq_len, options.device)
    key = torch.tensor(1, device=options.device)

    def step() -> None:
        context = Context(tokens=tokens, dropout_key=key)
        with torch.autocast(options.device, dtype=torch.bfloat16):
            x = model.hidden(tokens, context=context)
        loss = x.float().square().mean() + sum(context.losses.values())
        loss.backward()
        model.zero_grad()

    row = {"model": name, "seq_len": seq_len, "num_parameters": model.num_parameters()}
    return row | timed(step, options.repeats, options.device)


def measure_form(form: Form, seq_len: int, options: argparse.Namespace) -> dict[str, Any]:
    """Attention of `num_rows` rows alone, forward and backward, by one form."""
    torch._dynamo.reset()
    q, k, v, positions, valid = rows_of(seq_len, options)
    weights = torch.randn_like(q)

    def step() -> None:
        y = attend_rows(q, k, v, positions, valid, Context(), form=form)
        torch.autograd.grad((y * weights).sum(), (q, k, v))

    row = {"form": form, "seq_len": seq_len, "num_rows": q.shape[-2]}
    return row | timed(step, options.repeats, options.device)


def rows_of(seq_len: int, options: argparse.Namespace) -> tuple[Tensor, ...]:
    """q, k, v, positions and which of them are valid: rows spread over the sequence."""
    torch.manual_seed(0)
    num_rows = min(options.num_rows, seq_len)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(
            1,
            options.num_heads,
            length,
            options.d_model // options.num_heads,
            device=options.device,
            dtype=dtype,
        ).requires_grad_()
        for length in (num_rows, seq_len, seq_len)
    )
    chosen = torch.randperm(seq_len)[:num_rows].sort().values[None].to(options.device)
    return q, k, v, chosen, torch.ones_like(chosen, dtype=torch.bool)


def require_equal_forms(options: argparse.Namespace) -> None:
    """SystemExit unless every form computes what the plain one does."""
    q, k, v, positions, valid = rows_of(2048, options)
    plain = attend_rows(q, k, v, positions, valid, Context(), form="plain").detach().float()
    for form in forms(options):
        y = attend_rows(q, k, v, positions, valid, Context(), form=form).detach().float()
        # bfloat16 has 8 bits: 0.4 % of values of size one, through two products.
        if float((y - plain).abs().max()) > 0.02:
            raise SystemExit(f"form {form} differs from the plain one: nothing was timed")


def forms(options: argparse.Namespace) -> list[Form]:
    """Those that the device has."""
    every: list[Form] = ["plain", "fused", "flex"]
    return every if options.device == "cuda" else every[:2]


def attempt(measure: Callable[[], dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """What was measured, or that it did not fit."""
    try:
        done = measure()
        print(f"{row}: {done['median_seconds']:.4f} s, {_gib(done['peak_memory_bytes'])}")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        done = {**row, "error": "out of memory"}
        print(f"{row}: out of memory")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return done


def _gib(num_bytes: int | None) -> str:
    return "memory not measured" if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


def summary(rows: list[dict[str, Any]], fit_from: int) -> dict[str, Any]:
    """Exponents by model, and from which length on each is faster than attention."""
    medians: dict[str, dict[int, float]] = {}
    memory: dict[str, dict[int, float]] = {}
    for row in rows:
        if "error" not in row:
            medians.setdefault(row["model"], {})[row["seq_len"]] = row["median_seconds"]
            if row["peak_memory_bytes"]:
                memory.setdefault(row["model"], {})[row["seq_len"]] = row["peak_memory_bytes"]
    reference = medians.get("attention", {})
    return {
        name: {
            "time_exponent": exponent(times, fit_from),
            "memory_exponent": exponent(memory.get(name, {}), fit_from),
            "faster_than_attention_from": faster_from(times, reference),
            "times_as_fast_as_attention": {
                str(n): round(reference[n] / t, 2) for n, t in times.items() if n in reference
            },
        }
        for name, times in medians.items()
    }


def exponent(values: dict[int, float], fit_from: int) -> float | None:
    """Slope of log(value) over log(length); None for fewer than two lengths."""
    chosen = sorted(n for n in values if n >= fit_from)
    if len(chosen) < 2:
        return None
    slope = np.polyfit(np.log(chosen), np.log([values[n] for n in chosen]), 1)[0]
    return round(float(slope), 3)


def faster_from(times: dict[int, float], reference: dict[int, float]) -> int | None:
    """The least length from which on a model is faster at every length that both were timed at."""
    common = sorted(set(times) & set(reference))
    slower = [n for n in common if times[n] >= reference[n]]
    faster = [n for n in common if n > (slower[-1] if slower else 0)]
    return faster[0] if faster else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seq-lens", type=int, nargs="+", default=SEQ_LENS)
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--num-layers", type=int, default=16)
    parser.add_argument("--num-rows", type=int, default=256, help="rows selected, k")
    parser.add_argument("--fit-from", type=int, default=8192, help="shortest length of the fit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="blocks; as default on cuda"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device. Use --device cpu for a dry run.")
    if options.compile is None:
        options.compile = options.device == "cuda"
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    short = name.lower().replace("nvidia", "").split()[0]
    out = options.out or Path("results") / f"scaling_{short}.json"
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    result: dict[str, Any] = {
        "settings": settings,
        "environment": environment(),
        "device": name,
        "load_average": os.getloadavg(),
        "fit": f"least squares of log(median seconds) over log(tokens), >= {options.fit_from}",
        "models": [],
        "forms": [],
    }
    require_equal_forms(options)
    for seq_len in sorted(options.seq_lens):
        for form in forms(options):
            result["forms"].append(
                attempt(
                    lambda form=form, n=seq_len: measure_form(form, n, options),
                    {"form": form, "seq_len": seq_len},
                )
            )
        for one in options.models:
            result["models"].append(
                attempt(
                    lambda one=one, n=seq_len: measure_model(one, n, options),
                    {"model": one, "seq_len": seq_len},
                )
            )
        result["summary"] = summary(result["models"], options.fit_from)
        write_json(out, result)
    for one, found in result["summary"].items():
        print(
            f"{one}: seconds grow as T^{found['time_exponent']}, memory as "
            f"T^{found['memory_exponent']}; faster than attention from "
            f"{found['faster_than_attention_from']} tokens"
        )
    print(f"written to {out}")


if __name__ == "__main__":
    main()
