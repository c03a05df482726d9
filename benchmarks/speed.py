"""Speed of the packed trainer beside HazyResearch/zoology at dbcb60d, on one device.

    git clone https://github.com/HazyResearch/zoology .peers/zoology
    git -C .peers/zoology checkout dbcb60d
    python benchmarks/speed.py --reference .peers/zoology                       all cells
    python benchmarks/speed.py --reference .peers/zoology --cells 'h3-*' --pack-sizes 4 8 16
    python benchmarks/speed.py --reference .peers/zoology --cells 'quickstart-*' --device cpu
    python benchmarks/speed.py --skip-reference --cells h3-512-512 --profile profile.txt
    python benchmarks/speed.py --reference .peers/zoology --processes 10 --gpus 0 1
    python benchmarks/speed.py --merge attention.json hyena.json h3.json

A cell MIXER-LENGTH-WIDTH is one of the paper's Figure 2: the released model of two mixers without
MLP, 8,192 words, its batch size and dropout. The quickstart's cells have the sizes of `recallzoo
run quickstart` and the reference's architecture. Both sides train equal architectures on equal
examples. Before a cell is timed both are trained for five steps from equal weights on one batch,
without dropout, ours packed at two learning rates; nothing is timed if their losses differ.

What is timed. The reference: its `Trainer.train_epoch`, in its float32, over batches that
already lie on the device (speed-ups are against this); and once more through its own data loader.
Ours: steps of `Pack.train` between two of its reports, shuffling and drawing included, in the
precision of the recipe (bfloat16 on a GPU), divided by the runs of the pack. Evaluation,
compilation and drawing the data set are in neither. Medians of several intervals, after warm-up.
Freed memory stays with the process, as in every command of ours; the reference gains by it too.

Most of the time is compilation. With --processes each cell has a process of its own, so many on
each GPU beside one another: all compile, and when none does any more, they time in turn, with the
GPU to themselves. --merge makes one result of several, of one kind of device.

The limit of a cell is the longer of its matrix products at the rate of one large product and of
its least traffic at the rate of one large copy (limits.py), both measured here.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import zoology_reference as zoology
from limits import measured_peaks, step_bytes, step_flops, synchronise
from speed_cells import Cell, check_parity, choose
from speed_results import about, baselines, concluded, kept, merge, print_cell, write
from speed_tools import Profile, Turn, free, own_memory, peak_gib, spread
from speed_waves import run_in_waves

from recallzoo.devices import is_out_of_memory
from recallzoo.errors import RecallzooError, UserError
from recallzoo.heap import keep_freed_memory
from recallzoo.model import LanguageModel
from recallzoo.provenance import commit
from recallzoo.run import Precision
from recallzoo.tasks import Batch, make_split
from recallzoo.train.packed import Pack, PackOptions, Progress, device_name

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
STEADY = 0.1
"""Two successive intervals that differ by less end the warm-up."""
PROFILED_STEPS = 5
"""Of the reference, each of which launches a thousand kernels."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu: seconds of all threads of this process, whatever else the machine does. On one thread that
is the time by the wall of a machine that does nothing else."""


def time_reference(
    cell: Cell, device: torch.device, options: argparse.Namespace, profile: Profile | None
) -> dict[str, Any]:
    """Its step with batches on the device, and through its loader."""
    clock, interval, repeats = CLOCKS[options.clock], options.interval, options.repeats
    [examples] = make_split(cell.runs(1, 8, "fp32")[0].data, "train", "cpu")
    loader = zoology.loader_of(examples, cell.batch_size)
    resident = [(x.to(device), y.to(device), slices) for x, y, slices in loader]
    training = zoology.Training(zoology.build(cell.architecture, device), device)

    def seconds_a_step(batches: Any, passes: int = 1) -> float:
        synchronise(device)
        start = clock()
        for _ in range(passes):
            training.run(batches)
        synchronise(device)
        return (clock() - start) / (passes * len(batches))

    seconds_a_step(resident[:1])
    first = seconds_a_step(resident[:1])
    resident = resident[: max(1, min(len(resident), round(interval / first)))]
    passes = max(1, round(interval / (first * len(resident))))
    on_device = [seconds_a_step(resident, passes) for _ in range(repeats)]
    memory = peak_gib(device)
    if profile is not None:
        few = resident[:PROFILED_STEPS]
        with profile.recording(f"reference, {cell.name}, {len(few)} steps", device):
            seconds_a_step(few)
    examples = examples.rows(torch.arange(len(resident) * cell.batch_size))
    loader = zoology.loader_of(examples, cell.batch_size)
    through_loader = [seconds_a_step(loader, passes) for _ in range(repeats)]
    median = statistics.median(on_device)
    return {
        "step": spread(on_device),
        "step_with_its_loader": spread(through_loader),
        "examples_per_second": round(cell.batch_size / median),
        "peak_gib": memory,
    }


class Enough(Exception):
    """Ends a pack's training from within a report."""


