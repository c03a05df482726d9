"""`recallzoo prepare`: a corpus becomes memory-mapped, shuffled, checksummed token shards.

    sources -> (tokenizer trained on a sample) -> tokenised parts -> shuffled shards -> pair counts

The result depends on the sources and the options alone: not on the number of cores, nor on
how often the command was killed and run again. `manifest.json` is written last; until then the
folder counts as unfinished. The layout is described in `recallzoo.text`.
"""

import dataclasses
import functools
import math
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recallzoo._version import __version__
from recallzoo.errors import InvalidConfig, UserError
from recallzoo.files import (
    atomic_folder,
    exclusive,
    read_json,
    remove_leftovers,
    require_folder,
    write_json,
)
from recallzoo.text._checksums import describe_file, sha256_of, write_sealed_json
from recallzoo.text._data_folder import (
    LOCK,
    PLAN,
    WORK,
    busy,
    has_begun,
    plan_of,
    remove_data,
    require_ours,
    require_same,
)
from recallzoo.text._parts import (
    Input,
    Reading,
    encoded_in_pieces,
    problems_of,
    sample_texts,
    write_parts,
)
from recallzoo.text._shards import read_part_documents, write_split
from recallzoo.text.corpus import Fields, TextDocuments, find_files
from recallzoo.text.counting import Executor, count_pairs
from recallzoo.text.data import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    Boundary,
    TokenData,
    open_data,
)
from recallzoo.text.tokenizer import Encoder, load_encoder, train_encoder

