"""Time and memory of a training step over the length of the sequence: hybrids beside attention.

    python benchmarks/scaling.py --device cuda
    python benchmarks/scaling.py --device cuda --minutes 9                   again until it is done
    python benchmarks/scaling.py --device cuda --models attention lookup --seq-lens 8192 16384
    python benchmarks/scaling.py --device cpu --seq-lens 256 512 1024 --d-model 32 --num-heads 2 \
        --fit-from 256 --repeats 2                                       a dry run, minutes

Each model is BaseConv (3 taps) with one special layer in `--num-layers` of 16, which is the 6 % of
the paper's 3 in 48, placed in the middle; `attention` has attention in every layer, by PyTorch's
fused operator. All have the same widths and gated MLPs. A step is forward and backward of the
hidden states of one sequence under bfloat16 autocast, the residual stream in bfloat16 as the
trainer has it, with neither head nor optimiser, whose cost is the same for all and linear in the
length. On CUDA a step is replayed as a CUDA graph, as the trainer replays micro-batches, so that
what is timed is the GPU's work; one that cannot be captured is timed as it is, and its row says so.
Models take turns at every length.

Before anything is timed, the selected rows' forms must agree with the plain one. The exponent is
the slope of a least-squares line through log(median seconds) over log(tokens), of the lengths of at
least `--fit-from` tokens. A model that does not fit into memory is recorded as such, and so is one
that fails, for which the exit code is 1.

The result is written after every length, its charts at the end. A result that is there already, of
the same settings, commit and device, goes on: a length at which all models were timed is not timed
again, and one that was interrupted is begun anew, so that models stand beside attention of the same
call. `--minutes` begins no further length after that time.
"""

import argparse
import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from recallzoo.devices import is_out_of_memory
from recallzoo.files import read_json, write_json
from recallzoo.mixers import Context, MixerConfig, mixer
from recallzoo.mixers._rows import Form, attend_rows
from recallzoo.model import LanguageModel, ModelConfig, place
from recallzoo.provenance import commit, environment
from recallzoo.train._replay import WARM_CALLS, Replayed

VOCAB_SIZE = 16_384
SEQ_LENS = [2048, 4096, 8192, 16_384, 32_768, 65_536]
WARMUP = 2
OUT_OF_MEMORY = "out of memory"


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
            block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True)
    return model


