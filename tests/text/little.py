"""A little corpus, prepared."""

import hashlib
from pathlib import Path

from recallzoo.text import PrepareOptions, TokenData, prepare
from tests.text import corpora

ROWS = corpora.documents(300)


def options(folder: Path, **changes) -> PrepareOptions:
    """Options for a small corpus beside `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = folder.parent / "corpus.jsonl"
    if not source.exists():
        corpora.json_lines(source, ROWS)
    defaults = {
        "out": folder,
        "sources": (str(source),),
        "valid_fraction": 0.1,
        "test_fraction": 0.1,
        "vocab_size": 400,
        "shard_tokens": 5000,
        "name": "little",
    }
    return PrepareOptions(**{**defaults, **changes})


def made(folder: Path, **changes) -> TokenData:
    return prepare(options(folder, **changes), progress=False)


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def texts(data: TokenData, split: str) -> dict[str, str]:
    tokenizer, part = data.tokenizer(), data.split(split)
    return {
        row["id"]: tokenizer.decode(part.document(i).tolist()[:-1])
        for i, row in enumerate(part.documents().iter_rows(named=True))
    }
