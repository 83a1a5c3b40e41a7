"""HeteroCache while decoding: pivots are watched, and satellites get new tokens when their pivot drifts.

Source: HeteroCache, arXiv 2601.13684 (drift monitoring and asynchronous retrieval). Every `steps` tokens of a
sequence, each pivot's last queries are scored over its own prompt keys. The overlap of their top `base`
positions with the pivot's reference set is taken, query by query; when the median falls below the threshold,
the reference becomes the last query's set and each satellite's resident prompt tokens become that query's top
positions.

Shapes: B batch, T tokens of this call, Hq query heads, H KV heads, G = Hq/H, D head dim, n prompt tokens, W
steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hcache.cache.offload import OffloadManager
from hcache.cache.state import Bytes, StoreLayer, add_bytes, one_by_one
from hcache.scoring import Group, Pooling, pool, reduce_group, top_positions, window_attention


@dataclass(frozen=True)
class DriftRule:
    """How heads are scored and when a pivot has drifted; fields as in HeteroCache."""

    window: int
    kernel: int
    pooling: Pooling
    group: Group
    steps: int
    threshold: float
    visible_after: int

    def smooth(self, attention_HGn: Tensor) -> Tensor:
        """[H, G, n] attention to [H, n] scores: pooled over neighbours, then joined over the group."""
        return reduce_group(pool(attention_HGn, self.kernel, self.pooling), self.group)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps of one prompt.

    Args:
        counts: prompt tokens kept by each KV head.
        satellites: pivot -> the satellites it watches for.
        base: size of a pivot's reference set.
    """

    counts: list[int]
    satellites: dict[int, list[int]]
    base: int


@dataclass
class Refresh:
    """Rows on their way into a satellite: visible from token number `due` of its sequence on."""

    due: int
    head: int
    positions: Tensor
    keys: Tensor
    values: Tensor


class Watch:
    """One sequence of a layer under observation.

    Args:
        satellites: pivot -> satellites that don't hold the whole prompt.

    Attributes:
        reference: pivot -> bool mask [n] of the tokens it attended to when its satellites were last filled.
        queries: up to W latest queries of the pivots, each [P, G, D].
        seen: tokens after the prompt so far.
        pending: refreshes that are not visible yet.
    """

    def __init__(self, satellites: dict[int, list[int]]) -> None:
        self.satellites = satellites
        self.pivots = sorted(satellites)
        self.reference: dict[int, Tensor] = {}
        self.queries: list[Tensor] = []
        self.seen = 0
        self.pending: list[Refresh] = []


