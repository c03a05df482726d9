"""Turn a corpus into token shards, and count its training pairs.

usage: recallzoo prepare SOURCES... --out DIR [OPTIONS]
       recallzoo prepare --train SOURCES... [--valid ...] [--test ...] --out DIR [OPTIONS]

Sources are files (text, JSON Lines, Parquet; also .gz, .bz2, .xz, .zst), folders, or Hugging Face
datasets as hf:NAME:CONFIG:SPLIT. Without --tokenizer a byte-level BPE is trained on the corpus.
An interrupted command goes on where it stopped: run it once more.

examples:
  recallzoo prepare corpus.jsonl.zst --out data
  recallzoo prepare --train train.jsonl --valid valid.jsonl --test test.jsonl --out data
  recallzoo prepare texts/ --out data --tokenizer gpt2 --on-error skip
  recallzoo prepare corpus.jsonl --out data-pythia --tokenizer EleutherAI/pythia-70m
"""

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from recallzoo.cli._options import parse, plain_mistakes
from recallzoo.errors import UserError
from recallzoo.text.preparing import PrepareOptions

if TYPE_CHECKING:
    from recallzoo.text import TokenData


@dataclass(frozen=True, kw_only=True)
class Options(PrepareOptions):
    """What to prepare, and how."""

    sources: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders or hf:NAME:CONFIG:SPLIT, to be split by a hash of document ids. Or give the
    splits themselves with --train, --valid and --test."""
    count_pairs: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = True
    """Leave the training split's adjacent pairs uncounted; AR hits need them."""

    def __post_init__(self) -> None:
        with plain_mistakes():
            super().__post_init__()


def main(argv: list[str]) -> int:
    """`recallzoo prepare`."""
    options = parse(Options, argv, "prepare", __doc__)
    if importlib.util.find_spec("tokenizers") is None:
        raise UserError(
            "preparing text needs tokenizers, which is not installed: "
            "pip install 'recallzoo[text]'."
        )
    from recallzoo.text import prepare

    data = prepare(options)
    _print(data, options)
    return 0


def _print(data: "TokenData", options: Options) -> None:
    boundary = data.boundary
    ends = (
        f"documents {boundary.position} with {boundary.token}"
        if boundary.token is not None
        else "nothing separates documents"
    )
    print(f"tokenizer {data.tokenizer_hash[:12]}, {data.vocab_size:,} ids; {ends}")
    for name in data.splits:
        split = data.split(name)
        print(f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens")
    if options.count_pairs:
        counts = data.pair_counts()
        print(f"pair counts: {len(counts.pairs):,} distinct, {counts.num_pairs:,} in all")
    print(f"data: {data.folder}")
