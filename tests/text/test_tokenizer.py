"""Texts that a tokenizer is trained on."""

import pytest
from tokenizers import pre_tokenizers

from recallzoo.text.tokenizer import LONGEST_WORD, without_long_words

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize("word", ["gene", "é", "日本", "12", "_-", "\t ", "\n"])
def test_a_trainer_sees_no_word_that_would_take_it_hours(word):
    text = f"before {word * 5_000} after, {word * 3_000}"
    pieces = list(without_long_words(text))
    assert "".join(pieces) == text
    longest = max(
        end - start for piece in pieces for _, (start, end) in BYTE_LEVEL.pre_tokenize_str(piece)
    )
    assert longest <= LONGEST_WORD + 1  # a word may begin with a blank


def test_texts_of_ordinary_words_are_whole():
    text = "Ada met Bo, 12 times; " * 10_000
    assert list(without_long_words(text)) == [text]
    assert list(without_long_words("a" * LONGEST_WORD)) == ["a" * LONGEST_WORD]