class HeteroLayer(StoreLayer):
    """A store whose satellites are rewritten in place.

    Args:
        plans: one a sequence.
        rule: scoring and drift.
        manager: where the full KV of satellites waits.
    """

    def __init__(self, plans: list[LayerPlan], rule: DriftRule, manager: OffloadManager) -> None:
        super().__init__()
        self._plans, self._rule, self._manager = plans, rule, manager
        self._watches: list[Watch] = []
        self._windows = self._triggers = self._refreshed = 0

    def choose(self, q: Tensor, k: Tensor, v: Tensor, sequence: int) -> list[Tensor]:
        plan, tokens = self._plans[sequence], k.shape[1]
        watch = Watch(
            {
                pivot: partial
                for pivot, members in plan.satellites.items()
                if (partial := [h for h in members if plan.counts[h] < tokens])
            }
        )
        self._watches.append(watch)
        everything = torch.arange(tokens, device=k.device)
        if min(plan.counts) >= tokens:
            return [everything] * k.shape[0]
        scores = self._rule.smooth(window_attention(q, k, self._rule.window))
        for pivot, members in watch.satellites.items():
            watch.reference[pivot] = _mask(top_positions(scores[pivot], plan.base), tokens)
            for head in members:
                self._manager.store(sequence, head, k[head], v[head])
        return [
            everything if count >= tokens else top_positions(row, count)
            for row, count in zip(scores, plan.counts, strict=True)
        ]

    def step(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        real = [True] * q.shape[0] if valid is None else valid[:, 0].tolist()
        watched = [b for b, watch in enumerate(self._watches) if real[b] and watch.pivots]
        for b in watched:
            self._watches[b].seen += 1
            self._deliver(b)
        out = super().extend(q, k, v, valid)
        for b in watched:
            self._observe(b, q[b, :, 0])
        return out

    def extend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Token by token where pivots watch: a refresh inside the question is seen by the rest of it."""
        if not any(watch.pivots for watch in self._watches):
            return super().extend(q, k, v, valid)
        return one_by_one(self, q, k, v, valid)

    def _deliver(self, b: int) -> None:
        """Write the refreshes that the coming token is to see."""
        watch = self._watches[b]
        due = [refresh for refresh in watch.pending if refresh.due <= watch.seen]
        for refresh in due:
            self.store.write(b * len(self._kept[b]) + refresh.head, 0, refresh.keys, refresh.values)
            self._kept[b][refresh.head] = refresh.positions.cpu()
            self._refreshed += refresh.positions.numel()
        watch.pending = [refresh for refresh in watch.pending if refresh.due > watch.seen]

    def _observe(self, b: int, q_HqD: Tensor) -> None:
        """Collect the pivots' query; with W of them, look whether a pivot has drifted."""
        watch = self._watches[b]
        rows_HGD = q_HqD.unflatten(0, (len(self._kept[b]), -1))
        watch.queries.append(rows_HGD[watch.pivots])
        if len(watch.queries) == self._rule.steps:
            queries_PGWD = torch.stack(watch.queries, dim=2)
            watch.queries = []
            for queries_GWD, pivot in zip(queries_PGWD, watch.pivots, strict=True):
                self._review(b, pivot, self._prompt_scores(b, pivot, queries_GWD))

    def _prompt_scores(self, b: int, pivot: int, queries_GWD: Tensor) -> Tensor:
        """Scores [W, n] of a pivot's queries over its own prompt keys, softmax over the prompt alone."""
        heads = len(self._kept[b])
        keys_nD, _ = self.store.read(b * heads + pivot, self._kept[b][pivot].numel())
        logits_GWn = queries_GWD.float() @ keys_nD.float().T * keys_nD.shape[1] ** -0.5
        return self._rule.smooth(logits_GWn.softmax(-1).transpose(0, 1))

    def _review(self, b: int, pivot: int, scores_Wn: Tensor) -> None:
        """Median overlap of the window with the reference; below the threshold, send for new rows."""
        watch, base = self._watches[b], self._plans[b].base
        tops_Wb = torch.stack([top_positions(row, base) for row in scores_Wn])
        overlap = watch.reference[pivot][tops_Wb].float().mean(1).quantile(0.5)
        self._windows += 1
        if overlap.item() >= self._rule.threshold:
            return
        self._triggers += 1
        watch.reference[pivot] = _mask(tops_Wb[-1], scores_Wn.shape[1])
        for head in watch.satellites[pivot]:
            positions = top_positions(scores_Wn[-1], self._plans[b].counts[head])
            keys, values = self._manager.fetch(b, head, positions)
            due = watch.seen + self._rule.visible_after
            watch.pending.append(Refresh(due, head, positions, keys, values))

    def kept(self) -> list[list[Tensor]]:
        """A refresh that the next token will see counts as kept already."""
        positions = super().kept()
        for b, watch in enumerate(self._watches):
            for refresh in watch.pending:
                if refresh.due <= watch.seen + 1:
                    positions[b][refresh.head] = refresh.positions.cpu()
        return positions

    def nbytes(self) -> Bytes:
        total = add_bytes(super().nbytes(), self._manager.nbytes())
        masks = sum(mask.nbytes for watch in self._watches for mask in watch.reference.values())
        queries = sum(rows.nbytes for watch in self._watches for rows in watch.queries)
        waiting = sum(r.keys.nbytes + r.values.nbytes for watch in self._watches for r in watch.pending)
        total["device"]["metadata"] += masks + queries
        total["device"]["reserved"] += waiting
        return total

    def counters(self) -> dict[str, float]:
        return {
            "windows": self._windows,
            "triggers": self._triggers,
            "refreshed_tokens": self._refreshed,
            "host_to_device_bytes": self._manager.moved_bytes,
        }


def _mask(positions: Tensor, tokens: int) -> Tensor:
    """Bool [tokens], True at `positions`."""
    return torch.zeros(tokens, dtype=torch.bool, device=positions.device).index_fill_(0, positions, True)