DEFAULT_VOCAB_SIZE = 16_384
DEFAULT_SAMPLE_BYTES = 64_000_000
DEFAULT_FRACTION = 0.01


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What to prepare, and how. Only the last group has no influence on the result."""

    out: Path
    """The data folder to make."""
    sources: tuple[str, ...] = ()
    """Files (text, JSON Lines, Parquet; .gz, .bz2, .xz, .zst), folders, or hf:NAME:CONFIG:SPLIT,
    to be split by a hash of document ids. Or give the splits themselves, as follows."""
    train: tuple[str, ...] = ()
    """Sources of the training split."""
    valid: tuple[str, ...] = ()
    """Sources of the validation split."""
    test: tuple[str, ...] = ()
    """Sources of the test split."""
    valid_fraction: float | None = None
    """Share of documents of `sources` for validation; 0.01 unless given, 0 for no such split."""
    test_fraction: float | None = None
    """Share of documents of `sources` for test; 0.01 unless given, 0 for no such split."""
    tokenizer: str | None = None
    """A tokenizer.json, a folder with one, or a hub name. Without it a byte-level BPE is trained
    on the training split."""
    vocab_size: int | None = None
    """Size of the trained tokenizer; 16,384 unless given."""
    tokenizer_sample_bytes: int | None = None
    """Text the tokenizer is trained on, whole documents drawn by hash of id; 64 MB unless given."""
    boundary: Literal["end", "start", "none"] = "end"
    """Where each document has its boundary token."""
    boundary_token: str | None = None
    """The boundary token; unless given, the tokenizer's end-of-text (or, at the start,
    beginning-of-text) token."""
    text_field: str = "text"
    """Field or column with the text."""
    id_field: str = "id"
    """Field or column with the document's id; where there is none, file and record number."""
    domain_field: str = "domain"
    """Field or column with the domain; where there is none, the folder within the source."""
    source_field: str = "source"
    """Field or column that says where a document comes from."""
    text_documents: TextDocuments = "file"
    """What a document is in plain text files."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether records that are no document (invalid UTF-8 or JSON, no text field, an id that was
    there) end the command, or are left out and counted in the manifest."""
    shard_tokens: int = 2**26
    """Tokens a shard holds at most, unless one document has more."""
    seed: int = 0
    """Of the order of documents, the split and the tokenizer's sample."""
    name: str | None = None
    """The corpus's name in results; the folder's unless given."""

    count_pairs: bool = True
    """Count the training split's adjacent pairs as well (needed for AR hits)."""
    memory_mib: float = 1024
    """Memory for counting pairs."""
    workers: int | None = None
    """Threads (or Ray tasks) for counting pairs; all CPUs unless given."""
    executor: Executor = "threads"
    """What counts pairs: threads of this process, or Ray tasks on machines that share the disk."""
    overwrite: bool = False
    """Replace data prepared with other options."""

    def __post_init__(self) -> None:
        given = [*self.train, *self.valid, *self.test]
        if bool(self.sources) == bool(given):
            raise InvalidConfig(
                "give either sources, which are split by document id, or the splits themselves "
                "with --train (and --valid, --test)" + (", not both." if given else ".")
            )
        if given and not self.train:
            raise InvalidConfig("--valid and --test need --train beside them.")
        if given and (self.valid_fraction, self.test_fraction) != (None, None):
            raise InvalidConfig("valid_fraction and test_fraction are for sources, not --train.")
        if not (min(self.fractions) >= 0 and sum(self.fractions) < 1):  # nor is it for NaN
            raise InvalidConfig(
                f"valid_fraction={self.fractions[0]} and test_fraction={self.fractions[1]} want to "
                f"be 0 or more, and below 1 together."
            )
        trained = (self.vocab_size, self.tokenizer_sample_bytes)
        if self.tokenizer is not None and trained != (None, None):
            raise InvalidConfig(
                "vocab_size and tokenizer_sample_bytes are for a tokenizer trained here; "
                f"{self.tokenizer!r} is trained already. Leave them out."
            )
        if self.boundary == "none" and self.boundary_token is not None:
            raise InvalidConfig("boundary_token is given, but boundary='none' uses none.")
        for name in (
            "vocab_size",
            "tokenizer_sample_bytes",
            "shard_tokens",
            "memory_mib",
            "workers",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidConfig(f"{name}={value} must be positive and finite.")
        for name in ("out", "boundary_token"):
            value = str(getattr(self, name))
            if value != value.encode(errors="replace").decode():  # tokenizers takes UTF-8 alone
                raise InvalidConfig(f"{name}={value!r} is no UTF-8. Give it another name.")
        if self.vocab_size is not None and self.vocab_size > MAX_VOCAB_SIZE:
            raise InvalidConfig(
                f"vocab_size={self.vocab_size} is too large; {MAX_VOCAB_SIZE:,} is the most."
            )

    @property
    def fractions(self) -> tuple[float, float]:
        """Shares of validation and test, the default filled in."""
        valid, test = (
            DEFAULT_FRACTION if fraction is None else fraction
            for fraction in (self.valid_fraction, self.test_fraction)
        )
        return valid, test


MAX_VOCAB_SIZE = 2**24
"""Of a tokenizer that is trained here. The trainer reserves its memory at once, and where there is
not enough it ends the process without a message."""
_NO_INFLUENCE = ("out", "sources", "train", "valid", "test", "count_pairs", "memory_mib", "workers",
                 "executor", "overwrite", "on_error", "tokenizer")  # fmt: skip


def prepare(options: PrepareOptions, *, progress: bool = True) -> TokenData:
    """Prepare a corpus, or continue where an earlier call was stopped; opens the result.

    What a finished folder with the same options and sources holds is left as it is. Records
    left out, files ignored and a tokenizer smaller than asked are told on stderr and recorded
    in the manifest.

    Raises UserError for sources that cannot be read, options that do not fit, a folder that
    holds other data; StoreError for a full disk or damaged files.
    """
    out = options.out
    require_folder(out, "a folder for the data")
    inputs, ignored = _inputs(options)
    plan = _plan(options, inputs)
    require_ours(out)
    is_other = options.overwrite and plan_of(out) != plan
    if (out / MANIFEST).exists() and not (out / WORK).exists() and not is_other:
        data = open_data(out)
        require_same(plan, data.manifest["plan"], out)
    else:
        with exclusive(out / WORK / LOCK, busy(out)):
            if is_other:
                remove_data(out)
            if (out / MANIFEST).exists():  # its maker was killed at the very end
                data = open_data(out)
                require_same(plan, data.manifest["plan"], out)
            else:
                try:
                    data = _prepare(options, plan, inputs, ignored, progress)
                except _NeverMade:
                    remove_data(out)
                    raise
            shutil.rmtree(out / WORK, ignore_errors=True)
    if options.count_pairs:
        count_pairs(
            data,
            memory_mib=options.memory_mib,
            workers=options.workers,
            executor=options.executor,
            progress=progress,
        )
    return data


class _NeverMade(UserError):
    """What follows from the plan alone. Left in the folder, that would keep out the options that
    the message asks for."""


def _prepare(
    options: PrepareOptions,
    plan: dict[str, Any],
    inputs: Sequence[Input],
    ignored: Sequence[str],
    progress: bool,
) -> TokenData:
    out, work = options.out, options.out / WORK
    if has_begun(out):
        there = read_json(work / PLAN, "give --overwrite to start again, or another --out")
        require_same(plan, there, out)
    else:
        write_json(work / PLAN, plan)
    remove_leftovers(out)
    valid_fraction, test_fraction = options.fractions
    reading = Reading(
        inputs=inputs,
        fields=Fields(
            options.text_field, options.id_field, options.domain_field, options.source_field
        ),
        text_documents=options.text_documents,
        skip_problems=options.on_error == "skip",
        seed=options.seed,
        valid_fraction=valid_fraction,
        test_fraction=test_fraction,
    )
    encoder = _encoder(options, reading, out, progress)
    boundary = _boundary(options, encoder)
    dtype = np.dtype(np.uint16 if encoder.vocab_size <= 2**16 else np.uint32)
    parts = write_parts(reading, encoder, boundary, dtype, work / "parts", progress)
    documents = read_part_documents(parts, drop_repeated_ids=options.on_error == "skip")
    skipped, examples = problems_of(parts)
    repeated = sum(read_json(part / "part.json")["num_documents"] for part in parts)
    if repeated := repeated - len(documents):
        skipped["repeated_id"] = repeated
    domains = sorted(documents["domain"].unique().to_list())
    if len(domains) > 2**16:
        raise _NeverMade(
            f"the corpus has {len(domains):,} domains, at most 65,536 are possible. Name another "
            f"field with --domain-field."
        )
    splits = {}
    for name in _split_names(options):
        of_split = documents.filter(documents["split"] == name)
        if of_split.is_empty():
            raise _NeverMade(_empty_split(name, len(documents), options, inputs))
        splits[name] = write_split(
            out / name, of_split, domains, parts, options.shard_tokens, dtype, progress
        )
    in_pieces = encoded_in_pieces(parts)
    _tell(skipped, examples, ignored, in_pieces, encoder, options)
    write_sealed_json(
        out / MANIFEST,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "recallzoo": __version__,
            "name": plan["options"]["name"],
            "dtype": dtype.name,
            "tokenizer": {
                "hash": encoder.hash,
                "vocab_size": encoder.vocab_size,
                "origin": _origin(options, encoder),
                "boundary": dataclasses.asdict(boundary),
                "files": {
                    path.name: describe_file(path)
                    for path in sorted((out / "tokenizer").iterdir())
                    if path.is_file()
                },
            },
            "domains": domains,
            "splits": splits,
            "skipped": skipped,
            "skipped_examples": examples,
            "encoded_in_pieces": in_pieces,
            "ignored_files": list(ignored),
            "plan": plan,
        },
    )
    return open_data(out)


