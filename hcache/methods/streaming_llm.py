"""StreamingLLM: attention sinks and a sliding window of recent tokens, constant in size.

Paper: Efficient Streaming Language Models with Attention Sinks, ICLR 2024, arXiv 2309.17453 (section 3.2).
Kept on the device: the first `sinks` tokens and the latest ones, the same for all heads. Lost for good: all
between. Each decode step appends a token, attends (sinks, window and itself), and evicts the oldest of the
window.

The official code (mit-han-lab/streaming-llm 2e50426) caches keys before rotation and gives them their place
in the cache as position, and its perplexity runs feed the prompt itself token by token: that is `positions:
rolling` with `prefill: streaming`. Compression papers, and the defaults here, keep the original positions and
prefill densely, which is far stronger, since what stays has seen everything. The official chat demo evicts
between turns only; here one token goes at every step.

Rolling without rotating the cache: rotation is relative, and within the window places and positions differ by
the same everywhere; only the sinks come closer. So the sinks alone are moved, to the distance they have in
the cache. What the model sees is the same as with places as positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from hcache.allocation import Uniform
from hcache.attention.backends import causal
from hcache.budget import Budget
from hcache.cache.state import Bytes, storage_bytes, unpadded
from hcache.geometry import Geometry
from hcache.kernels.fused import fused
from hcache.methods.base import Usage
from hcache.methods.eviction import ConstantLayer, EvictionLayer, EvictionMethod, Plan
from hcache.methods.registry import register
from hcache.scoring import SCRATCH_NUMBERS

BLOCK = 256
"""Most prompt queries that attend side by side while streaming through a prompt."""


class Positions(Enum):
    """Which positions kept tokens have: their own, or their place in the cache."""

    original = "original"
    rolling = "rolling"


class Prefill(Enum):
    """How the prompt is read: with full attention and cut afterwards, or as a stream from the start."""

    dense = "dense"
    streaming = "streaming"


@register("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(EvictionMethod):
    """Sinks and recents; no scores.

    Args:
        sinks: first prompt tokens that always stay; the rest of the budget is the window.
        positions: original, or rolling for texts longer than the model was trained for.
        prefill: dense, or streaming as in the paper's perplexity runs.
    """

    constant_size: ClassVar[bool] = True

    sinks: int = 4
    positions: Positions = Positions.original
    prefill: Prefill = Prefill.dense

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError(f"method.sinks={self.sinks} must be 0 or more tokens")
        if self.prefill is Prefill.streaming and not isinstance(self.split, Uniform):
            raise ValueError(
                f"method.allocation={self.allocation!r} needs method.prefill=dense: a stream has one window"
            )

    @property
    def needs_rope(self) -> bool:
        return self.positions is Positions.rolling

    def always_kept(self, tokens: int) -> int:
        return self.sinks + 1

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        return max(self.sinks + 1, super().minimum_tokens(geometry, prompt_tokens))

    def shortage(self) -> str:
        return f": method.sinks={self.sinks} must be smaller than the budget; lower sinks or raise the budget"

    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        latest = torch.arange(k.shape[1], dtype=torch.float32, device=k.device)
        latest[: self.sinks] = torch.inf
        return latest.expand(k.shape[0], -1)

    def usage(self, geometry: Geometry, budget: Budget, prompt_tokens: int, number_bytes: int) -> Usage:
        plan = super().usage(geometry, budget, prompt_tokens, number_bytes)
        if not self.needs_rope:
            return plan
        # Sinks that roll are stored as they came in too.
        sinks = self.sinks * geometry.heads * geometry.head_dim * number_bytes
        return replace(plan, device_bytes=plan.device_bytes + sinks)

    def layer_state(self, layer: int, plans: list[Plan], earlier: list[EvictionLayer]) -> StreamingLayer:
        return StreamingLayer(self, layer, plans, earlier)


class StreamingLayer(ConstantLayer):
    """Evicts the oldest token behind the sinks, which never leave their slots.

    Shapes: s sinks, D head dim, S = B*H segments.
    """

    _method: StreamingLLM

    def attend_prompt(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        if self._method.prefill is Prefill.dense:
            return causal(self.backend, q, k, v, valid)
        out = torch.zeros_like(q)
        for b, plan in enumerate(self._plans):
            alone = [unpadded(x, valid, b) for x in (q, k, v)]
            places = torch.arange(q.shape[2], device=q.device)
            real = places if valid is None else places[valid[b]]
            side_by_side = SCRATCH_NUMBERS // (q.shape[1] * min(real.numel(), plan.tokens + BLOCK))
            start = 0
            for now in real.split(max(1, min(BLOCK, side_by_side))):
                stop = start + now.numel()
                out[b, :, now] = self._stream(alone[0], alone[1], alone[2], start, stop, plan.tokens)
                start = stop
        return out

    def _stream(
        self, q_HqnD: Tensor, k_HnD: Tensor, v_HnD: Tensor, start: int, stop: int, capacity: int
    ) -> Tensor:
        """What tokens start..stop see, each the sinks, the window before it and itself: [Hq, T, D]."""
        sinks, window = min(self._method.sinks, stop), max(0, capacity - self._method.sinks)
        rows = torch.arange(start, stop, device=k_HnD.device)
        near = torch.arange(max(sinks, start - window), stop, device=rows.device)
        seen = torch.cat([torch.arange(sinks, device=rows.device), near])
        ages = rows.unsqueeze(1) - seen
        hidden = (ages < 0) | ((seen >= sinks) & (ages > window))
        queries = q_HqnD[:, start:stop]
        scores = _logits(queries, k_HnD[:, seen])
        if self._method.needs_rope:
            # A query at place `capacity` of the cache, however late it comes, is that far from the sinks.
            by = (rows.clamp_max(capacity) - rows).unsqueeze(0)
            closer = self.rope.shift(queries.unsqueeze(0), by)[0]
            scores[..., :sinks] = _logits(closer, k_HnD[:, :sinks])
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        values = v_HnD[:, seen].float()
        out = weights.view(values.shape[0], -1, seen.numel()) @ values
        return out.view(queries.shape).to(queries.dtype)

    def finish(self) -> None:
        super().finish()
        # A head no larger than the sinks still needs one place for the newest token.
        self._sinks_S = (self._capacity_S - 1).clamp(0, self._method.sinks)
        self._next_S = self.count_S
        self._gone_S = torch.zeros_like(self._next_S)
        if self._rolls:
            tokens = [plan.prompt_tokens for plan in self._plans for _ in self._kept[0]]
            self._cut_S = self._numbers(tokens) - self._next_S
            self._sinks_XD = self.store.keys[self._sink_rows()]

    @property
    def least_spare(self) -> int:
        """Rolling looks at so many slots of every head, a short prompt's too."""
        return max(1, self._method.sinks if self._rolls else 0)

    @property
    def _rolls(self) -> bool:
        return self._method.needs_rope and self._method.sinks > 0

    def _sink_rows(self) -> Tensor:
        sinks = torch.arange(self._method.sinks, device=self.store.first.device)
        return (self.store.first.unsqueeze(1) + sinks).flatten()

    def _bring_sinks(self) -> None:
        """Move the sinks of full heads to the distance from the newest token that they have in the cache."""
        rows, sinks = self._sink_rows(), self._method.sinks
        sink_Ss = torch.arange(sinks, device=rows.device) < self._sinks_S.unsqueeze(1)
        # Until a head is full its sinks are where they were, and a short prompt's may still be coming.
        fixed_Ss = sink_Ss & (self.store.lengths >= self._capacity_S).unsqueeze(1)
        self._sinks_XD.copy_(torch.where(fixed_Ss.view(-1, 1), self._sinks_XD, self.store.keys[rows]))
        by_Ss = (self._cut_S + self._gone_S).long().unsqueeze(1) * sink_Ss
        moved = self.rope.shift(self._sinks_XD.view(-1, 1, sinks, self._sinks_XD.shape[1]), by_Ss)
        self.store.keys.index_copy_(0, rows, moved.flatten(0, 2))

    def advance(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Put the token in the place of the one that goes, and attend. Never synchronises.

        A head attends to one token more than it keeps: what goes now went for the step before.
        """
        if self._rolls:
            self._bring_sinks()
        self._put(k.flatten(0, 1)[:, 0], v.flatten(0, 1)[:, 0], valid)
        return self.backend.decode(q, self.store.ragged(), self.store.lengths.unsqueeze(1))

    def _put(self, k_SD: Tensor, v_SD: Tensor, valid: Tensor | None) -> None:
        """A token into the next slot of each head: the first that is free, later the oldest one's."""
        real_S = None if valid is None else valid[:, 0].repeat_interleave(k_SD.shape[0] // valid.shape[0])
        store, ring = self.store, (self._next_S, self._gone_S, self._capacity_S, self._sinks_S)
        if fused(k_SD):
            from hcache.kernels.evict import put_oldest

            put_oldest(k_SD, v_SD, store.keys, store.values, store.first, store.lengths, *ring, real_S)
            return
        full_S = store.lengths >= self._capacity_S
        after_S = torch.where(self._next_S == self._capacity_S, self._sinks_S, self._next_S + 1)
        store.put(self._next_S, k_SD, v_SD, real_S)
        self._gone_S += (full_S if real_S is None else full_S & real_S).int()
        self._next_S.copy_(after_S if real_S is None else torch.where(real_S, after_S, self._next_S))

    def kept(self) -> list[list[Tensor]]:
        heads = len(self._kept[0])
        found = [
            torch.cat([positions[:sinks], positions[sinks + gone :]])
            for positions, sinks, gone in zip(
                (head for sequence in self._kept for head in sequence),
                self._sinks_S.tolist(),
                self._gone_S.tolist(),
                strict=True,
            )
        ]
        return [found[b * heads : (b + 1) * heads] for b in range(len(self._kept))]

    def nbytes(self) -> Bytes:
        total = super().nbytes()
        tables = [self._sinks_S, self._next_S, self._gone_S]
        if self._rolls:
            tables += [self._cut_S, self._sinks_XD]
        total["device"]["metadata"] += storage_bytes(*tables)
        return total


def _logits(q_HqTD: Tensor, k_HmD: Tensor) -> Tensor:
    """Scaled float32 logits [Hq, T, m]."""
    heads, tokens, dim = k_HmD.shape
    rows = q_HqTD.float().reshape(heads, -1, dim) * dim**-0.5
    return (rows @ k_HmD.float().transpose(1, 2)).view(*q_HqTD.shape[:2], tokens)
