"""Pretrain a language model of the paper's, or your own size of it, on prepared text.

usage: recallzoo pretrain PRESET --data DATA --out OUT [OPTIONS]
       torchrun --nproc-per-node 8 -m recallzoo pretrain PRESET --data DATA --out OUT [OPTIONS]

PRESET is a name of `recallzoo list models`; DATA a folder made by `recallzoo prepare`. A run that
was interrupted goes on where its last checkpoint stands: run the same command once more, also with
another number of processes. Models with equal --context, --global-batch and --seed see equal data
in equal order.

A mixer of your own (--mixer) stands in place of the model's: in the special layers of a hybrid
(base_conv_attention-70m: one of twelve), in all layers of any other (attention-70m). It is first
checked, as by recallzoo run. To audit or export the model its file has to be named again.

examples:
  recallzoo pretrain attention-125m --data DATA --out runs/attention-125m
  recallzoo pretrain hyena-70m --data DATA --out runs/hyena --tokens 300e6 --learning-rate 1e-3
  recallzoo pretrain attention-70m --data DATA --out runs/small --num-layers 2 --context 512
  recallzoo pretrain attention-70m --mixer my_mixer.py:MyMixer --data DATA --out runs/mine
  torchrun --nproc-per-node 8 -m recallzoo pretrain hyena-1.4b --parallel fsdp \\
      --checkpoint-activations --data DATA --out runs/hyena-1.4b
"""

import os
import shlex
import sys

from recallzoo.cli._options import parse, require_once
from recallzoo.errors import EXIT_OUT_OF_TIME
from recallzoo.train._pretrain_options import PretrainOptions


def main(argv: list[str]) -> int:
    """`recallzoo pretrain`."""
    require_once("--mixer", argv, "a model is made of one mixer of your own")
    options = parse(PretrainOptions, argv, "pretrain", __doc__)
    is_first = not int(os.environ.get("RANK", 0))
    from recallzoo.train._pretrain_plan import is_begun, make_plan
    from recallzoo.train.pretrain import pretrain

    plan = make_plan(options)
    if options.mixer is not None and is_first and not is_begun(options.out):
        from recallzoo.cli._user_mixer import check_for_text

        check_for_text(plan.preset.model, plan.context, options.precision)

    summary = pretrain(options, plan)
    if not is_first:
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
    print(f"charts: recallzoo report {shlex.quote(str(options.out))}")
    sys.stdout.flush()
    # torchrun would take it for a worker that failed.
    has_launcher = "TORCHELASTIC_RUN_ID" in os.environ
    return EXIT_OUT_OF_TIME if summary["status"] == "stopped" and not has_launcher else 0
