"""Find out where language models lose: tokens to be recalled from context, or others.

usage: recallzoo audit MODEL [MODEL ...] --data DIR [--reference MODEL ...] [OPTIONS]

A model is any Hugging Face causal language model with safetensors weights (a folder or a hub
name), the --out of a finished `recallzoo pretrain`, or what `recallzoo export` made of one;
NAME=FOLDER calls it NAME. DIR is what `recallzoo prepare` made with the models' tokenizer. Losses
of every token are stored once: an interrupted command goes on where it stopped, and another model
added later costs its own losses only.

With --reference each model's gap to it is shared out: over AR hits and other tokens, by training
frequency of the pair, distance, occurrence and domain. Models with different tokenizers can be
audited side by side in bits per byte, not compared token by token.

examples:
  recallzoo audit checkpoints/hyena --data data --reference checkpoints/attention
  recallzoo audit small=runs/a large=runs/b --data data --split valid --max-tokens 1000000
  recallzoo audit state-spaces/mamba-130m-hf --reference EleutherAI/pythia-160m \\
      --data data-pythia --counts pile-sample --context 2048 --stride 1024
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from recallzoo.cli._options import parse, plain_mistakes
from recallzoo.evaluate.audit_options import AuditOptions

Format = Literal["html", "svg", "png"]


@dataclass(frozen=True, kw_only=True)
class Options(AuditOptions):
    """What to audit, and how."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Models to audit: folders or hub names with safetensors weights; NAME=FOLDER names one."""
    part_tokens: tyro.conf.Suppress[int] = AuditOptions.part_tokens
    mixer: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE.py:CLASS")
    ] = ()
    """The file of a mixer of someone's own that a model was trained with: its code is run. Give it
    again for another one."""
    json: bool = False
    """Print audit.json and the summary as JSON, for programs."""
    formats: tuple[Format, ...] = ("html",)
    """What the report is written as, into OUT/report: the HTML page, its charts as SVG and PNG."""

    def __post_init__(self) -> None:
        with plain_mistakes():
            super().__post_init__()


def main(argv: list[str]) -> int:
    """`recallzoo audit`."""
    options = parse(Options, argv, "audit", __doc__)
    from recallzoo.cli._audit_tables import print_json, print_tables
    from recallzoo.evaluate.audit import audit

    if options.mixer:
        from recallzoo.mixers import use_mixer

        for name in options.mixer:
            use_mixer(name)
    finished = audit(options)
    if options.json:
        print_json(finished, sys.stdout)
    else:
        print_tables(finished, sys.stdout)
    for path in _report(finished.folder, options.formats):
        print(path, file=sys.stderr if options.json else sys.stdout)
    return 0


def _report(folder: Path, formats: tuple[Format, ...]) -> list[Path]:
    from recallzoo.report import write_audit_report

    return write_audit_report(folder, folder / "report", formats)
