"""LayerState: everything one decoder layer remembers, and the state of layers that only append.

Shapes: q [B, Hq, T, D], k and v [B, H, T, D] after RoPE at true positions, valid [B, T] bool (None: no pads).
Pads are never stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hcache.attention.backends import CHUNK, Backend, causal
from hcache.attention.rope import Rope
from hcache.cache.room import Held, Room
from hcache.cache.store import RaggedStore

Bytes = dict[str, dict[str, int]]
"""{"device": {"payload", "metadata", "reserved"}, "host": {...}}"""

Selection = Callable[[Tensor, Tensor, Tensor, int], list[Tensor] | None]
"""(q [Hq, n, D], k and v [H, n, D], sequence index) -> H sorted index tensors, None for all positions."""


def no_bytes() -> Bytes:
    """A zeroed byte count."""
    return {side: dict.fromkeys(("payload", "metadata", "reserved"), 0) for side in ("device", "host")}


def add_bytes(total: Bytes, more: Bytes) -> Bytes:
    """Sum of two byte counts."""
    return {side: {kind: total[side][kind] + more[side][kind] for kind in total[side]} for side in total}


def storage_bytes(*tensors: Tensor) -> int:
    """Bytes of the storages behind tensors, whatever part of them the tensors show."""
    return sum(x.untyped_storage().nbytes() for x in tensors)


def unpadded(x_BHTD: Tensor, valid: Tensor | None, sequence: int) -> Tensor:
    """[heads, n, D] of one sequence without its pads; a view where there are none."""
    x = x_BHTD[sequence]
    return x if valid is None else x[:, valid[sequence]]


def latest_queries(q_BHqTD: Tensor, valid: Tensor | None, window: int) -> Tensor:
    """The last `window` queries of each sequence [B, Hq, W, D], zeros before its first."""
    rows = []
    for b, q_HqTD in enumerate(q_BHqTD):
        last = slice(-window, None) if valid is None else valid[b].nonzero().squeeze(1)[-window:]
        q_HqwD = q_HqTD[:, last]
        rows.append(torch.nn.functional.pad(q_HqwD, (0, 0, window - q_HqwD.shape[1], 0)))
    return torch.stack(rows)


class Turn(NamedTuple):
    """What the host knows of a coming step.

    Args:
        kind: steps of one kind do the same operations on the same tensors.
        joins: background work that is under way must be done before it.
        starts: background work begins after it.
    """

    kind: Hashable = 0
    joins: bool = False
    starts: bool = False


class LayerState(Held, ABC):
    """The contract of one layer's memory (see the methods of the same names).

    A step is `ready` (the host counts), `advance` (the device works) and, where the turn says so,
    `background`. `step` does them one after the other; an engine captures `advance` and `background`, and
    runs the latter beside later steps.

    Attributes:
        backend: attends; set by the cache before the first call.
        rope: the model's rotary embedding; set like the backend for methods that need it.
        reserve_tokens: tokens that will follow the prompt as far as known, so that nothing moves later.
        room: rounds sizes and keeps buffers, where steps are captured; set like the backend.
        pending: a later layer's prefill may still change this one.
        journal: where someone has put a list, states that decide while decoding note it there, in eager
            steps alone.
    """

    off_step: ClassVar[tuple[str, ...]] = ("_kept",)

    backend: Backend
    rope: Rope
    reserve_tokens: int = CHUNK
    room: Room = Room()
    pending: bool = False
    journal: list[Any] | None = None

    def attend_prompt(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """What the prompt's own tokens see [B, Hq, T, D], before `prefill`: exact causal attention."""
        return causal(self.backend, q, k, v, valid)

    @abstractmethod
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """Keep what is to be kept of the prompt; the caller drops the rest."""

    def step(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Append one token and attend. T is 1. Returns [B, Hq, 1, D]."""
        turn = self.ready(valid is None)
        out = self.advance(q, k, v, valid)
        if turn.starts:
            self.background()
        return out

    @abstractmethod
    def ready(self, even: bool) -> Turn:
        """Count one step and make room for it. Host only, unless something has to grow.

        Args:
            even: every sequence has a token in it.
        """

    @abstractmethod
    def advance(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """The step itself, after `ready`: fixed shapes, nothing waits for the device."""

    def background(self) -> None:
        """What a step leaves to be done before the next turn that joins; as `advance`, and beside steps.

        Nothing that it writes is read by a step before that turn, and the other way round.
        """

    @abstractmethod
    def extend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Append several tokens, causal among themselves, and attend. Returns [B, Hq, T, D]."""

    @abstractmethod
    def kept(self) -> list[list[Tensor]]:
        """[sequence][KV head] -> sorted prompt positions (without pads) that a step can attend to.

        Of methods that select at each step: the latest selection (the last prompt query's before the first
        step) and what is always attended.
        """

    @abstractmethod
    def nbytes(self) -> Bytes:
        """Bytes read from the storage itself."""

    def counters(self) -> dict[str, float]:
        """Sums of what happened since the prompt; empty for methods that only attend."""
        return {}


def on_host(kept: list[Tensor]) -> list[Tensor]:
    """Index tensors on the CPU; one that heads share is copied once."""
    copies = {id(index): index.cpu() for index in kept}
    return [copies[id(index)] for index in kept]


def one_by_one(state: LayerState, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """`extend` as so many steps, for states in which a token changes what the next one sees."""
    outs = []
    for t in range(k.shape[2]):
        now = slice(t, t + 1)
        real = None if valid is None else valid[:, now]
        outs.append(state.step(q[:, :, now], k[:, :, now], v[:, :, now], real))
    return torch.cat(outs, dim=2)


class StoreLayer(LayerState):
    """Keeps a selection of the prompt in a ragged store and every later token behind it.

    Args:
        select: chooses the prompt positions of one sequence, head by head; None keeps all.
    """

    def __init__(self, select: Selection | None = None) -> None:
        self._select = select

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        batch = range(k.shape[0])
        chosen = [
            self.choose(unpadded(q, valid, b), unpadded(k, valid, b), unpadded(v, valid, b), b) for b in batch
        ]
        lengths = [len(index) for kept in chosen for index in kept]
        self.store = self.new_store(lengths, k)
        for b, kept in enumerate(chosen):
            k_HnD, v_HnD = unpadded(k, valid, b), unpadded(v, valid, b)
            for h, index in enumerate(kept):
                # One head at a time, whole ones without a gather: no copy of the layer is ever made.
                rows = slice(None) if len(index) == k_HnD.shape[1] else index
                self.store.write(b * len(kept) + h, 0, k_HnD[h, rows], v_HnD[h, rows])
        self._kept = [on_host(kept) for kept in chosen]

    def new_store(self, lengths: list[int], like: Tensor) -> RaggedStore:
        """A store for segments of these lengths and what will follow."""
        return RaggedStore(lengths, like, self.reserve_tokens, self.room, self.backend.granule)

    def choose(self, q: Tensor, k: Tensor, v: Tensor, sequence: int) -> list[Tensor]:
        """Positions to keep of one sequence (q [Hq, n, D], k and v [H, n, D]): H sorted tensors."""
        kept = self._select(q, k, v, sequence) if self._select else None
        if kept is None:
            everything = torch.arange(k.shape[1], device=k.device)
            return [everything] * k.shape[0]
        return kept

    def ready(self, even: bool) -> Turn:
        self.store.expect(1)
        return Turn(self.store.moves)

    def advance(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        return self._append(q, k, v, valid)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        self.store.expect(k.shape[2])
        return self._append(q, k, v, valid)

    def _append(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Append tokens for which there is room, and attend to everything before each and itself."""
        heads = k.shape[1]
        segment_valid = None if valid is None else valid.repeat_interleave(heads, dim=0)
        limits = self.store.append(k.flatten(0, 1), v.flatten(0, 1), segment_valid)
        return self.backend.decode(q, self.store.ragged(), limits)

    def kept(self) -> list[list[Tensor]]:
        return [list(sequence) for sequence in self._kept]

    def nbytes(self) -> Bytes:
        return {**no_bytes(), "device": self.store.nbytes()}
