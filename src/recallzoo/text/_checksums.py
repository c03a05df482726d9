"""Checksums of files, and JSON that carries its own."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recallzoo.errors import StoreError
from recallzoo.files import read_json, write_json

_CHUNK_BYTES = 1 << 22


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes; StoreError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise StoreError(f"could not read {path}: {error.strerror or error}.") from error
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON with its own checksum in it, so that a flipped bit is noticed."""
    write_json(path, {**value, "sha256": digest_of(value)})


def read_sealed_json(path: Path, what: str) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote; StoreError if it is not that any more."""
    value = read_json(path, f"make the {what} again")
    if not isinstance(value, dict) or digest_of(
        {key: part for key, part in value.items() if key != "sha256"}
    ) != value.get("sha256"):
        raise StoreError(
            f"{path} does not match its own checksum: it was damaged or edited after it was "
            f"written. Make the {what} again."
        )
    del value["sha256"]
    return value


def describe_file(path: Path) -> dict[str, Any]:
    """Size and checksum, as manifests hold them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def check_files(
    folder: Path, expected: Iterable[tuple[str, dict[str, Any]]], *, verify: bool, remedy: str
) -> None:
    """Compare files with their manifest entries: sizes always, checksums if `verify`.

    Raises StoreError naming the first file that is missing, cut short or changed.
    """
    for name, entry in expected:
        path = folder / name
        if not path.is_file():
            raise StoreError(f"{path} is missing. {remedy}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise StoreError(
                f"{path} has {size:,} bytes, its manifest says {entry['bytes']:,}: it was cut "
                f"short or changed. {remedy}"
            )
        if verify and sha256_of(path) != entry["sha256"]:
            raise StoreError(f"{path} does not match its checksum: it is damaged. {remedy}")
