"""Reading documents: plain text, JSON Lines, Parquet, Hugging Face datasets, folders of these.

Every reader yields `(number, Document or Problem)` in the order of the file, the number being
the record's place in it (a JSON line, a Parquet row), so that reading can go on from any
place. What to do with a problem is for the caller to decide.

Files may be compressed: .gz, .bz2, .xz, .zst (zstd with windows up to 2 GiB). A file that is
cut short is an error whatever the compression, never a short corpus.
"""

import bz2
import codecs
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recallzoo.errors import UserError

TextDocuments = Literal["file", "line", "paragraph"]

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_PLAIN = (".txt", ".text", ".md")
_JSON = (".jsonl", ".ndjson", ".json")
_PARQUET = (".parquet",)
_READ_BYTES = 1 << 20
HUGGING_FACE = "hf:"


@dataclass(frozen=True)
class Document:
    """One document of a corpus."""

    text: str
    id: str
    domain: str
    source: str
    """Where it comes from, in the corpus's own words; empty if it does not say."""
    num_bytes: int
    """UTF-8 bytes of the text."""


@dataclass(frozen=True)
class Problem:
    """A record that is no document."""

    kind: Literal["empty", "invalid_utf8", "invalid_json", "no_text", "text_no_string"]
    message: str


@dataclass(frozen=True)
class Fields:
    """Names of the fields (JSON) or columns (Parquet, datasets) that hold a document."""

    text: str = "text"
    id: str = "id"
    domain: str = "domain"
    source: str = "source"


@dataclass(frozen=True)
class SourceFile:
    """One file, or one Hugging Face dataset, of a corpus."""

    name: str
    """Its path within the source it was found in, or the dataset's name: the same on every
    machine, and the start of ids that documents do not bring."""
    path: Path | None
    """None for a Hugging Face dataset."""
    kind: Literal["text", "json", "parquet", "hf"]
    domain: str
    """Of documents that bring none: the folder within the source, else "all"."""


def find_files(source: str) -> tuple[list[SourceFile], list[str]]:
    """The files of a source, sorted by name, and names of what in a folder is no text.

    source  a file, a folder (searched throughout, linked folders too; what is hidden is left out)
            or `hf:NAME[:CONFIG[:SPLIT]]` (the split is "train" unless given).

    Raises UserError for what does not exist, is of an unknown type, cannot be looked into, or holds
    no text file.
    """
    if source.startswith(HUGGING_FACE):
        return [SourceFile(_name_of_dataset(source), None, "hf", "all")], []
    path = Path(source)
    if path.is_file():
        kind = _kind_of(path)
        if kind is None:
            raise UserError(
                f"{source} is of no known type. Known: {', '.join(_PLAIN + _JSON + _PARQUET)}, "
                f"each also with {', '.join(_COMPRESSED)}."
            )
        return [SourceFile(path.name, path, kind, "all")], []
    if not path.is_dir():
        raise UserError(
            f"no file or folder is called {source!r}. For a Hugging Face dataset write "
            f"{HUGGING_FACE}{source}."
        )
    found, ignored = [], []
    for file in sorted(_entries(path)):
        name = file.relative_to(path)
        kind = _kind_of(file) if file.is_file() else None  # or a link to nothing, or in a circle
        domain = name.parts[0] if len(name.parts) > 1 else "all"
        if kind is None:
            ignored.append(name.as_posix())
        else:
            found.append(SourceFile(name.as_posix(), file, kind, domain))
    if not found:
        raise UserError(
            f"folder {source} holds no text: none of {len(ignored)} files ends in "
            f"{', '.join(_PLAIN + _JSON + _PARQUET)} (or these with {', '.join(_COMPRESSED)})."
        )
    return found, ignored


def _entries(folder: Path) -> Iterator[Path]:
    """Files of a folder and of those in it, and links to a folder that they lie in."""

    def refuse(error: OSError) -> None:
        raise UserError(f"could not look into {error.filename}: {error.strerror}.") from error

    for where, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        here = Path(where)
        for name in list(folders):
            inside = here / name
            if name.startswith("."):
                folders.remove(name)
            elif inside.is_symlink() and here.resolve().is_relative_to(inside.resolve()):
                folders.remove(name)
                yield inside
        yield from (here / name for name in files if not name.startswith("."))


def _name_of_dataset(source: str) -> str:
    name = source.removeprefix(HUGGING_FACE)
    if not name.partition(":")[0] or name.count(":") > 2:
        raise UserError(
            f"{source!r} names no dataset. Write {HUGGING_FACE}NAME, {HUGGING_FACE}NAME:CONFIG or "
            f"{HUGGING_FACE}NAME:CONFIG:SPLIT; NAME may be a folder."
        )
    return name