def zipf_tokens(seq_len: int, device: str) -> Tensor:
    """Ids i with probability in proportion to 1 / (i + 1): tokens repeat about as in text."""
    weights = 1 / torch.arange(1, VOCAB_SIZE + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(weights, seq_len, replacement=True, generator=generator)
    return ids[None].to(device)


def timed(step: Callable[[], None], repeats: int, device: str) -> dict[str, Any]:
    """Seconds of each run after the warm-up, and the most memory that one takes uncaptured."""
    is_gpu, peak, captured = device == "cuda", None, None
    for _ in range(WARMUP):
        step()
    if is_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        step = Replayed(step, print)
        for _ in range(WARM_CALLS + 2):
            step()
        captured = step.has_captured
        torch.cuda.synchronize()
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
        "captured": captured,
        "peak_memory_bytes": peak,
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
            vectors = model.embedding.tokens(tokens).to(torch.bfloat16)
            x = model.mix(vectors, None, context)
        loss = x.float().square().mean() + sum(context.losses.values())
        loss.backward()
        model.zero_grad()

    row = {"model": name, "seq_len": seq_len, "num_parameters": model.num_parameters()}
    return row | timed(step, options.repeats, options.device)


def measure_form(
    form: Form, capacity: int, seq_len: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Attention of `num_rows` rows alone in a tensor of `capacity`, forward and backward, by one
    form."""
    torch._dynamo.reset()
    q, k, v, positions, valid = rows_of(seq_len, capacity, options)
    weights = torch.randn_like(q)

    def step() -> None:
        y = attend_rows(q, k, v, positions, valid, Context(), form=form)
        torch.autograd.grad((y * weights).sum(), (q, k, v))

    row = {"form": form, "seq_len": seq_len, "num_rows": int(valid.sum()), "capacity": q.shape[-2]}
    return row | timed(step, options.repeats, options.device)


def rows_of(seq_len: int, capacity: int, options: argparse.Namespace) -> tuple[Tensor, ...]:
    """q, k, v, positions and which of them are valid: rows spread over the sequence, the first
    `num_rows` of the capacity, as `gather_rows` puts them."""
    torch.manual_seed(0)
    capacity = min(capacity, seq_len)
    num_rows = min(options.num_rows, capacity)
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
        for length in (capacity, seq_len, seq_len)
    )
    order = torch.randperm(seq_len)
    chosen = torch.cat([order[:num_rows].sort().values, order[num_rows:capacity].sort().values])
    valid = torch.arange(capacity) < num_rows
    return q, k, v, chosen[None].to(options.device), valid[None].to(options.device)


def capacities(options: argparse.Namespace) -> tuple[int, ...]:
    """Sizes of the tensor of rows: as many as rows, and four times as many."""
    return options.num_rows, 4 * options.num_rows


def require_equal_forms(options: argparse.Namespace) -> None:
    """SystemExit unless every form computes what the plain one does in float32."""
    q, k, v, positions, valid = rows_of(2048, max(capacities(options)), options)
    exact_of = (q.float(), k.float(), v.float(), positions, valid)
    exact = attend_rows(*exact_of, Context(), form="plain").detach()
    chosen = valid[:, None].expand(exact.shape[:-1])
    for form in forms(options):
        y = attend_rows(q, k, v, positions, valid, Context(), form=form).detach().float()
        errors = ((y - exact).norm(dim=-1) / exact.norm(dim=-1))[chosen]
        # bfloat16 has 8 bits: 0.4 % of each score, weight and value, and scores are exponents.
        if float(errors.max()) > 0.03:
            raise SystemExit(
                f"form {form} differs from the plain one by {float(errors.max()):.3f} of a row: "
                f"nothing was timed"
            )


def forms(options: argparse.Namespace) -> list[Form]:
    """Those that the device has."""
    every: list[Form] = ["plain", "fused", "flex"]
    return every if options.device == "cuda" else every[:2]


def attempt(measure: Callable[[], dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """What was measured, or that it did not fit, or how it failed."""
    try:
        done = measure()
        print(f"{row}: {done['median_seconds']:.4f} s, {_gib(done['peak_memory_bytes'])}")
    except Exception as error:  # noqa: BLE001 - it is told, and the other models are timed
        words = OUT_OF_MEMORY
        if not is_out_of_memory(error):
            traceback.print_exc()
            words = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        done = {**row, "error": words}
        print(f"{row}: {words}", flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return done


def _gib(num_bytes: int | None) -> str:
    return "memory not measured" if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


def measure_length(seq_len: int, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The rows of one length."""
    return {
        "forms": [
            attempt(
                lambda form=form, capacity=capacity: measure_form(form, capacity, seq_len, options),
                {"form": form, "seq_len": seq_len, "capacity": capacity},
            )
            for capacity in capacities(options)
            for form in forms(options)
        ],
        "models": [
            attempt(
                lambda one=one: measure_model(one, seq_len, options),
                {"model": one, "seq_len": seq_len},
            )
            for one in options.models
        ],
    }


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
            "fitted_lengths": sorted(n for n in times if n >= fit_from),
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


def started(out: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The result that is there already, if it is of the same settings, commit and device, else a
    fresh one. SystemExit if another result is there."""
    if not out.exists():
        return fresh
    there = read_json(out)
    same = ("settings", "commit", "device")
    differing = [name for name in same if there.get(name) != fresh[name]]
    if differing:
        raise SystemExit(
            f"{out} holds a result of other {', '.join(differing)}: nothing was timed. Move it "
            f"away, or give another --out."
        )
    return there


def is_whole(result: dict[str, Any], seq_len: int, options: argparse.Namespace) -> bool:
    """Whether all models were timed at a length, or did not fit."""
    found = {
        row["model"]: row.get("error") for row in result["models"] if row["seq_len"] == seq_len
    }
    return all(found.get(one, "missing") in (None, OUT_OF_MEMORY) for one in options.models)


def charts(result: dict[str, Any], out: Path) -> list[Path]:
    """Draw them beside the result; where charts cannot be drawn, say what draws them."""
    try:
        import scaling_charts
    except ModuleNotFoundError as error:
        command = f"python benchmarks/scaling_charts.py --result {out}"
        print(f"no charts here: {error}. Elsewhere: {command}")
        return []
    return scaling_charts.draw(result, out.parent, out.stem)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seq-lens", type=int, nargs="+", default=SEQ_LENS)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--num-layers", type=int, default=16)
    parser.add_argument("--num-rows", type=int, default=256, help="rows selected, k")
    parser.add_argument("--fit-from", type=int, default=8192, help="shortest length of the fit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="blocks; as default on cuda"
    )
    parser.add_argument("--minutes", type=float, help="begin no further length after this time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device. Use --device cpu for a dry run.")
    if options.compile is None:
        options.compile = options.device == "cuda"
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    short = name.lower().replace("nvidia", "").split()[0]
    out = options.out or Path("results") / f"scaling_{short}.json"
    # Beyond the limit blocks would run uncompiled, and be timed so.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    apart = ("out", "models", "seq_lens", "minutes")
    result = started(
        out,
        {
            "command": "python benchmarks/scaling.py --device " + options.device,
            "settings": {k: v for k, v in vars(options).items() if k not in apart},
            "commit": commit(),
            "environment": environment(),
            "device": name,
            "load_average": os.getloadavg(),
            "fit": f"least squares of log(median seconds) over log(tokens), of lengths from "
            f"{options.fit_from} tokens on",
            "models": [],
            "forms": [],
        },
    )
    begun = time.monotonic()
    require_equal_forms(options)
    timed_here, left = 0, []
    for seq_len in sorted(options.seq_lens):
        if is_whole(result, seq_len, options):
            print(f"{seq_len} tokens: timed before")
            continue
        minutes = (time.monotonic() - begun) / 60
        if timed_here and options.minutes is not None and minutes >= options.minutes:
            left.append(seq_len)
            continue
        timed_here += 1
        for kind, rows in measure_length(seq_len, options).items():
            others = [row for row in result[kind] if row["seq_len"] != seq_len]
            result[kind] = sorted([*others, *rows], key=lambda row: row["seq_len"])
        result["summary"] = summary(result["models"], options.fit_from)
        write_json(out, result)
    for one, found in result.get("summary", {}).items():
        print(
            f"{one}: seconds grow as T^{found['time_exponent']}, memory as "
            f"T^{found['memory_exponent']}; faster than attention from "
            f"{found['faster_than_attention_from']} tokens"
        )
    print("written to", *[out, *charts(result, out)])
    if left:
        print(f"time is up before {', '.join(map(str, left))} tokens; the same command goes on")
    failed = {
        f"{row[kind]} at {row['seq_len']}"
        for kind in ("model", "form")
        for row in result[f"{kind}s"]
        if row.get("error", OUT_OF_MEMORY) != OUT_OF_MEMORY
    }
    if failed:
        raise SystemExit(f"failed: {', '.join(sorted(failed))}")


if __name__ == "__main__":
    main()
