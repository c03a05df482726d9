"""Write a pretrained model in Hugging Face form: safetensors, config, tokenizer.

usage: recallzoo export RUN --out DIR

RUN is the --out of `recallzoo pretrain`; its last checkpoint is taken. The folder is loaded by
AutoModelForCausalLM.from_pretrained after `import recallzoo.hub`, or with trust_remote_code=True.

examples:
  recallzoo export runs/attention-125m --out models/attention-125m
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from recallzoo.cli._options import parse, require_once


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and where to."""

    run: tyro.conf.Positional[Path]
    """Folder of a pretraining run."""
    out: Path
    """Folder to make."""
    step: int | None = None
    """Step of the checkpoint; the last one if not given."""
    data: Path | None = None
    """Prepared data whose tokenizer is copied along, for a run without OUT/model."""
    mixer: Annotated[str | None, tyro.conf.arg(metavar="FILE.py:CLASS")] = None
    """The file of a mixer of your own, for a run that was trained with it."""
    overwrite: bool = False
    """Replace a model that was exported there before."""


def main(argv: list[str]) -> int:
    """`recallzoo export`."""
    require_once("--mixer", argv, "a model has one mixer of a user's own")
    options = parse(ExportOptions, argv, "export", __doc__)
    from recallzoo.mixers import use_mixer
    from recallzoo.train.exporting import export_run

    if options.mixer is not None:
        use_mixer(options.mixer)
    step = export_run(
        options.run,
        options.out,
        step=options.step,
        data=options.data,
        overwrite=options.overwrite,
    )
    print(f"exported step {step:,} of {options.run} to {options.out}")
    return 0
