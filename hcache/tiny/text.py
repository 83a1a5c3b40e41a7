"""Facts hidden in text, and questions about them: what the embedded model learns and `retrieval` measures.

    The code of qwxy is 4821.                     a plain fact, on a line of its own
    The code of abcd is the code of efgh.         a pointer
    Q: the code of qwxy is 4821.                  single: one fact, four digits
    Q: the codes of abcd, efgh are abcd 1234, efgh 5678.    multi: the key again before each value
    Q: the code of abcd is efgh 5678.             chain: the key pointed at, then its value

Everything is drawn from a `random.Random`, in the same way on every machine. Sizes are bytes (the text is
ASCII, one byte a character). Knows no tokenizer, no tensor and no benchmark.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

KINDS = ("single", "multi", "chain")
END = ".\n"  # follows every answer
SNAP_BYTES = 160  # a fact moves at most this far, to the end of a sentence

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Keys:
    """Distinct random four-letter keys."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def new(self) -> str:
        """A key not given before."""
        while True:
            key = "".join([_LETTERS[int(self._rng.random() * 26)] for _ in range(4)])
            if key not in self._used:
                self._used.add(key)
                return key


def new_value(rng: Random) -> str:
    """Four random digits."""
    return f"{int(rng.random() * 10000):04d}"


def plain_fact(key: str, value: str) -> str:
    """The line that gives `key` its value; 27 bytes."""
    return f"\nThe code of {key} is {value}.\n"


def pointer_fact(key: str, target: str) -> str:
    """The line that says `key` has the code of `target`; 39 bytes."""
    return f"\nThe code of {key} is the code of {target}.\n"


@dataclass(frozen=True)
class Puzzle:
    """The facts of one question, the question, and the full text of its answer without the end.

    `keys` and `values` are what the answer must say, key by key; a chain has the key pointed at.
    """

    kind: str
    facts: tuple[str, ...]
    question: str
    answer_prefix: str
    answer: str
    keys: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def asked(self) -> str:
        """The question with its answer."""
        return self.question + self.answer_prefix + self.answer + END


def puzzle(rng: Random, kind: str, keys: Keys, multi_keys: int = 4) -> Puzzle:
    """One question of `kind` over fresh keys. Raises ValueError for an unknown kind."""
    if kind == "single":
        return _single(rng, keys)
    if kind == "multi":
        return _multi(rng, keys, multi_keys)
    if kind == "chain":
        return _chain(rng, keys)
    raise ValueError(f"unknown kind of question '{kind}' (known: {', '.join(KINDS)})")


def _single(rng: Random, keys: Keys) -> Puzzle:
    key, value = keys.new(), new_value(rng)
    question = f"\nQ: the code of {key}"
    return Puzzle("single", (plain_fact(key, value),), question, " is ", value, (key,), (value,))


def _multi(rng: Random, keys: Keys, count: int) -> Puzzle:
    names = tuple(keys.new() for _ in range(count))
    values = tuple(new_value(rng) for _ in names)
    facts = tuple(plain_fact(key, value) for key, value in zip(names, values, strict=True))
    answer = ", ".join(f"{key} {value}" for key, value in zip(names, values, strict=True))
    return Puzzle("multi", facts, f"\nQ: the codes of {', '.join(names)}", " are ", answer, names, values)


def _chain(rng: Random, keys: Keys) -> Puzzle:
    key, target, value = keys.new(), keys.new(), new_value(rng)
    facts = (pointer_fact(key, target), plain_fact(target, value))
    return Puzzle("chain", facts, f"\nQ: the code of {key}", " is ", f"{target} {value}", (target,), (value,))


def distractors(rng: Random, keys: Keys, count: int, pointer_share: float = 0.25) -> list[str]:
    """`count` facts that nobody asks about; a share of them points at another of them."""
    facts: list[str] = []
    targets: list[str] = []
    for _ in range(count):
        key = keys.new()
        if targets and rng.random() < pointer_share:
            facts.append(pointer_fact(key, targets[int(rng.random() * len(targets))]))
        else:
            targets.append(key)
            facts.append(plain_fact(key, new_value(rng)))
    return facts


def shuffle(rng: Random, items: list[str]) -> None:
    """Shuffle in place; our own, so that no Python version changes the order."""
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]


def scatter(rng: Random, filler: bytes, facts: Sequence[str], even: bool = True) -> bytes:
    """`filler` with the facts inserted, in order; at the end of a sentence where one is near.

    Args:
        even: one fact at a random place of each equal part of the text; otherwise at places drawn freely.
    """
    part = len(filler) / max(1, len(facts))
    drawn = sorted(rng.random() for _ in facts) if not even else []
    depths = drawn or [(index + rng.random()) / len(facts) for index in range(len(facts))]
    places = sorted(_sentence_end(filler, int(depth * part * len(facts))) for depth in depths)
    pieces: list[bytes] = []
    start = 0
    for place, fact in zip(places, facts, strict=True):
        pieces += [filler[start:place], fact.encode()]
        start = place
    return b"".join([*pieces, filler[start:]])


def _sentence_end(filler: bytes, place: int) -> int:
    """The end of the sentence around `place` if it is within reach, `place` itself otherwise."""
    stop = filler.find(b". ", place, place + SNAP_BYTES)
    return place if stop < 0 else stop + 2
