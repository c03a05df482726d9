"""Prepared data with given tokens: `prepare` writes it, a pretended tokenizer makes the ids."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from recallzoo.text import PrepareOptions, TokenData, prepare
from tests.text import corpora


def write_data(
    folder: Path,
    documents: Sequence[np.ndarray],
    vocab_size: int,
    *,
    shard_tokens: int = 2**26,
    name: str | None = None,
) -> TokenData:
    """A data folder whose training documents are these ids, in an order of its own."""
    tokenizer = folder.with_name(f"{folder.name}.words-{vocab_size}.json")
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    if not tokenizer.exists():
        words = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
        words.save(str(tokenizer))
    rows = [
        {"text": " ".join(map(str, tokens.tolist())), "id": str(i)}
        for i, tokens in enumerate(documents)
    ]
    source = corpora.json_lines(folder.with_name(f"{folder.name}.jsonl"), rows)
    return prepare(
        PrepareOptions(
            out=folder,
            train=(str(source),),
            tokenizer=str(tokenizer),
            boundary="none",
            shard_tokens=shard_tokens,
            count_pairs=False,
            name=name,
        ),
        progress=False,
    )


def zipf_documents(
    seed: int, number: int, vocab_size: int, longest: int = 3000
) -> list[np.ndarray]:
    """Documents of up to so many ids, of which some are much more frequent than others."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab_size + 1)
    lengths = rng.integers(1, longest, size=number)
    return [rng.choice(vocab_size, size=n, p=weights / weights.sum()) for n in lengths]