def _inputs(options: PrepareOptions) -> tuple[list[Input], list[str]]:
    inputs: list[Input] = []
    ignored: list[str] = []
    named = (("train", options.train), ("valid", options.valid), ("test", options.test))
    for split, sources in ((None, options.sources), *named):
        for source in sources:
            files, others = find_files(source)
            inputs += [Input(split, file) for file in files]
            ignored += others
    seen: Counter[str] = Counter()
    for number, (split, file) in enumerate((one.split, one.file) for one in inputs):
        seen[file.name] += 1
        if seen[file.name] > 1:  # ids start with the name, so it must be a file's own
            file = dataclasses.replace(file, name=f"{file.name}#{seen[file.name]}")
            inputs[number] = Input(split, file)
    return inputs, ignored


def _plan(options: PrepareOptions, inputs: Sequence[Input]) -> dict[str, Any]:
    """All that the result depends on: options with defaults filled in, and sources by checksum."""
    values = dataclasses.asdict(options)
    content = {name: value for name, value in values.items() if name not in _NO_INFLUENCE}
    content["name"] = options.name or options.out.resolve().name
    if options.sources:
        content["valid_fraction"], content["test_fraction"] = options.fractions
    if options.tokenizer is None:
        content["vocab_size"] = options.vocab_size or DEFAULT_VOCAB_SIZE
        content["tokenizer_sample_bytes"] = options.tokenizer_sample_bytes or DEFAULT_SAMPLE_BYTES
        tokenizer = "trained on this corpus"
    else:
        tokenizer = load_encoder(options.tokenizer).hash
    sources = [
        {
            "split": one.split,
            "name": one.file.name,
            "sha256": None if one.file.path is None else sha256_of(one.file.path),
        }
        for one in inputs
    ]
    return {"options": content, "tokenizer": tokenizer, "sources": sources}


