"""The folder of an audit: its layout, and reading it. Nothing here imports torch.

    AUDIT/
      audit.json                  written last: a folder without it is unfinished. See below
      summary.parquet             one row a model, reference and slice
      passages.json               a few passages of the text, token by token
      settings.json               what the losses depend on besides the model: data and contexts
      tokens/                     what is known of each token, shared by the sliced models
        labels.json               what the labels depend on: settings and pair counts
        tokens-00000.parquet ...  document, position, token, distance, occurrence, train_count
      models/<name>/
        model.json                what its losses depend on: model, dtype, settings
        losses-00000.parquet ...  document, position, token, loss_nats

`document` is a document's number in the split, `position` a token's place in its document, from
0. A row is a scored token; rows go through the split in order, each token once. Row i of a
`tokens` part is row i of every sliced model's `losses` part of the same number. A model whose
tokenizer is not the pair counts' has its own tokens, so it has losses and bits per byte only.
`distance` is 0 where the token's pair did not occur earlier in the context; `train_count` is -1
where there is no pair (`recallzoo.text.Labels`).

audit.json

    format, format_version
    data         name, split, checksum, tokenizer_hash, num_documents, num_tokens (of the split as
                 audited), split_num_tokens, max_tokens (null: the whole split), domains
    context, stride, bos ("none" or "prepend"), documents ("packed" or "separate")
    num_tokens   scored tokens of the sliced models; null where no model is sliced
    cuts         [{rate, max_count, num_hits, share_of_tokens}]: a token is an AR hit at a cut when
                 its pair repeats in context and occurs at most max_count times in `pair_counts`.
                 Of several rates that give one max_count, the first
    pair_counts  corpus, num_tokens, num_documents, vocab_size, tokenizer_hash, stand_in (true: not
                 counted on the data's own training split), label (a line to show beside every
                 number); null where no model is sliced
    models       [{name, path, role ("model" or "reference"), sliced, tokenizer_hash, model_hash,
                 model_type, num_parameters, dtype, devices, batch_size, bos_token, num_tokens,
                 loss_nats, ppl, bits_per_byte, num_bytes}], models first, then references
    reference    name of the first reference, null without one; references: all of them
    bootstrap    resamples, level, seed
    notes        lines that must be shown: what was cut short, unsure or not comparable
    provenance   versions, commit, platform

summary.parquet

    model, reference            reference is null where nothing is compared
    slice_kind                  all, ar_hit, other, repeated, new, frequency, frequency_repeated,
                                frequency_new, distance, occurrence, domain
    slice, slice_order          label, and its place in its kind
    slice_low, slice_high       bounds of a bin, both inclusive; high is null where open
    cut                         max_count of ar_hit and other; null for other kinds
    num_tokens, share_of_tokens
    loss_nats, ppl              mean over the slice, and its exponential
    gap_nats, gap_low, gap_high     mean loss difference to the reference over the slice
    share_of_gap, low, high     uncapped share of the summed difference over all tokens

The slices of a kind (of ar_hit and other: at one cut; of repeated and new: together; of
frequency_repeated and frequency_new: together) share out all tokens. Intervals are null with
fewer than two documents.

passages.json

    {rule, cut, models: [a, b], passages: [{document, id, domain, source, start, why, gap_nats,
      tokens: [{text, token, repeat, hit, distance, train_count, losses: {model: nats or null}}]}]}

`text` may hold anything; bytes that are no UTF-8 on their own are written `\\xNN`. `start` is the
document position of the first token; an earlier occurrence of the pair of token i ends at
tokens[i - distance], or before the passage. `losses` is null where a token was not scored.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recallzoo.errors import StoreError, UnknownName, UserError
from recallzoo.files import atomic_file
from recallzoo.schemas import mistake, read_described

FORMAT = "recallzoo audit"
FORMAT_VERSION = 1
MANIFEST = "audit.json"
SETTINGS = "settings.json"
SUMMARY = "summary.parquet"
PASSAGES = "passages.json"
KEYS = ("document", "position", "token")
"""Columns that say which token a row is about."""

TOKEN_SCHEMA = {
    "document": pl.UInt32,
    "position": pl.UInt32,
    "token": pl.UInt32,
    "distance": pl.Int32,
    "occurrence": pl.Int32,
    "train_count": pl.Int64,
}
LOSS_SCHEMA = {
    "document": pl.UInt32,
    "position": pl.UInt32,
    "token": pl.UInt32,
    "loss_nats": pl.Float32,
}
SUMMARY_SCHEMA = {
    "model": pl.String,
    "reference": pl.String,
    "slice_kind": pl.String,
    "slice": pl.String,
    "slice_order": pl.Int64,
    "slice_low": pl.Int64,
    "slice_high": pl.Int64,
    "cut": pl.Int64,
    "num_tokens": pl.Int64,
    "share_of_tokens": pl.Float64,
    "loss_nats": pl.Float64,
    "ppl": pl.Float64,
    "gap_nats": pl.Float64,
    "gap_low": pl.Float64,
    "gap_high": pl.Float64,
    "share_of_gap": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
}

_MODEL = {
    **dict.fromkeys(("name", "path", "role", "dtype", "tokenizer_hash", "model_hash"), str),
    "model_type": str | None,
    "sliced": bool,
    "devices": [str, ...],
    **dict.fromkeys(("num_parameters", "num_tokens"), int),
    **dict.fromkeys(("loss_nats", "ppl", "bits_per_byte"), float),
}
_ABOUT = {
    "data": {
        **dict.fromkeys(("name", "split", "checksum"), str),
        **dict.fromkeys(("num_documents", "num_tokens", "split_num_tokens"), int),
        "max_tokens": int | None,
    },
    **dict.fromkeys(("context", "stride"), int),
    **dict.fromkeys(("bos", "documents"), str),
    "num_tokens": int | None,
    "cuts": [{"rate": float, "max_count": int}, ...],
    "pair_counts": ({"stand_in": bool, "label": str}, None),
    "models": [_MODEL],
    "reference": str | None,
    "references": [str, ...],
    "bootstrap": {"resamples": int, "level": float, "seed": int},
    "notes": [str, ...],
    "provenance": {},
}
_TOKEN = {
    "text": str,
    **dict.fromkeys(("token", "distance", "train_count"), int),
    **dict.fromkeys(("repeat", "hit"), bool),
    "losses": {...: float | None},
}
_PASSAGE = {
    **dict.fromkeys(("id", "domain", "source", "why"), str | None),
    "start": int,
    "tokens": [_TOKEN, ...],
}
_PASSAGES = {"rule": str, "cut": int | None, "models": [str, ...], "passages": [_PASSAGE, ...]}
"""What is read of audit.json and of passages.json."""
_NULLABLE = ("reference", "slice_low", "slice_high", "cut", "gap_nats", "gap_low", "gap_high",
             "share_of_gap", "low", "high")  # fmt: skip
_NOT_NEGATIVE = ("cut", "num_tokens", "share_of_tokens", "ppl")
"""Columns of the summary."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def valid_name(name: str) -> bool:
    """Whether a model may be called this: it becomes a folder's name."""
    return _NAME.fullmatch(name) is not None


