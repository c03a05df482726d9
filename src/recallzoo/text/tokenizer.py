"""Tokenizers: loaded from a file, a folder or the hub, or trained on the corpus.

A tokenizer here turns text into ids and nothing else. Special tokens are not added, and text
that spells one (`<|endoftext|>` in a document about tokenizers) is encoded as the characters
it is made of, so that no document can forge a boundary.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from recallzoo.errors import UserError
from recallzoo.files import write_json

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
"""Boundary token of trained tokenizers."""
LONGEST_WORD = 2_000
_LONG_BLANK = re.compile(rf"\s{{{LONGEST_WORD + 1}}}")
_LONG_WORD = re.compile(
    "|".join(
        f"{kind}{{{LONGEST_WORD + 1},}}" for kind in (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s")
    )
)


class Encoder(Protocol):
    """What `prepare` needs of a tokenizer."""

    @property
    def hash(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def origin(self) -> str: ...
    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]: ...
    def id_of(self, token: str) -> int | None: ...
    def default_boundary(self, position: str) -> str | None: ...
    def save(self, folder: Path) -> None: ...


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash equal for tokenizers that turn every text into the same ids.

    tokenizer  a `tokenizers.Tokenizer` or a `transformers` tokenizer.

    It covers model, vocabulary, merges, normaliser, pre-tokeniser and added tokens; not
    truncation, padding, templates and decoders, which `prepare` and an audit do not use. A
    `transformers` tokenizer without a Rust backend is hashed by its class and vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        described = json.loads(backend.to_str())
        model = described["model"]
        # Merges are written as "a b" by old versions and as ["a", "b"] by new ones.
        if "merges" in model:
            model["merges"] = [
                tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
                for merge in model["merges"]
            ]
        kept = {
            "model": model,
            "normalizer": described.get("normalizer"),
            "pre_tokenizer": described.get("pre_tokenizer"),
            "added_tokens": sorted(
                (token["id"], token["content"]) for token in described.get("added_tokens", [])
            ),
        }
    else:
        kept = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    text = json.dumps(kept, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class RustEncoder:
    """A `tokenizers.Tokenizer`; encodes a batch on all cores."""

    tokenizer: "tokenizers.Tokenizer"
    origin: str
    special: dict[str, str]
    """Roles (`eos_token`, `bos_token`, ...) of tokens, as tokenizer_config.json names them."""

    @property
    def hash(self) -> str:
        return tokenizer_hash(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        ids = self.tokenizer.get_vocab(with_added_tokens=True).values()
        return max(ids, default=-1) + 1  # ids may have gaps

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def id_of(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def default_boundary(self, position: str) -> str | None:
        return self.special.get("bos_token" if position == "start" else "eos_token")

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", **self.special},
        )


@dataclass(frozen=True, eq=False)
class PythonEncoder:
    """A `transformers` tokenizer without a Rust backend: one core, one text at a time."""

    tokenizer: Any
    origin: str

    @property
    def hash(self) -> str:
        return tokenizer_hash(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        return max(max(self.tokenizer.get_vocab().values(), default=-1) + 1, len(self.tokenizer))

    def encode(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [
            self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            for text in texts
        ]

    def id_of(self, token: str) -> int | None:
        return self.tokenizer.get_vocab().get(token)

    def default_boundary(self, position: str) -> str | None:
        return self.tokenizer.bos_token if position == "start" else self.tokenizer.eos_token

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def load_encoder(name: str) -> Encoder:
    """A tokenizer.json, a folder with one (or with what transformers loads), or a hub name."""
    path = Path(name)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return _rust(read_tokenizer_file(path / "tokenizer.json"), path.name, _roles(path))
    if path.is_file():
        return _rust(read_tokenizer_file(path), path.name, {})
    try:
        from transformers import AutoTokenizer

        # Unless told, transformers asks on the terminal whether to run what comes with it.
        loaded: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ImportError as error:
        raise UserError(
            f"tokenizer {name!r} is no tokenizer.json and no folder with one, and loading it by "
            f"name needs transformers: pip install 'recallzoo[text]'."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer could be loaded from {name!r}: {str(error).splitlines()[0]} Give a "
            f"tokenizer.json, a folder that holds one, or a hub name with a network; or leave "
            f"the tokenizer out to train one on the corpus."
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        return PythonEncoder(loaded, name)
    return _rust(
        backend,
        name,
        {k: str(v) for k, v in loaded.special_tokens_map.items() if isinstance(v, str)},
    )


def read_tokenizer_file(path: Path) -> "tokenizers.Tokenizer":
    """Read a tokenizer.json; UserError if it is none, or the library is not installed."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError(
            "reading a tokenizer needs the tokenizers library: pip install 'recallzoo[text]'."
        ) from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no kind of its own
        raise UserError(f"{path} is no tokenizer.json that can be read: {error}.") from error


def train_encoder(texts: Iterable[str], vocab_size: int, progress: bool) -> RustEncoder:
    """Train a byte-level BPE: any text can be encoded, and nothing is lost on the way.

    The same texts in the same order give the same tokenizer. A small corpus may have too few
    words for `vocab_size`; the tokenizer is then smaller.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise UserError(
            f"vocab_size={vocab_size} is too small for a byte-level BPE: 256 bytes and the end of "
            f"text are {len(alphabet) + 1} already."
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=progress,
    )
    pieces = (piece for text in texts for piece in without_long_words(text))
    tokenizer.train_from_iterator(pieces, trainer)
    special = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    return _rust(tokenizer, "byte-level BPE trained on this corpus", special)


def without_long_words(text: str) -> Iterator[str]:
    """A text in pieces that have no word of over 2,000 characters, and make it up together.

    A trainer's time grows with the square of a word's length: a gene of 300,000 letters took it
    two minutes. Words are what the byte-level pre-tokeniser keeps together: letters, digits,
    other signs, or blanks. A text without such long ones is one piece.
    """
    if max(map(len, text.split()), default=0) <= LONGEST_WORD and not _LONG_BLANK.search(text):
        yield text  # as nearly all are, found three times as fast
        return
    start = 0
    for word in _LONG_WORD.finditer(text):
        for cut in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _rust(tokenizer: "tokenizers.Tokenizer", origin: str, special: dict[str, str]) -> RustEncoder:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return RustEncoder(tokenizer, origin, special)


def _roles(folder: Path) -> dict[str, str]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no options by name. Take it from the tokenizer again.")
    roles = {}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(role)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            roles[role] = value
    return roles