class Stopwatch:
    """Told of a pack's progress; measures its steady rate, then raises Enough."""

    def __init__(
        self,
        device: torch.device,
        options: argparse.Namespace,
        profile: Callable[[], Any] | None,
    ) -> None:
        self._device, self._options, self._repeats = device, options, options.repeats
        self._clock = CLOCKS[options.clock]
        self._started = time.perf_counter()
        self._box = options.cell_seconds
        self._last: tuple[float, int] | None = None
        self._before: float | None = None
        self._profile = profile
        self._recording: Any = None
        self._measuring = contextlib.ExitStack()
        self.warm_up_seconds: float | None = None
        self.intervals: list[float] = []
        """Seconds a step of each interval after warm-up."""

    def close(self) -> None:
        """Let others have the device."""
        self._measuring.close()

    def __call__(self, progress: Progress) -> None:
        synchronise(self._device)
        if self._last is None:  # the first report: compiled by now
            self._measuring.enter_context(self._options.turn)
        now, elapsed = self._clock(), time.perf_counter() - self._started
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
            raise Enough
        if self._last is not None and progress.step > self._last[1]:
            rate = (now - self._last[0]) / (progress.step - self._last[1])
            if self.warm_up_seconds is not None:
                self.intervals.append(rate)
            elif self._before is not None and abs(rate / self._before - 1) < STEADY:
                self.warm_up_seconds = elapsed
            self._before = rate
        if len(self.intervals) >= self._repeats or elapsed > self._box:
            if self._profile is None or not self.intervals:
                raise Enough
            self._recording = self._profile()
            self._recording.__enter__()
        self._last = (self._clock(), progress.step)


def time_pack(
    cell: Cell, num_runs: int, device: torch.device, options: argparse.Namespace, profile: Any
) -> dict[str, Any]:
    """Our step with this many runs."""

    def record() -> Any:
        title = f"packed, {cell.name}, {num_runs} runs, {options.interval:g} s"
        return profile.recording(title, device)

    with own_memory(device):
        watch = Stopwatch(device, options, None if profile is None else record)
        try:
            pack = Pack(
                cell.runs(num_runs, num_batches(cell, device), options.precision),
                device,
                PackOptions(
                    compiled=True if device.type == "cuda" else None,
                    progress_seconds=options.interval,
                    on_progress=watch,
                ),
            )
            free(device)  # of what drawing the data took, while others prepare as well
            for _ in pack.train():
                pass
        except Enough:
            pass
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return {"runs": num_runs, "failed": "out of memory"}
        finally:
            watch.close()
        if not watch.intervals:
            return {"runs": num_runs, "failed": f"not steady within {options.cell_seconds:g} s"}
        each = [seconds / num_runs for seconds in watch.intervals]
        assert watch.warm_up_seconds is not None
        return {
            "runs": num_runs,
            "step_of_a_run": spread(each),
            "examples_per_second": round(cell.batch_size / statistics.median(each)),
            "peak_gib": peak_gib(device),
            "warm_up_seconds": round(watch.warm_up_seconds, 1),
        }


