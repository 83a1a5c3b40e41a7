"""A prompt of any length with one fact in the middle and the question for it at the end.

For timing real weights on text: attention that has something to find drifts as it does in use. Scores belong
to runner=evaluate; nothing is scored here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runners.prompts import encode

_PLACES = ("harbour", "library", "market", "station", "garden", "workshop", "museum", "bakery")
_EVENTS = (
    "opened an hour late because the key had been mislaid",
    "was painted in a colour that nobody could agree on",
    "received a parcel addressed to somebody who had moved away",
    "counted more visitors than on any day of the year before",
    "closed early, since the rain had come through the roof",
    "held a meeting about the meeting of the week after",
)
_QUESTION = "\n\nQuestion: what is the number of the locker in the old gymnasium?\nAnswer: the number is"


def needle_ids(tokenizer: Any, tokens: int, batch: int) -> Tensor:
    """[batch, tokens] int64: each row hides another number.

    Raises:
        ValueError: too few tokens for the fact and its question.
    """
    return torch.stack([_row(tokenizer, tokens, b) for b in range(batch)])


def _row(tokenizer: Any, tokens: int, b: int) -> Tensor:
    fact = encode(
        tokenizer, f" The number of the locker in the old gymnasium is {7919 * (b + 1) % 10000}.", start=False
    )
    question = encode(tokenizer, _QUESTION, start=False)
    room = tokens - fact.numel() - question.numel()
    if room < 2:
        raise ValueError(
            f"latency.contexts={tokens} has no room for the fact and its question "
            f"({fact.numel() + question.numel()} tokens); raise it or set latency.prompt=random"
        )
    filler = _filler(tokenizer, room, b)
    return torch.cat([filler[: room // 2], fact, filler[room // 2 :], question])


def _filler(tokenizer: Any, tokens: int, b: int) -> Tensor:
    """So many tokens of sentences, none twice in a row."""
    count = 8 + tokens // 8
    while True:
        ids = encode(tokenizer, " ".join(_sentence(i + 31 * b) for i in range(count)), start=True)
        if ids.numel() >= tokens:
            return ids[:tokens]
        count *= 2


def _sentence(i: int) -> str:
    return f"On day {i + 1} the {_PLACES[i % len(_PLACES)]} {_EVENTS[i * 5 % len(_EVENTS)]}."