def tokens_part(folder: Path, part: int) -> Path:
    """Where the labels of a part's tokens are."""
    return folder / "tokens" / f"tokens-{part:05d}.parquet"


def losses_part(folder: Path, model: str, part: int) -> Path:
    """Where a model's losses on a part are."""
    return folder / "models" / model / f"losses-{part:05d}.parquet"


def write_parquet(path: Path, columns: dict[str, Any], schema: dict[str, Any]) -> None:
    """Write a table, whole or not at all. StoreError for a full disk."""
    with atomic_file(path) as temporary:
        pl.DataFrame(columns, schema=schema).write_parquet(temporary)


def read_parquet(path: Path, schema: dict[str, Any]) -> pl.DataFrame:
    """Read a table of an audit; StoreError if it is missing, damaged or of other columns."""
    try:
        frame = pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise StoreError(f"could not read {path}: {why}. {_REMEDY}") from error
    if dict(frame.schema) != schema:
        raise StoreError(f"{path} has other columns than an audit writes. {_REMEDY}")
    return frame


@dataclass(frozen=True, eq=False)
class Audit:
    """A finished audit, to be read."""

    folder: Path
    about: dict[str, Any]
    """What audit.json holds."""

    @staticmethod
    def open(folder: str | Path) -> "Audit":
        """Open a finished audit.

        Raises UserError for a folder that holds none, an unfinished one or one of another
        version; StoreError for one that is damaged.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            unfinished = (folder / SETTINGS).exists()
            why = (
                "is an audit that was not finished. Run the same recallzoo audit command again: "
                "it continues"
                if unfinished
                else f"is no audit ({MANIFEST} is missing). Make one with recallzoo audit"
            )
            raise UserError(f"{folder} {why}.")
        about = read_described(folder / MANIFEST, {}, _MADE_ANEW)
        if about.get("format") != FORMAT:
            raise UserError(f"{folder / MANIFEST} was not written by recallzoo audit.")
        if about.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{folder} is an audit of format version {about.get('format_version')}, this "
                f"version reads {FORMAT_VERSION}. Run the audit again in another folder."
            )
        wrong = mistake(about, _ABOUT) or _contradiction(about)
        if wrong is not None:
            raise StoreError(f"{folder / MANIFEST} is damaged: {wrong}. {_MADE_ANEW}")
        return Audit(folder, about)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all models, references last."""
        return tuple(model["name"] for model in self.about["models"])

    @property
    def sliced_models(self) -> tuple[str, ...]:
        """Names of the models that have slices, and share their tokens."""
        return tuple(model["name"] for model in self.about["models"] if model["sliced"])

    def summary(self, reference: str | None = None) -> pl.DataFrame:
        """Rows of summary.parquet about one reference (the first unless named), and rows that
        compare nothing. With no reference in the audit, all rows."""
        references = self.about["references"]
        if reference is not None and reference not in references:
            raise UnknownName("reference of this audit", reference, references)
        frame = self.full_summary()
        wanted = [reference] if reference is not None else references[:1]
        return frame.filter(pl.col("reference").is_null() | pl.col("reference").is_in(wanted))

    def full_summary(self) -> pl.DataFrame:
        """All rows of summary.parquet. StoreError if it is damaged."""
        path = self.folder / SUMMARY
        frame = read_parquet(path, SUMMARY_SCHEMA)
        wrong = _wrong_column(frame) or _wrong_models(frame, self)
        if wrong is not None:
            raise StoreError(f"{path} is damaged: {wrong}. {_REMEDY}")
        return frame

    def passages(self) -> dict[str, Any]:
        """What passages.json holds. StoreError if it is damaged."""
        return read_described(self.folder / PASSAGES, _PASSAGES, _MADE_ANEW)

    def losses(self, model: str) -> pl.DataFrame:
        """Losses of a model on every scored token."""
        if model not in self.models:
            raise UnknownName("model in this audit", model, self.models)
        return self._all(f"models/{model}/losses-*.parquet", LOSS_SCHEMA)

    def tokens(self) -> pl.DataFrame:
        """Labels of every scored token of the sliced models."""
        return self._all("tokens/tokens-*.parquet", TOKEN_SCHEMA)

    def token_losses(self, models: Sequence[str] | None = None) -> pl.DataFrame:
        """Labels of every token, with a column of losses for each sliced model, by its name."""
        names = self.sliced_models if models is None else tuple(models)
        frame = self.tokens()
        for name in names:
            losses = self.losses(name)
            require_same_tokens(frame, losses, self.folder / "models" / name)
            frame = frame.with_columns(losses["loss_nats"].alias(name))
        return frame

    def _all(self, pattern: str, schema: dict[str, Any]) -> pl.DataFrame:
        paths = sorted(self.folder.glob(pattern))
        if not paths:
            return pl.DataFrame(schema=schema)
        return pl.concat([read_parquet(path, schema) for path in paths])


