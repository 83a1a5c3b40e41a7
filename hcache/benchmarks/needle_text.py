"""The text around a needle, in tokens: generated or of files, where the needle goes, what size fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from hcache.benchmarks.source import DataError
from hcache.tiny.prose import prose

SPARE_TOKENS = 32  # beyond those used, so that where the text is cut changes none of them
SLACK_TOKENS = 2  # a prompt of a tokenizer that merges over seams may be so much shorter than asked


def insertion(ids: Sequence[int], depth: float, tokens: Tokens) -> int:
    """Before which token the needle goes: at `depth` percent and back to just after the last sentence end.

    At 100 the end as it is; where no sentence ends before, the start.
    """
    if depth == 100:
        return len(ids)
    point = int(len(ids) * depth / 100)
    while point and not tokens.ends_sentence(ids[point - 1]):
        point -= 1
    return point


class Tokens:
    """A tokenizer as this benchmark uses one; bytes without one.

    Args:
        tokenizer: of transformers, or anything with its `encode` and `decode`; None for bytes.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, without any that the tokenizer adds."""
        if self._tokenizer is None:
            return list(text.encode())
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, without a last character that was cut in two."""
        if self._tokenizer is None:
            return bytes(ids).decode(errors="ignore")
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.rstrip("\ufffd")

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, the tokenizer's own start token included."""
        return len(prompt.encode()) if self._tokenizer is None else len(self._tokenizer.encode(prompt))

    def ends_sentence(self, token: int) -> bool:
        """Whether a token ends in a full stop, white space aside."""
        if self._tokenizer is None:
            return token == ord(".")
        return self.text([token]).strip().endswith(".")


class Prose:
    """Generated prose, measured in tokens."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def ids(self, name: str, count: int) -> list[int]:
        """The first `count` tokens of the prose of this name."""
        size = count + SPARE_TOKENS
        while True:
            found = self._tokens.ids(prose(Random(f"{name}-prose"), size))
            if len(found) >= count + SPARE_TOKENS:
                return found[:count]
            size = 2 * size

    def repeats(self, count: int) -> int:
        """How often the text is begun; prose has no end."""
        return 1


class Files:
    """Texts of a user, joined and repeated as often as a prompt needs, measured in tokens.

    Raises:
        DataError: a file that is no UTF-8 text, or files without any text.
    """

    def __init__(self, tokens: Tokens, files: Sequence[Path]) -> None:
        self._tokens = tokens
        self._text = "".join(_read(path) for path in files)
        if not self._text.strip():
            raise DataError(f"the haystack {files[0]} holds no text; name another benchmark.haystack")
        self._repeated = {1: tokens.ids(self._text)}
        self._once = len(self._repeated[1])

    def ids(self, name: str, count: int) -> list[int]:
        """The first `count` tokens, whatever the name."""
        times = self.repeats(count)
        while True:
            if times not in self._repeated:
                self._repeated[times] = self._tokens.ids(self._text * times)
            if len(self._repeated[times]) >= count:
                return self._repeated[times][:count]
            times += 1  # tokens merge where the text begins again

    def repeats(self, count: int) -> int:
        """How often the text is begun in its first `count` tokens."""
        return -(-count // self._once)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error}); convert it, or leave it out") from error


def fitted(measure: Callable[[int], int], limit: int, first: int, most: int) -> int | None:
    """A size whose measure is `limit` or, where tokens merge over seams, just below; None where none is.

    Args:
        first: tried first; then what the gap asks for.
        most: the largest size there is.
    """
    size, tried, best = first, set[int](), 0
    while size > best:
        gap = limit - measure(size)
        tried.add(size)
        if gap >= 0:
            best = max(best, size)
            if gap <= SLACK_TOKENS:
                return size
        size = min(size + gap, most)
        while size in tried:
            size -= 1
    return best or None
