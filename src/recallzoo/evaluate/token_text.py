"""The bytes of single tokens: for bits per byte, and to show passages token by token."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recallzoo.errors import UserError
from recallzoo.text.tokenizer import read_tokenizer_file

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """What each id of a tokenizer stands for, as bytes.

    Exact for byte-level tokenizers (GPT-2, Llama 3, those trained here) and for sentencepiece
    with byte fallback; for others a token's own characters, which is close.
    """

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: a `tokenizers.Tokenizer`, or a transformers tokenizer without one."""
        self._tokenizer = tokenizer
        is_rust = hasattr(tokenizer, "to_str")
        described = tokenizer.to_str() if is_rust else ""
        self._is_byte_level = '"ByteLevel"' in described
        if is_rust:
            added = tokenizer.get_added_tokens_decoder()
            self._piece = tokenizer.id_to_token
            self._added = {id_: token.content for id_, token in added.items()}
        else:
            self._piece = tokenizer.convert_ids_to_tokens
            self._added = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items()}

    @staticmethod
    def load(folder: Path) -> "TokenText":
        """From a folder with tokenizer.json, or with what transformers loads."""
        if (folder / "tokenizer.json").is_file():
            return TokenText(read_tokenizer_file(folder / "tokenizer.json"))
        try:
            from transformers import AutoTokenizer

            loaded: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f"no tokenizer could be loaded from {folder}: {error}") from error
        return TokenText(getattr(loaded, "backend_tokenizer", None) or loaded)

    @functools.lru_cache(maxsize=1 << 18)  # noqa: B019  one object an audit
    def bytes_of(self, token: int) -> bytes:
        """The bytes a token adds to a text; nothing for an id without a token."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._piece(token)
        if piece is None:
            return b""
        if self._is_byte_level:
            alphabet = _byte_alphabet()
            if all(character in alphabet for character in piece):
                return bytes(alphabet[character] for character in piece)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.removeprefix("##").replace("▁", " ").encode()

    def shown(self, token: int) -> str:
        """A token as text; bytes that are no UTF-8 on their own as `\\xNN`."""
        return self.bytes_of(token).decode("utf-8", errors="backslashreplace")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of many tokens, by the tokenizer itself."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, others are shifted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }
