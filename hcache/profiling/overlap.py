"""Overlap of the positions that heads attend to most, streamed over the steps of a generation.

HeteroCache (arXiv 2601.13684): K(h)_t are the `topk` positions of head h's smoothed attention at step t, and
O(A, B) = |A n B| / min(|A|, |B|). Stability is the median over decode steps of O(K(h)_t, K(h)_prefill),
similarity of two heads of a layer the median of O(K(h)_t, K(h')_t). Only counts are kept of a step, never its
attention. Knows no model: it is fed one layer's scores at a time.

Shapes: L layers, H KV heads, n prompt positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from hcache.scoring import Pooling, pool


class Graph(Enum):
    """Which steps similarity is taken from: all decode steps, the last prompt token, the last decode step."""

    median = "median"
    prefill = "prefill"
    last_step = "last_step"


def top_sets(scores_Hn: Tensor, count: int) -> Tensor:
    """The `count` highest positions of each head as a mask [H, n]; ties go to the earlier position."""
    order = scores_Hn.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores_Hn, dtype=torch.bool).scatter_(-1, order, True)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """O(A, B) of masks [..., n]: shared positions over the smaller set's size, float64; 0 if one is empty."""
    smaller = torch.minimum(a.sum(-1), b.sum(-1)).clamp(min=1)
    return (a & b).sum(-1).double() / smaller.double()


def median(values: Tensor) -> Tensor:
    """Median over dimension 0, the mean of the two middle values where their number is even."""
    ordered = values.sort(dim=0).values
    count = len(ordered)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


@dataclass(frozen=True)
class Overlaps:
    """What the statistics came to: stability [L, H], and similarity [L, H, H] of each graph; float64."""

    stability: Tensor
    similarity: dict[Graph, Tensor]


@dataclass
class _Layer:
    """One layer's reference sets and, for each step or text, shared positions with the size of a set."""

    reference_Hn: Tensor | None = None
    with_prefill: list[tuple[Tensor, int]] = field(default_factory=list)
    pairs: list[tuple[Tensor, int]] = field(default_factory=list)
    prefill_pairs: list[tuple[Tensor, int]] = field(default_factory=list)
    last_pairs: list[tuple[Tensor, int]] = field(default_factory=list)


class OverlapStatistics:
    """Overlaps of one or several texts, pooled: medians are over all steps of all texts.

    Args:
        layers: number of layers, L.
        topk: positions in a set; at most the whole prompt.
        kernel: width of the average pool that smooths attention; odd.
    """

    def __init__(self, layers: int, topk: int, kernel: int) -> None:
        self.topk, self.kernel = topk, kernel
        self._layers = [_Layer() for _ in range(layers)]

    def start_text(self) -> None:
        """The next scores of each layer are those of a new text's last prompt token."""
        for layer in self._layers:
            layer.reference_Hn = None

    def observe(self, index: int, scores_Hn: Tensor) -> None:
        """One step of one layer: attention over the prompt positions, already reduced to KV heads."""
        layer = self._layers[index]
        size = min(self.topk, scores_Hn.shape[-1])
        sets_Hn = top_sets(pool(scores_Hn, self.kernel, Pooling.avg), size)
        # 0 and 1 and their sums are exact in any matmul precision; results stay on the device until `result`.
        pairs = (sets_Hn.float() @ sets_Hn.float().T, size)
        if layer.reference_Hn is None:
            layer.reference_Hn = sets_Hn
            layer.prefill_pairs.append(pairs)
            layer.last_pairs.append(pairs)
            return
        layer.with_prefill.append(((sets_Hn & layer.reference_Hn).sum(-1), size))
        layer.pairs.append(pairs)
        layer.last_pairs[-1] = pairs

    def result(self) -> Overlaps:
        """The medians. Every layer must have seen a prompt and a decode step."""
        stability = torch.stack([_median_of(layer.with_prefill) for layer in self._layers])
        similarity = {
            Graph.median: torch.stack([_median_of(layer.pairs) for layer in self._layers]),
            Graph.prefill: torch.stack([_median_of(layer.prefill_pairs) for layer in self._layers]),
            Graph.last_step: torch.stack([_median_of(layer.last_pairs) for layer in self._layers]),
        }
        return Overlaps(stability, similarity)


def _median_of(counts: list[tuple[Tensor, int]]) -> Tensor:
    return median(torch.stack([shared.cpu().double() / size for shared, size in counts]))
