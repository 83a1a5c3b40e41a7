"""The size of a RULER prompt: the largest for which prompt and answer stay within the length asked for.

Each size is tried on a fresh draw, so sizes are as large as that one draw allowed; a sample that then comes
out too long is drawn again, smaller. Knows no task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hcache.benchmarks.ruler_template import Parts


class Maker(Protocol):
    """Draws prompts of a size (lines, words or documents).

    Args:
        step: how much smaller a prompt is drawn that was too long.
        least: the smallest size.
        most: the largest; None for any.
    """

    @property
    def step(self) -> int: ...

    @property
    def least(self) -> int: ...

    @property
    def most(self) -> int | None: ...

    def draw(self, size: int, index: int) -> Parts:
        """The prompt of sample `index`; every call draws anew."""
        ...


@dataclass(frozen=True)
class Room:
    """What a prompt must fit into.

    Args:
        count: tokens of a text.
        length: tokens of prompt and answer.
        new_tokens: kept for the answer.
        name: what is fitted, for messages.
    """

    count: Callable[[str], int]
    length: int
    new_tokens: int
    name: str

    def taken(self, parts: Parts) -> int:
        """Tokens of prompt and answer."""
        return self.count(parts.text) + self.new_tokens

    def fits(self, parts: Parts) -> bool:
        """Whether they stay within the length."""
        return self.taken(parts) <= self.length

    def too_short(self, parts: Parts) -> ValueError:
        """The error for a smallest prompt that doesn't fit."""
        return ValueError(
            f"benchmark.lengths={self.length} is too short for {self.name}: its smallest prompt and the "
            f"answer take {self.taken(parts)} tokens; raise it, or leave the task out (benchmark.tasks)"
        )


def best_size(maker: Maker, room: Room) -> int:
    """The largest size whose draw fits.

    The search begins between one step and three times what a prompt of one step says would fit, and goes on
    above or below where it must.

    Raises:
        ValueError: none fits.
    """
    limit = maker.most
    low = max(maker.step, maker.least) if limit is None else min(max(maker.step, maker.least), limit)
    per_unit = room.taken(maker.draw(low, 0)) / low
    high = _capped(max(int(3 * room.length / per_unit), 2 * low), limit)
    best = _bisect(maker, room, low, high)
    while best == high and best != limit:
        low, high = high + 1, _capped(2 * high, limit)
        best = _bisect(maker, room, low, high) or best
    best = best or _bisect(maker, room, maker.least, low - 1)
    if best is None:
        raise room.too_short(maker.draw(maker.least, 0))
    return best


def _capped(size: int, limit: int | None) -> int:
    return size if limit is None else min(size, limit)


def _bisect(maker: Maker, room: Room, low: int, high: int) -> int | None:
    """The largest size in [low, high] found to fit, None for none."""
    best = None
    while low <= high:
        middle = (low + high) // 2
        if room.fits(maker.draw(middle, 0)):
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best


def sample(maker: Maker, room: Room, size: int, index: int) -> Parts:
    """Sample `index` in `size`, or smaller by steps until it fits.

    Raises:
        ValueError: even the smallest doesn't.
    """
    while True:
        parts = maker.draw(size, index)
        if room.fits(parts):
            return parts
        if size <= maker.least:
            raise room.too_short(parts)
        size = max(maker.least, size - maker.step)