def read_documents(
    file: SourceFile,
    fields: Fields | None = None,
    *,
    text_documents: TextDocuments = "file",
    skip: int = 0,
) -> Iterator[tuple[int, Document | Problem]]:
    """Read one file, from record number `skip` on.

    text_documents  what a document is in plain text: the whole file, each line, or each
                    paragraph (lines between empty lines).

    Raises UserError if the file itself cannot be read: missing, cut short, not what its name
    says, or without the text column.
    """
    fields = fields or Fields()
    if file.kind == "hf":
        return _read_rows(file, _dataset_rows(file.name, fields, skip), fields, skip)
    assert file.path is not None
    if file.kind == "parquet":
        return _read_rows(file, _parquet_rows(file.path, fields, skip), fields, skip)
    if file.kind == "json":
        return _read_json_lines(file, fields, skip)
    return _read_text(file, text_documents, skip)


def _kind_of(path: Path) -> Literal["text", "json", "parquet"] | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last in _PARQUET:
        return "parquet" if path.suffix.lower() in _PARQUET else None
    return "text" if last in _PLAIN else "json" if last in _JSON else None


def _document(
    file: SourceFile,
    number: int,
    text: str,
    given: dict[str, Any] | None = None,
    fields: Fields | None = None,
) -> Document | Problem:
    where = f"{file.name}, record {number + 1}"
    if not text or text.isspace():
        return Problem("empty", f"{where} has no text")
    given, fields = given or {}, fields or Fields()
    id_, domain, source = (given.get(name) for name in (fields.id, fields.domain, fields.source))
    document = Document(
        text=text,
        id=f"{file.name}:{number}" if id_ is None else str(id_),
        domain=file.domain if domain is None else str(domain),
        source="" if source is None else str(source),
        num_bytes=len(text.encode(errors="surrogatepass")),
    )
    for name, value in (
        ("text", text),
        ("id", document.id),
        ("domain", document.domain),
        ("source", document.source),
    ):
        try:
            value.encode()
        except UnicodeEncodeError:
            return Problem(
                "invalid_utf8",
                f"{where} holds half a surrogate pair in its {name}, which is no character",
            )
    return document


def _read_json_lines(
    file: SourceFile, fields: Fields, skip: int
) -> Iterator[tuple[int, Document | Problem]]:
    assert file.path is not None
    for number, line in enumerate(_lines(file.path)):
        if number < skip or not line.strip():
            continue
        where = f"{file.name}, line {number + 1}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield number, Problem("invalid_utf8", f"{where} is not UTF-8 ({error.reason})")
            continue
        except (ValueError, RecursionError) as error:  # ValueError: also numbers of 5,000 digits
            yield number, Problem("invalid_json", f"{where} is not JSON ({error})")
            continue
        if not isinstance(record, dict):
            kind = type(record).__name__
            yield number, Problem("invalid_json", f"{where} is a JSON {kind}, not an object")
            continue
        yield number, _from_record(file, number, where, record, fields)


def _from_record(
    file: SourceFile, number: int, where: str, record: dict[str, Any], fields: Fields
) -> Document | Problem:
    try:
        record = {k: v.decode() if isinstance(v, bytes) else v for k, v in record.items()}
    except UnicodeDecodeError as error:
        return Problem("invalid_utf8", f"{where} is not UTF-8 ({error.reason})")
    text = record.get(fields.text)
    if isinstance(text, str):
        return _document(file, number, text, record, fields)
    if fields.text not in record:
        have = ", ".join(map(repr, list(record)[:8]))
        return Problem("no_text", f"{where} has no field {fields.text!r}; it has {have}")
    if text is None:
        return Problem("empty", f"{where} has no text")
    return Problem("text_no_string", f"{where}: {fields.text!r} is of type {type(text).__name__}")


def _read_text(
    file: SourceFile, text_documents: TextDocuments, skip: int
) -> Iterator[tuple[int, Document | Problem]]:
    assert file.path is not None
    for number, piece in enumerate(_text_pieces(file.path, text_documents)):
        if number < skip or (text_documents != "file" and not piece.strip()):
            continue
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            where = f"{file.name}, record {number + 1}"
            yield number, Problem("invalid_utf8", f"{where} is not UTF-8 ({error.reason})")
            continue
        yield number, _document(file, number, text)


def _text_pieces(path: Path, text_documents: TextDocuments) -> Iterator[bytes]:
    if text_documents == "file":
        yield b"".join(_chunks(path))
    elif text_documents == "line":
        yield from _lines(path)
    else:
        paragraph: list[bytes] = []
        for line in _lines(path):
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield b"\n".join(paragraph)
                paragraph = []
        if paragraph:
            yield b"\n".join(paragraph)


def _lines(path: Path) -> Iterator[bytes]:
    begun: list[bytes] = []  # pieces of a line that the next chunks go on with
    for chunk in _chunks(path):
        first, *others = chunk.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            *whole, last = others
            yield from whole
            begun = [last]
    if last := b"".join(begun):
        yield last


