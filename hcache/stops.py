"""Texts that end an answer, as the tokens that end it. Knows no model."""

from __future__ import annotations

from typing import Any


def stop_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a stop text as it comes in the middle of other text.

    Tokenizers of the SentencePiece kind put a space before a text that stands alone, often as a token of its
    own: of the tokens, the last ones that alone are the text are taken.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    for begin in range(len(ids) - 1, 0, -1):
        if tokenizer.decode(ids[begin:]) == text:
            return ids[begin:]
    return ids
