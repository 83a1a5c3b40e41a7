"""ShadowKV: keys stay on the device as low-rank factors, values wait in host memory, and each step brings
the chunks back that its query needs.

Paper: ShadowKV, ICML 2025, arXiv 2410.21465 (sections 3 and 4); official code bytedance/ShadowKV a21f5a9.
This file is the policy: what a budget becomes. `hcache.methods.chunks` is what happens during decoding, and
`hcache.methods.low_rank` the factors.

| what | device | host | exact |
|---|---|---|---|
| keys before RoPE, all heads together | factors [n, r] and [r, H*D] | - | no; nothing else is lost |
| a landmark (mean key after RoPE) of each chunk that is no outlier | full | - | - |
| values of all chunks | - | full | yes |
| keys and values of the selected chunks | rebuilt, fetched | - | values |
| keys and values of outlier chunks, local tail, generated tokens | full | - | yes |

Outliers are the chunks of a head whose landmark represents its worst key least. A step selects for each KV
head, by the largest softmax share in its group.

Differences from the official code:
- the budget is charged with everything on the device (factors, landmarks, chunk numbers, outliers, local
  tail), not with the selected tokens alone; rank and outliers follow from the model and the budget, in the
  paper's proportions;
- the basis of the keys comes from the eigenvectors of their Gram matrix instead of an SVD of [n, H*D]: the
  same product, at a fraction of the time;
- the number of chunks is not rounded down to a multiple of 8, and keys of the chunks that the prompt selects
  are rebuilt like those of all others, so that what was selected before never changes an output;
- logits are divided by sqrt(D), not by sqrt(128); factors are multiplied and turned in float32; of softmax
  shares the logarithms are compared, so that small ones don't all round to zero;
- several tokens at once (a follow-up) select one by one, where the official code adds up their shares;
- no length is built in: prompts below 4096 tokens, any number of generated tokens, several sequences of
  unequal lengths. Where factors, landmarks and tail save nothing, on short prompts, only a budget for the
  whole prompt is feasible; it is then kept whole, and the record says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hcache.budget import Budget
from hcache.cache.state import LayerState, StoreLayer
from hcache.geometry import Geometry
from hcache.methods.base import Method, Usage
from hcache.methods.chunks import ChunkPlan, ShadowLayer
from hcache.methods.heterocache import OffloadSettings
from hcache.methods.registry import register

INDEX_BYTES = 4
"""Bytes of a chunk number on the device."""

INDEX_NUMBERS = 2
"""What a chunk number is charged as, in keys' numbers: right for 16-bit models, a little more than 32-bit
ones need."""

PAPER_RANK = 160, 1024
"""Rank, and H*D of the models it was chosen for."""

PAPER_OUTLIERS = 48, 256
"""Outlier chunks, and the chunks (2048 tokens) that are selected beside them."""


@register("shadowkv")
@dataclass(frozen=True)
class ShadowKV(Method):
    """Low-rank keys and offloaded values, selected by landmarks.

    Args:
        chunk: tokens that are selected together.
        rank: columns of the key factors, at most H*D; None takes the paper's share of H*D (5/32).
        local_chunks: chunks at the end of the prompt that stay exact, with what is left of a last chunk.
        outlier_chunks: chunks of each KV head that stay exact for being badly represented; None takes the
            paper's share (3 for every 16 selected).
        offload: see OffloadSettings.
    """

    selects: ClassVar[bool] = True

    chunk: int = 8
    rank: int | None = None
    local_chunks: int = 4
    outlier_chunks: int | None = None
    offload: OffloadSettings = field(default_factory=OffloadSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, unit, least in (
            ("chunk", "token", 1),
            ("rank", "column", 1),
            ("local_chunks", "chunks", 0),
            ("outlier_chunks", "chunks", 0),
        ):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"method.{key}={value} must be at least {least} {unit}")

    @property
    def needs_rope(self) -> bool:
        return True

    def layers(self, geometry: Geometry, budget: Budget, prompt_tokens: list[int]) -> list[LayerState]:
        plans = [self.plan(geometry, budget, n) for n in prompt_tokens]
        if not any(plan.chunks for plan in plans):
            return [StoreLayer() for _ in range(geometry.layers)]
        return [ShadowLayer(plans, self.chunk, self.offload.enabled) for _ in range(geometry.layers)]

    def plan(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> ChunkPlan:
        """What a budget becomes for one prompt: outliers by proportion, then as many chunks as fit."""
        tokens = self.require(geometry, budget, prompt_tokens)
        if tokens >= prompt_tokens:
            return ChunkPlan()
        left = tokens * _token(geometry) - self._fixed(geometry, prompt_tokens)
        outlier, selected = self._outlier(geometry), self._selected(geometry)
        outliers = self.outlier_chunks
        if outliers is None:
            few, many = PAPER_OUTLIERS
            outliers = left * few // (few * outlier + many * selected)
        chosen = (left - outliers * outlier) // selected
        # Fewer than all: with every chunk on the device the budget would have covered the prompt.
        return ChunkPlan(self._rank(geometry, prompt_tokens), self._chunks(prompt_tokens), outliers, chosen)

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        """Budget that leaves one chunk to select; the whole prompt where that saves nothing."""
        outliers = self.outlier_chunks or 0
        if self._chunks(prompt_tokens) <= outliers:
            return prompt_tokens
        least = self._fixed(geometry, prompt_tokens) + self._selected(geometry)
        least += outliers * self._outlier(geometry)
        return min(prompt_tokens, max(2, -(-least // _token(geometry))))

    def shortage(self) -> str:
        return (
            ": key factors, landmarks, outliers and local tail leave no chunk to select; raise the budget, "
            "or lower method.rank, method.local_chunks or method.outlier_chunks"
        )

    def notes(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> list[str]:
        if self.minimum_tokens(geometry, prompt_tokens) >= prompt_tokens:
            return [f"prompts of {prompt_tokens} tokens are too short to save anything on: kept whole"]
        if self.offload.enabled or budget.tokens(prompt_tokens) >= prompt_tokens:
            return []
        return ["offload.enabled=false: values of the chunks stay on the device, beyond the budget"]

    def usage(self, geometry: Geometry, budget: Budget, prompt_tokens: int, number_bytes: int) -> Usage:
        """The store's own tables, a few bytes for every 64 tokens, are not counted."""
        plan = self.plan(geometry, budget, prompt_tokens)
        exact = prompt_tokens - (plan.chunks - plan.outliers - plan.selected) * self.chunk
        numbers = exact * _token(geometry) + plan.landmarks * _width(geometry)
        numbers += plan.rank * (prompt_tokens + _width(geometry))
        indices = (plan.selected + plan.outliers) * geometry.kv_heads
        values = plan.chunks * self.chunk * _width(geometry) * number_bytes
        crosses = self.offload.enabled
        moved = plan.selected * self.chunk * _width(geometry) * number_bytes
        device = numbers * number_bytes + indices * INDEX_BYTES + (0 if crosses else values)
        return Usage(
            device_bytes=geometry.layers * device,
            attended_tokens=exact,
            host_bytes=geometry.layers * values if crosses else 0,
            moved_bytes=geometry.layers * moved if crosses else 0,
            parts={
                "rank": plan.rank,
                "selected": plan.selected * self.chunk,
                "outlier_chunks": plan.outliers,
                "landmarks": plan.landmarks,
            },
        )

    def _rank(self, geometry: Geometry, prompt_tokens: int) -> int:
        rank, width = PAPER_RANK
        wanted = max(1, _width(geometry) * rank // width) if self.rank is None else self.rank
        return min(wanted, prompt_tokens, _width(geometry))

    def _chunks(self, prompt_tokens: int) -> int:
        """Chunks of a prompt without the local ones."""
        return prompt_tokens // self.chunk - self.local_chunks

    def _fixed(self, geometry: Geometry, prompt_tokens: int) -> int:
        """Numbers that one layer keeps whatever the budget: factors, a landmark a chunk, local tail."""
        factors = self._rank(geometry, prompt_tokens) * (prompt_tokens + _width(geometry))
        chunks = self._chunks(prompt_tokens)
        tail = prompt_tokens - chunks * self.chunk
        return factors + chunks * _width(geometry) + tail * _token(geometry)

    def _selected(self, geometry: Geometry) -> int:
        """Numbers that one selected chunk of every head takes."""
        return self.chunk * _token(geometry) + INDEX_NUMBERS * geometry.kv_heads

    def _outlier(self, geometry: Geometry) -> int:
        """Numbers that one outlier chunk of every head takes; it has no landmark."""
        return self._selected(geometry) - _width(geometry)


def _width(geometry: Geometry) -> int:
    """Numbers of one token's keys in one layer, H*D."""
    return geometry.kv_heads * geometry.head_dim


def _token(geometry: Geometry) -> int:
    """Numbers of one token's keys and values in one layer: the unit of a budget."""
    return 2 * _width(geometry)
