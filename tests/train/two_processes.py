"""Run in two processes, which find each other by a file: the same run as copies and as shares of
the model, one that a single process began, and one with less to validate on than processes.
Arguments: data folder, folder for the runs, rank."""

import os
import sys
from pathlib import Path

import torch.distributed as dist
from pretraining import options

from recallzoo.train.pretrain import pretrain


def main() -> None:
    data, runs = map(Path, sys.argv[1:3])
    rank = int(sys.argv[3])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # as torchrun
    meeting = f"file://{runs}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for parallel in ("ddp", "fsdp"):
        pretrain(options(data, runs / parallel, parallel=parallel, micro_batch=1))
        pretrain(options(data, runs / f"begun_{parallel}", parallel=parallel))
    pretrain(options(data, runs / "begun_here", parallel="fsdp", stop_after_minutes=0))
    pretrain(options(data, runs / "few_valid", valid_contexts=1))
    hyena = options(data, runs / "hyena", preset="hyena-70m", d_model=16, parallel="fsdp")
    pretrain(hyena)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