def num_batches(cell: Cell, device: torch.device) -> int:
    """Of an epoch: as many as 100,000 examples have on a GPU, as the quickstart has on a CPU."""
    return (100_000 if device.type == "cuda" else 16_000) // cell.batch_size


def our_model(cell: Cell, device: torch.device) -> tuple[LanguageModel, Batch]:
    """Our model of a cell, and a few examples."""
    run = cell.runs(1, 1, "fp32")[0]
    model = LanguageModel(
        run.model, vocab_size=run.data.vocab_size, max_seq_len=run.data.max_seq_len
    ).to(device)
    [examples] = make_split(run.data, "train", device)
    return model, examples.rows(torch.arange(8, device=device))


def measure(
    cell: Cell,
    device: torch.device,
    options: argparse.Namespace,
    peaks: dict[str, float],
    profile: Profile | None,
) -> dict[str, Any]:
    """All numbers of a cell. Peaks are measured with the first, and kept for others."""
    what = cell.architecture
    entry: dict[str, Any] = {
        "cell": cell.name,
        "mixer": what.mixer,
        "seq_len": cell.seq_len,
        "d_model": what.d_model,
        "batch_size": cell.batch_size,
        "commit": commit(),
        "clock": options.clock,
        "precision": options.precision,
    }
    options.turn.prepare()
    model, examples = our_model(cell, device)
    element_bytes = 2 if options.precision == "bf16" else 4
    flops = step_flops(model, examples, cell.batch_size)
    moved = step_bytes(model, cell.batch_size, cell.seq_len, element_bytes)
    del model, examples
    if options.reference is not None:
        zoology.build(what, device)  # RWKV's kernel is compiled by this, if it was not yet
        with own_memory(device):
            entry["parity"] = {
                precision: check_parity(cell, device, precision)
                for precision in PRECISIONS
                if precision in ("fp32", options.precision)
            }
    entry["packs"] = []
    for num_runs in options.pack_sizes or cell.pack_sizes(device):
        options.turn.prepare()
        entry["packs"].append(time_pack(cell, num_runs, device, options, profile))
    with options.turn:
        if not peaks:
            with own_memory(device):
                peaks |= measured_peaks(device, options.precision, CLOCKS[options.clock])
        if options.reference is None:
            pass
        elif what.mixer == "rwkv" and device.type != "cuda":
            # The loop in the kernel's place is right but not worth timing.
            entry["reference"] = {"not_timed": "its kernel needs a GPU"}
        else:
            with own_memory(device):
                entry["reference"] = time_reference(cell, device, options, profile)
    if profile is not None:
        profile.write()
    timed = [pack for pack in entry["packs"] if "step_of_a_run" in pack]
    if not timed:
        raise UserError(f"{cell.name}: no pack size could be timed: {entry['packs']}.")
    best = min(timed, key=lambda pack: pack["step_of_a_run"]["ms"])
    ms = best["step_of_a_run"]["ms"]
    by_flops = 1000 * flops / peaks["matrix_product_flops_per_second"]
    by_bytes = 1000 * moved / peaks["copy_bytes_per_second"]
    entry |= {
        "pack_size": best["runs"],
        "ms_per_run_and_step": ms,
        "examples_per_second": best["examples_per_second"],
        "peak_gib": best["peak_gib"],
        "flops_per_run_and_step": flops,
        "bytes_per_run_and_step": moved,
        "limit_ms": round(max(by_flops, by_bytes), 4),
        "limit_is": "flops" if by_flops > by_bytes else "bytes",
        "share_of_limit": round(max(by_flops, by_bytes) / ms, 4),
    }
    reference = entry.get("reference", {})
    if "step" in reference:
        entry["speedup"] = round(reference["step"]["ms"] / ms, 2)
        entry["speedup_with_its_loader"] = round(reference["step_with_its_loader"]["ms"] / ms, 2)
    baseline = baselines().get((what.mixer, cell.seq_len, what.d_model))
    if baseline is not None and "h200" in device_name(device).lower():
        entry["baseline_ms"] = baseline
        entry["speedup_over_baseline"] = round(baseline / ms, 2)
    return entry


