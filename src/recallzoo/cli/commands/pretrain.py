"""Pretrain a language model of the paper's, or your own size of it, on prepared text.

usage: recallzoo pretrain PRESET --data DATA --out OUT [OPTIONS]
       torchrun --nproc-per-node 8 -m recallzoo pretrain PRESET --data DATA --out OUT [OPTIONS]

PRESET is a name of `recallzoo list models`; DATA a folder made by `recallzoo prepare`. A run that
was interrupted goes on where its last checkpoint stands: run the same command once more, also with
another number of processes. Models with equal --context, --global-batch and --seed see equal data
in equal order.

examples:
  recallzoo pretrain attention-125m --data DATA --out runs/attention-125m
  recallzoo pretrain hyena-70m --data DATA --out runs/hyena --tokens 300e6 --learning-rate 1e-3
  recallzoo pretrain attention-70m --data DATA --out runs/small --num-layers 2 --context 512
  torchrun --nproc-per-node 8 -m recallzoo pretrain hyena-1.4b --parallel fsdp \\
      --checkpoint-activations --data DATA --out runs/hyena-1.4b
"""

import os
import sys

from recallzoo.cli._options import parse
from recallzoo.train._pretrain_options import PretrainOptions


def main(argv: list[str]) -> int:
    """`recallzoo pretrain`."""
    options = parse(PretrainOptions, argv, "pretrain", __doc__)
    from recallzoo.train.pretrain import pretrain

    summary = pretrain(options)
    if int(os.environ.get("RANK", 0)):
        return 0
    valid = summary["valid"] or {}
    losses = []
    # Metrics that were moved away tell of the steps since alone.
    if summary["train_loss_nats"] is not None:
        losses.append(f"train loss {summary['train_loss_nats']:.4f} nats")
    if valid:
        losses.append(f"validation loss {valid['valid_loss_nats']:.4f} nats")
    print(
        f"{summary['status']} at step {summary['steps']:,} ({summary['tokens']:,} tokens): "
        + (", ".join(losses) or "metrics.jsonl has no losses")
    )
    speed = []
    if summary["tokens_per_second"] is not None:
        speed.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
    if summary["mfu"] is not None:
        speed.append(f"MFU {100 * summary['mfu']:.1f} %")
    if summary["peak_memory_gib"] is not None:
        speed.append(f"peak memory {summary['peak_memory_gib']:.1f} GiB")
    print(", ".join([*speed, summary["device"], f"compiled: {summary['compile']}"]))
    for note in summary["notes"]:
        print(f"note: {note}")
    if summary["status"] == "finished" and (options.out / "model").exists():
        print(f"model: {options.out / 'model'}")
    sys.stdout.flush()
    return 0