def _chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed and without a byte order mark; UserError if it is cut short
    or not what it says."""
    head: bytes | None = b""
    for chunk in _decompressed(path):
        if head is not None:
            head += chunk
            if len(head) < len(codecs.BOM_UTF8):
                continue
            chunk, head = head.removeprefix(codecs.BOM_UTF8), None
        yield chunk
    if head:
        yield head


def _decompressed(path: Path) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            yield from _zstd_chunks(path)
            return
        openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        with openers.get(suffix, open)(path, "rb") as stream:
            while chunk := stream.read(_READ_BYTES):
                yield chunk
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(_damaged(path, suffix, error)) from error
    except OSError as error:
        if error.errno is None:  # bz2 says "Invalid data stream" this way
            raise UserError(_damaged(path, suffix, error)) from error
        raise UserError(f"could not read {path}: {error.strerror}.") from error


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(
            f"reading {path} needs zstandard: pip install 'recallzoo[text]'."
        ) from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    with path.open("rb") as stream:
        frame = None
        try:
            while chunk := stream.read(_READ_BYTES):
                while chunk:
                    frame = frame or decompressor.decompressobj()
                    if out := frame.decompress(chunk):
                        yield out
                    chunk = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
        except zstandard.ZstdError as error:
            raise UserError(_damaged(path, ".zst", error)) from error
    if frame is not None:
        raise UserError(_damaged(path, ".zst", "it ends in the middle"))


def _damaged(path: Path, suffix: str, error: object) -> str:
    return (
        f"{path} cannot be decompressed as {suffix} ({error}): it is cut short, damaged or of "
        f"another type. Fetch it again."
    )


def _read_rows(
    file: SourceFile, rows: Iterator[dict[str, Any]], fields: Fields, skip: int
) -> Iterator[tuple[int, Document | Problem]]:
    for number, row in enumerate(rows, start=skip):
        yield number, _from_record(file, number, f"{file.name}, row {number + 1}", row, fields)


def _parquet_rows(path: Path, fields: Fields, skip: int) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install 'recallzoo[text]'.") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if fields.text not in names:
                raise UserError(_no_column(str(path), fields.text, names))
            columns = [name for name in _wanted(fields) if name in names]
            groups, before = _row_groups_from(file, skip)
            for batch in file.iter_batches(1024, row_groups=groups, columns=columns):
                rows = _undecoded(batch).to_pylist()
                yield from rows[max(0, skip - before) :]
                before += len(rows)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as Parquet: {error} Fetch it again.") from error
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror or error}.") from error


def _undecoded(batch: Any) -> Any:
    """A record batch with its strings as bytes: Parquet may hold some that are no UTF-8, which
    are problems of their rows and not of the batch."""
    import pyarrow

    for place, field in enumerate(batch.schema):
        column = batch.column(place)
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if str(column.type) in ("string", "large_string", "string_view"):
            column = column.cast(pyarrow.large_binary())
        batch = batch.set_column(place, field.name, column)
    return batch


def _row_groups_from(file: Any, skip: int) -> tuple[list[int], int]:
    """Row groups that hold rows from `skip` on, and the rows before them."""
    before, first = 0, 0
    for first in range(file.num_row_groups):
        rows = file.metadata.row_group(first).num_rows
        if before + rows > skip:
            break
        before += rows
    else:
        return [], before
    return list(range(first, file.num_row_groups)), before


def _dataset_rows(name: str, fields: Fields, skip: int) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"reading {HUGGING_FACE}{name} needs datasets: pip install 'recallzoo[text]'."
        ) from error
    path, config, split = (*name.split(":"), "", "")[:3]
    try:
        rows: Any = datasets.load_dataset(
            path, config or None, split=split or "train", streaming=True
        )
    except Exception as error:  # the library raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"dataset {path!r} (config {config or 'default'}, split {split or 'train'}) could not "
            f"be opened: {reason}. Check its name, {HUGGING_FACE}NAME:CONFIG:SPLIT; one from the "
            f"hub needs a network."
        ) from error
    if rows.column_names is not None:
        if fields.text not in rows.column_names:
            raise UserError(_no_column(HUGGING_FACE + name, fields.text, rows.column_names))
        rows = rows.select_columns([n for n in _wanted(fields) if n in rows.column_names])
    yield from rows.skip(skip)


def _wanted(fields: Fields) -> Sequence[str]:
    return list(dict.fromkeys((fields.text, fields.id, fields.domain, fields.source)))


def _no_column(where: str, wanted: str, names: Sequence[str]) -> str:
    return (
        f"{where} has no column {wanted!r}; it has {', '.join(map(repr, names))}. Name the one "
        f"that holds the text with --text-field."
    )
