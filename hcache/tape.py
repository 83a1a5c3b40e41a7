"""Generated tokens of a batch: how the next one is chosen, and where each sequence ends. On the device,
without a wait for the host, so that all of it can be part of a captured step.

Shapes: B batch, V vocabulary, E ends (token sequences that end a text), L tokens of the longest end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hcache.cache.room import Held, Room

ANY = -1
"""Stands for any token in front of an end that is shorter than the longest."""

NOTHING = -2
"""What stands before the first token; equal to no token of an end."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: smallest share of the probability that the candidates, most likely first, must reach.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError(f"top_p={self.top_p} has no effect on greedy decoding; set a temperature")

    def choose(self, logits_BV: Tensor) -> Tensor:
        """The next token [B], int64."""
        if self.temperature == 0:
            return largest(logits_BV)
        shares_BV = (logits_BV.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered_BV, tokens_BV = shares_BV.sort(descending=True, stable=True)
            before_BV = ordered_BV.cumsum(-1) - ordered_BV
            ordered_BV = ordered_BV.masked_fill(before_BV >= self.top_p, 0.0)
            shares_BV = torch.zeros_like(shares_BV).scatter_(1, tokens_BV, ordered_BV)
        # The largest of shares over exponential noise is a draw by the shares: no sum, no search, no host.
        return (shares_BV / torch.empty_like(shares_BV).exponential_()).argmax(-1)


PIECES = 128
"""Parts of a vocabulary that are searched side by side."""


def largest(logits_BV: Tensor) -> Tensor:
    """argmax of each row [B], the first of equals. A GPU would give a whole row to one of its processors."""
    batch, size = logits_BV.shape
    if size % PIECES or not logits_BV.is_cuda:
        return logits_BV.argmax(-1)
    pieces_BPN = logits_BV.view(batch, PIECES, -1)
    within_BP = pieces_BPN.argmax(-1)
    piece_B1 = pieces_BPN.gather(2, within_BP.unsqueeze(-1)).squeeze(-1).argmax(-1, keepdim=True)
    return (piece_B1 * pieces_BPN.shape[-1] + within_BP.gather(1, piece_B1)).squeeze(1)


def barred(logits_BV: Tensor, tokens: Sequence[int]) -> Tensor:
    """The logits, but for `tokens`, none of which can be chosen from them."""
    places = torch.tensor(list(tokens), dtype=torch.int64, device=logits_BV.device)
    return logits_BV.index_fill(1, places, float("-inf"))


class Tape(Held):
    """Tokens that came out, and which sequences have ended.

    Args:
        first_B: the first token.
        limit: most tokens.
        ends: token sequences that end a text.
        room: rounds sizes, where steps are captured.

    Attributes:
        done_B: sequences that have ended.
        finished: [1] bool, all have.
    """

    def __init__(self, first_B: Tensor, limit: int, ends: Sequence[Sequence[int]], room: Room) -> None:
        device, batch = first_B.device, first_B.shape[0]
        longest = room.size("end", max((len(end) for end in ends), default=1))
        # An end of nothing but a token that never comes: where there are no ends, none is reached.
        rows = [[ANY] * (longest - len(end)) + list(end) for end in ends]
        rows += [[NOTHING - 1] * longest] * (room.size("ends", max(1, len(rows))) - len(rows))
        self._ends_EL = torch.tensor(rows, device=device)
        width = longest + room.size("tokens", limit)
        self._tokens_BW = torch.full((batch, width), NOTHING, device=device)
        self._next = torch.full((1,), longest, device=device)
        self.done_B = torch.zeros(batch, dtype=torch.bool, device=device)
        self.finished = torch.zeros(1, dtype=torch.bool, device=device)
        self.write(first_B)

    def write(self, token_B: Tensor) -> None:
        """Append a token of every sequence, of those that have ended too. Fixed shapes, no host."""
        longest = self._ends_EL.shape[1]
        self._tokens_BW.index_copy_(1, self._next, token_B.unsqueeze(1))
        self._next += 1
        latest = self._next - longest + torch.arange(longest, device=token_B.device)
        recent_B1L = self._tokens_BW.index_select(1, latest).unsqueeze(1)
        same_BEL = (recent_B1L == self._ends_EL) | (self._ends_EL == ANY)
        self.done_B |= same_BEL.all(-1).any(-1)
        self.finished.copy_(self.done_B.all().unsqueeze(0))

    def rows(self, count: int) -> list[list[int]]:
        """The first `count` tokens of each sequence. Synchronises."""
        longest = self._ends_EL.shape[1]
        rows: list[list[int]] = self._tokens_BW[:, longest : longest + count].tolist()
        return rows


def text_span(tokens: Sequence[int], ends: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Tokens before the first end (the longest one, if several end there), and up to its last token."""
    for count in range(1, len(tokens) + 1):
        ended = [len(end) for end in ends if list(tokens[max(0, count - len(end)) : count]) == list(end)]
        if ended:
            return count - max(ended), count
    return len(tokens), len(tokens)


def padded(rows: Sequence[Sequence[int]], lengths: Sequence[int], pad: int) -> Tensor:
    """[B, n] int64: each row's first `lengths[b]` tokens, then `pad`."""
    tokens = torch.tensor(rows)
    behind = torch.arange(tokens.shape[1]) >= torch.tensor(lengths).unsqueeze(1)
    return tokens.masked_fill(behind, pad)