def require_same_tokens(labels: pl.DataFrame, losses: pl.DataFrame, where: Path) -> None:
    """StoreError unless two tables are about the same tokens, row by row."""
    if not labels.select(KEYS).equals(losses.select(KEYS)):
        raise StoreError(
            f"{where} is about other tokens than {where.name} should be: it was changed after it "
            f"was written. {_REMEDY}"
        )


def _contradiction(about: dict[str, Any]) -> str | None:
    """What of audit.json does not fit the rest of it."""
    names = [model["name"] for model in about["models"]]
    for name in about["references"]:
        if name not in names:
            return f"its reference {name!r} is none of its models"
    if about["reference"] != next(iter(about["references"]), None):
        return f"reference is {about['reference']!r}, where the first of references is wanted"
    is_sliced = any(model["sliced"] for model in about["models"])
    if not is_sliced == bool(about["cuts"]) == (about["pair_counts"] is not None):
        return "sliced models, cuts and pair_counts go together, and one of them is missing"
    return None


def _wrong_column(summary: pl.DataFrame) -> str | None:
    for name, kind in SUMMARY_SCHEMA.items():
        column = summary[name]
        if name not in _NULLABLE and column.has_nulls():
            return f"{name} has a row without a value"
        if kind == pl.Float64 and not column.is_finite().all():
            return f"{name} has a row that is no finite number"
        if name in _NOT_NEGATIVE and (column < 0).any():
            return f"{name} has a row below 0"
    if summary.filter(pl.col("slice_kind").is_in(["ar_hit", "other"]))["cut"].has_nulls():
        return "cut has no value in a row of AR hits or of other tokens"
    return None


def _wrong_models(summary: pl.DataFrame, audit: Audit) -> str | None:
    for name in audit.models:
        if name not in summary["model"]:
            return f"it has no row of the model {name!r}"
    others = (set(summary["model"]) - set(audit.models)) | (
        set(summary["reference"]) - {None, *audit.about["references"]}
    )
    return f"it has rows of {min(others)!r}, which {MANIFEST} does not name" if others else None


_REMEDY = "Delete the file and run the same recallzoo audit command again: only it is made anew."
_MADE_ANEW = (
    "Run the same recallzoo audit command again: it makes the file anew and keeps the losses."
)
