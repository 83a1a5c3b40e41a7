"""StreamingLLM: attention sinks and a sliding window of recent tokens, constant in size.

Paper: Efficient Streaming Language Models with Attention Sinks, ICLR 2024, arXiv 2309.17453 (section 3.2).
Kept on the device: the first `sinks` tokens and the latest ones, the same for all heads. Lost for good: all
between. Each decode step appends a token, attends (sinks, window and itself), and evicts the oldest of the
window.

Difference from the official code (mit-han-lab/streaming-llm 2e50426): keys keep their original RoPE
positions, as in every compression comparison; the prompt is prefilled densely and compressed afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hcache.budget import Budget
from hcache.cache.state import Bytes, LayerState, StoreLayer, one_by_one
from hcache.geometry import Geometry
from hcache.methods.base import Method
from hcache.methods.registry import register


@register("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(Method):
    """Sinks and recents; no scores.

    Args:
        sinks: first prompt tokens that always stay.
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"method.sinks={self.sinks} must be 0 or more tokens")

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        return self.sinks + 1

    def shortage(self) -> str:
        return f": method.sinks={self.sinks} must be smaller than the budget; lower sinks or raise the budget"

    def layers(self, geometry: Geometry, budget: Budget, prompt_tokens: list[int]) -> list[LayerState]:
        for n in prompt_tokens:
            self.require(geometry, budget, n)
        capacities = [max(budget.tokens(n), self.sinks + 1) for n in prompt_tokens]
        return [StreamingLayer(self.sinks, capacities) for _ in range(geometry.layers)]


class StreamingLayer(StoreLayer):
    """A store whose window is a ring: the newest token takes the slot of the oldest.

    A ring has one slot more than the window, so that a step attends to `capacity` earlier tokens and itself.

    Args:
        sinks: slots at the front that are never overwritten.
        capacities: tokens each sequence may hold between steps.
    """

    def __init__(self, sinks: int, capacities: list[int]) -> None:
        super().__init__()
        self._sinks = sinks
        self._capacities = capacities

    def choose(self, q: Tensor, k: Tensor, v: Tensor, sequence: int) -> list[Tensor]:
        tokens, capacity = k.shape[1], self._capacities[sequence]
        kept = torch.arange(tokens, device=k.device)
        if tokens > capacity:
            kept = torch.cat([kept[: self._sinks], kept[tokens - (capacity - self._sinks) :]])
        return [kept] * k.shape[0]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        self.reserve_tokens = max(1, min(self.reserve_tokens, max(self._capacities) + 1))
        super().prefill(q, k, v, valid)
        self._heads = k.shape[1]
        self._capacity = torch.tensor(self._capacities, device=k.device)
        self._prompt = [int(kept[0].numel()) for kept in self._kept]
        self._seen = torch.tensor(self._prompt, device=k.device)
        self._fed = 0

    def step(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Fixed shapes, no host synchronisation once the store has its final size."""
        self._make_room()
        real = None if valid is None else valid[:, 0]
        ring = self._capacity + 1 - self._sinks
        turn = self._sinks + (self._seen - self._sinks) % ring
        slot = torch.where(self._seen <= self._capacity, self._seen, turn)
        self._put(slot, k, v, real)
        self._seen += 1 if real is None else real
        limits = self.store.lengths.long().unsqueeze(1)
        return self.backend.decode(q, self.store.ragged(), limits)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Token by token: each evicts before the next one comes, exactly as in decoding."""
        return one_by_one(self, q, k, v, valid)

    def _make_room(self) -> None:
        """Room for one token more, until the ring has its full size; from then on nothing moves."""
        self._fed += 1
        self.store.grow(
            [
                min(prompt + self._fed, capacity + 1)
                for prompt, capacity in zip(self._prompt, self._capacities, strict=True)
                for _ in range(self._heads)
            ]
        )

    def _put(self, slot_B: Tensor, k: Tensor, v: Tensor, real_B: Tensor | None) -> None:
        slot_S = slot_B.repeat_interleave(self._heads)
        real_S = None if real_B is None else real_B.repeat_interleave(self._heads)
        self.store.put(slot_S, k.flatten(0, 1)[:, 0], v.flatten(0, 1)[:, 0], real_S)

    def kept(self) -> list[list[Tensor]]:
        seen = self._seen.tolist()
        return [self._alive(b, seen[b]) for b in range(len(seen))]

    def _alive(self, b: int, seen: int) -> list[Tensor]:
        """Prompt positions whose slot a step can still see: the ring drops them oldest first."""
        positions, sinks = self._kept[b][0], self._sinks
        # After `seen` tokens the next one overwrites what is older than the capacity.
        gone = max(0, seen - self._capacities[b])
        alive = torch.cat([positions[:sinks], positions[sinks:][gone:]])
        return [alive] * self._heads

    def nbytes(self) -> Bytes:
        """The oldest slot of a full ring waits to be overwritten: it is reserve, not payload."""
        total = super().nbytes()
        stale = (self._seen > self._capacity).sum().item() * self._heads * self.store.token_bytes
        total["device"]["payload"] -= int(stale)
        total["device"]["reserved"] += int(stale)
        return total