def parsed() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--reference", type=Path, help="a work tree of zoology at dbcb60d")
    parser.add_argument(
        "--skip-reference", action="store_true", help="time ours alone, without parity"
    )
    parser.add_argument("--cells", nargs="*", default=[], help="names or patterns; all of Figure 2")
    parser.add_argument(
        "--pack-sizes", type=int, nargs="+", help="4 to 16, by size, on a GPU; 1 3 8 on a CPU"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="bf16 on a GPU, else fp32")
    parser.add_argument("--repeats", type=int, default=7, help="intervals; their median counts")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds of one, at least")
    parser.add_argument(
        "--cell-seconds", type=float, default=90.0, help="most seconds for one pack size"
    )
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: on a busy machine, 1 thread"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's default if not given")
    parser.add_argument("--profile", type=Path, help="write the kernels' times to this file")
    parser.add_argument("--keep", type=Path, help="carry over other cells of this earlier result")
    parser.add_argument("--processes", type=int, help="cells at once on a GPU, a process each")
    parser.add_argument("--gpus", nargs="+", help="with --processes: numbers of the GPUs to use")
    parser.add_argument("--lock", type=Path, help="take turns with processes of this file")
    parser.add_argument("--merge", type=Path, nargs="+", help="results to make one of; no timing")
    parser.add_argument("--out", type=Path, help="results/speed_DEVICE.json if not given")
    options = parser.parse_args()
    if options.merge:
        return options
    if (options.reference is None) != options.skip_reference:
        parser.error("give either --reference DIR or --skip-reference.")
    if options.repeats < 1 or options.interval <= 0 or min(options.pack_sizes or [1]) < 1:
        parser.error("--repeats, --interval and --pack-sizes must be positive.")
    if options.processes is not None and (options.processes < 1 or options.lock):
        parser.error("--processes must be positive, and makes the --lock of its processes itself.")
    if options.gpus and not options.processes:
        parser.error("--gpus needs --processes.")
    if options.clock == "cpu" and (options.threads != 1 or options.device != "cpu"):
        parser.error("--clock cpu needs --threads 1 and --device cpu.")
    is_gpu = (options.device or "cuda") == "cuda" and torch.cuda.is_available()
    if options.device == "cuda" and not is_gpu:
        parser.error("--device cuda: PyTorch sees no GPU here.")
    options.device = "cuda" if is_gpu else "cpu"
    options.precision = options.precision or ("bf16" if is_gpu else "fp32")
    return options


def main() -> int:
    """Measure the chosen cells; the result is written anew after each. 1 if a cell failed."""
    options = parsed()
    if options.merge:
        return concluded(merge(options.merge, options.out))
    cells = choose(options.cells)
    if options.processes:
        return run_in_waves(cells, options)
    options.turn = Turn(options.lock)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = torch.device(options.device)
    if options.reference is not None:
        zoology.load(options.reference)
    profile = Profile(options.profile) if options.profile else None
    chosen = {cell.name for cell in cells}
    entries = [entry for entry in kept(options.keep, device) if entry["cell"] not in chosen]
    peaks: dict[str, float] = {}
    for cell in cells:
        try:
            entry = measure(cell, device, options, peaks, profile)
        except Exception as error:  # noqa: BLE001 (recorded; other cells can still be measured)
            entry = {"cell": cell.name, "failed": f"{type(error).__name__}: {error}"[:500]}
        entries.append(entry)
        print_cell(entry)
        write(options.out, about(device, options.reference is not None, peaks), entries)
    return concluded(entries)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RecallzooError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
