"""Named things: a registry that answers an unknown name with the nearest known one.

Knows nothing of what it holds.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, Generic, TypeVar

T = TypeVar("T")
E = TypeVar("E", bound=Enum)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown `name`: the nearest known names, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"unknown {kind} '{name}'{hint} (known: {', '.join(names)})"


def choice(kind: type[E], setting: str, given: Any) -> E:
    """A member of `kind` from its value; `setting` is what messages call it.

    Raises:
        ValueError: no such member; with a suggestion.
    """
    if isinstance(given, kind):
        return given
    known = [str(member.value) for member in kind]
    if given not in known:
        raise ValueError(unknown_name(setting, str(given), known))
    return kind(given)


class Registry(Generic[T]):
    """Names to classes of one kind.

    Args:
        kind: what the entries are called in messages, for example "method".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator. Raises ValueError if another class has the name already."""

        def add(cls: type[T]) -> type[T]:
            taken = self._entries.get(name)
            if taken is not None and taken.__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.kind} '{name}' is already registered by {taken.__module__}")
            self._entries[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return add

    def get(self, name: str) -> type[T]:
        """The class registered as `name`. Raises ValueError with a suggestion."""
        if name not in self._entries:
            raise ValueError(unknown_name(self.kind, name, self._entries))
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)