def _encoder(options: PrepareOptions, reading: Reading, out: Path, progress: bool) -> Encoder:
    folder, used = out / "tokenizer", out / WORK / "tokenizer.json"
    if folder.exists() and used.exists():
        encoder = load_encoder(str(folder) if options.tokenizer is None else options.tokenizer)
        if read_json(used) != {"hash": encoder.hash}:
            raise UserError(
                f"{folder} was changed since the first text was tokenised with it. Start again "
                f"with --overwrite."
            )
        return encoder
    if options.tokenizer is not None:
        encoder = load_encoder(options.tokenizer)
    else:
        sample_bytes = options.tokenizer_sample_bytes or DEFAULT_SAMPLE_BYTES
        sample = sample_texts(reading, sample_bytes, progress)
        if not sample:
            raise UserError("the corpus holds no document with any text in it to train on.")
        encoder = train_encoder(sample, options.vocab_size or DEFAULT_VOCAB_SIZE, progress)
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder) as unfinished:
        encoder.save(unfinished)
    write_json(used, {"hash": encoder.hash})
    return encoder


def _origin(options: PrepareOptions, encoder: Encoder) -> str:
    if options.tokenizer is not None:
        return encoder.origin
    sample = options.tokenizer_sample_bytes or DEFAULT_SAMPLE_BYTES
    return f"byte-level BPE trained on up to {sample:,} bytes of this corpus"


def _boundary(options: PrepareOptions, encoder: Encoder) -> Boundary:
    if options.boundary == "none":
        return Boundary("none", None, None)
    token = options.boundary_token or encoder.default_boundary(options.boundary)
    if token is None:
        raise _NeverMade(
            f"tokenizer {encoder.origin!r} does not say which token ends (or begins) a text. Name "
            f"one of its tokens with --boundary-token, or choose --boundary none."
        )
    id_ = encoder.id_of(token)
    if id_ is None:
        raise _NeverMade(
            f"boundary token {token!r} is not in the vocabulary of tokenizer {encoder.origin!r}."
        )
    return Boundary(options.boundary, token, id_)


def _split_names(options: PrepareOptions) -> tuple[str, ...]:
    if options.sources:
        wanted = {"train": 1, "valid": options.fractions[0], "test": options.fractions[1]}
    else:
        wanted = {name: len(getattr(options, name)) for name in SPLITS}
    return tuple(name for name in SPLITS if wanted[name])


def _empty_split(
    name: str, num_documents: int, options: PrepareOptions, inputs: Sequence[Input]
) -> str:
    if not options.sources:
        return f"the sources of --{name} hold no document with any text in it."
    whole_files = options.text_documents == "file" and any(i.file.kind == "text" for i in inputs)
    pieces = (
        " A plain text file is one document; --text-documents line or paragraph makes more of it."
        if whole_files
        else ""
    )
    if name == "train":
        return f"split 'train' got no document: lower --valid-fraction and --test-fraction.{pieces}"
    return (
        f"split {name!r} got none of the corpus's {num_documents:,} "
        f"document{'' if num_documents == 1 else 's'}. Give it a larger share with "
        f"--{name}-fraction, or 0 for no such split.{pieces}"
    )


def _tell(
    skipped: dict[str, int],
    examples: Sequence[str],
    ignored: Sequence[str],
    in_pieces: int,
    encoder: Encoder,
    options: PrepareOptions,
) -> None:
    say = functools.partial(print, file=sys.stderr)
    for kind, number in skipped.items():
        say(f"left out {number:,} records: {kind.replace('_', ' ')}")
    for example in examples:
        say(f"  {example}")
    if ignored:
        some = ", ".join(ignored[:3])
        say(f"ignored {len(ignored):,} files of other types and broken links, among them {some}")
    if in_pieces:
        say(f"encoded {in_pieces:,} documents of over 8 million characters in pieces")
    asked = options.vocab_size or DEFAULT_VOCAB_SIZE
    if options.tokenizer is None and encoder.vocab_size < asked:
        say(
            f"the tokenizer has {encoder.vocab_size:,} ids, not {asked:,}: the corpus has no more "
            f"pairs of symbols that occur twice"
        )
