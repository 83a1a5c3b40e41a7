"""InfiniteBench's prompt templates: checked, and cut where the query begins."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

from hcache.benchmarks.scoring.infinitebench import LETTERS
from hcache.benchmarks.source import DataError
from hcache.registry import unknown_name

_NAMES = frozenset(
    ("context", "input", "question", "func", "func_call", "prefix", *(f"OPTION_{x}" for x in LETTERS))
)


@dataclass(frozen=True)
class Template:
    """A prompt's text with placeholders, cut where the query begins.

    Args:
        head: to the end of the context and the white space behind it.
        tail: the rest, the query.
        names: of its placeholders.
    """

    head: str
    tail: str
    names: frozenset[str]

    @classmethod
    def of(cls, text: str, where: str) -> Template:
        """Raises DataError for a text that has no context, or placeholders that nothing is known of."""
        try:
            names = frozenset(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)
        except ValueError as error:
            raise DataError(f"{where} is no template: {error}") from error
        if names - _NAMES:
            named = unknown_name("placeholder", min(names - _NAMES), _NAMES)
            raise DataError(f"{where}: {named}")
        before, context, after = text.rpartition("{context}")
        if not context:
            raise DataError(f"{where} has no {{context}}")
        tail = after.lstrip()
        return cls(before + context + after[: len(after) - len(tail)], tail, names)

    def filled(self, values: Mapping[str, str]) -> tuple[str, str]:
        """(context, question): together what `str.format` makes of the whole text."""
        return self.head.format(**values), self.tail.format(**values)
