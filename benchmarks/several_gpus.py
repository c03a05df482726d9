"""Does it scale? Pretraining and sweeps on 1 and on n GPUs of a machine, and one worker killed.

    python benchmarks/several_gpus.py
    python benchmarks/several_gpus.py --parts pretrain kill --presets attention-360m --processes 2
    python benchmarks/several_gpus.py --parts sweep -- --seq-lens 128 --num-epochs 8
    python benchmarks/several_gpus.py --device cpu --processes 2 --d-model 64 --num-layers 2 \\
        --context 64 --vocab-size 512 --global-batch 8 --micro-batch 2 --precision fp32 \\
        -- --seq-lens 64 --widths 64 --mixers attention base_conv --num-examples 512 \\
        --num-epochs 2 --num-learning-rates 2 --seeds 0

Three parts, each through the commands that users run:

pretrain  each preset by `recallzoo pretrain`, in one process and under torchrun in n, as copies
          (ddp) and as shares (fsdp), at the same global batch: tokens a second (median step, the
          first 5 left out), efficiency, MFU, peak memory of each process, and each step's loss
          against one process. Data order and initial weights are equal. The learning rate
          is low and rises over half of the steps: AdamW's first steps move a weight by its
          gradient's sign, which for gradients near zero is rounding's, and a rate at which the
          loss is not stable says little about how equal two runs are.
kill      n processes, one of which gets SIGKILL once a checkpoint is there; the same command goes
          on. Losses against the run that was left alone.
sweep     `recallzoo run figure2 --executor ray`, with what follows `--` on the command line, on 1
          and on n devices, and on n with one Ray worker killed. Wall time, efficiency, and the
          result tables against each other. Before anything is timed, the same sweep on all
          devices fills the compiler's cache (--cold leaves it out).

All children share one cache of compiled code (TORCHINDUCTOR_CACHE_DIR, OUT's work folder if not
set). What is in the results file already is not measured again: the same command goes on after an
interruption. A child that fails or outlasts --child-seconds is recorded so, and the others go on.
"""

import argparse
import os
import sys
from pathlib import Path

import children
import torch
from several_gpus_bench import REPOSITORY, UNTIMED_STEPS, Bench, show
from several_gpus_pretrain import kill_row, pretrain_part
from several_gpus_record import PARTS
from several_gpus_sweep import sweep_part

SWEEP = ["--seq-lens", "128"]
"""What the sweep trains if nothing follows `--`: the length-128 quarter of Figure 2."""


def main(argv: list[str]) -> int:
    place = argv.index("--") if "--" in argv else len(argv)
    options, rest = argv[:place], argv[place + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--presets", nargs="+", default=["attention-360m", "hyena-360m"])
    add("--parallel", nargs="+", choices=["ddp", "fsdp"], default=["ddp", "fsdp"])
    add("--kill-presets", nargs="+", help="of the kill test; the first of --presets if not given")
    add("--processes", type=int, help="n: processes and devices; all GPUs, or 2 on the CPU")
    add("--data", type=Path, help="made by recallzoo prepare; synthetic tokens if not given")
    add("--vocab-size", type=int, default=50_257, help="of synthetic tokens")
    add("--context", type=int, default=2048)
    add("--global-batch", type=int, default=64, help="contexts a step, over all processes")
    add("--micro-batch", type=int, default=16, help="contexts a process computes at a time")
    add("--steps", type=int, default=20, help=f"the first {UNTIMED_STEPS} are not timed")
    add("--warmup", type=float, default=0.5, help="share of the steps; see above")
    add("--learning-rate", type=float, default=1e-4, help="peak; see above")
    add("--d-model", type=int)
    add("--num-layers", type=int)
    add("--precision", default="bf16", choices=["bf16", "fp32"])
    add("--compile", default="auto", choices=["auto", "blocks", "model", "none"])
    add("--checkpoint-activations", action="store_true")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--concurrent", action="store_true", help="runs in one process at once, a GPU each")
    add("--cold", action="store_true", help="sweeps compile anew, each with a cache of its own")
    add("--no-kill", action="store_true", help="no worker of the sweep is killed")
    add("--checkpoint-seconds", type=float, default=5.0, help="of the sweep with a worker killed")
    add("--child-seconds", type=float, default=600.0, help="most that one child may take")
    add("--work", type=Path, default=REPOSITORY / "runs" / "several_gpus")
    add("--out", type=Path, default=REPOSITORY / "results" / "several_gpus.json")
    args = parser.parse_args(options)
    refuse(parser, args)
    for name, value in children.NO_MULTICAST.items():
        os.environ.setdefault(name, value)
    children.end_with_children()
    args.work = args.work.resolve()
    bench = Bench(args, rest or SWEEP, command_of(options, rest))
    if "pretrain" in args.parts:
        pretrain_part(bench)
    if "kill" in args.parts:
        for preset in args.kill_presets or args.presets[:1]:
            for parallel in args.parallel:
                kill_row(bench, preset, parallel)
    if "sweep" in args.parts:
        sweep_part(bench)
    print("\nall there is now:")
    for part in PARTS:
        for row in bench.record.rows[part]:
            show(part, row)
    bad = [row for part in PARTS for row in bench.record.rows[part] if row["status"] != "done"]
    print(f"written to {args.out}" + (f"; {len(bad)} rows are not done" if bad else ""))
    return 1 if bad else 0


def refuse(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message for what cannot be measured here."""
    found = torch.cuda.device_count()
    if args.device != "cpu" and found == 0:
        parser.error("PyTorch sees no GPU here. Give --device cpu for a rehearsal.")
    number = args.processes or (2 if args.device == "cpu" else found)
    if number < 2 or (args.device != "cpu" and number > found):
        parser.error(
            f"{number} processes were asked for; 2 or more are wanted, a GPU each ({found} here)."
        )
    if args.global_batch % (number * args.micro_batch):
        parser.error(
            f"--global-batch {args.global_batch} cannot be shared by {number} processes in "
            f"micro-batches of {args.micro_batch}: give a multiple of {number * args.micro_batch}."
        )
    if args.steps <= UNTIMED_STEPS:
        parser.error(f"--steps {args.steps} must be more than the {UNTIMED_STEPS} not timed.")


def command_of(options: list[str], rest: list[str]) -> str:
    """The command line, without places of this machine."""
    found, place = [], False
    for word in options:
        found.append(found[-1].removeprefix("--").upper() if place else word)
        place = word in ("--work", "--out", "--data")
    return " ".join(["python benchmarks/several_gpus.py", *found, *(["--", *rest] if rest else [])])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
